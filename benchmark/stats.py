"""Effects with 95 % bootstrap intervals, and the verdict on a claim.

Data are tasks: a list with one 1-D array of run scores for each environment. Tasks may have
different numbers of runs. Two lists that are compared name the same environments in the same order.

The bootstrap is stratified, as in Agarwal et al. 2021 (arXiv 2108.13264, section 4): each resample
draws the runs of every task with replacement from that task alone, so environments are fixed and
only the choice of seeds is uncertain. Intervals are percentile intervals. A task with one run, or
with equal scores, has nothing to resample and stays as it is: its runs add no width, which says
nothing about the seeds that were not run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Array = NDArray[np.float64]
Statistic = Literal["mean", "iqm"]
Effect = Literal["difference", "ratio"]
Verdict = Literal["reproduced", "not reproduced", "inconclusive"]

RESAMPLES = 10_000
LEVELS = (2.5, 97.5)  # percentiles that bound 95 %
FLOOR = 1e-12  # of its observed value: the least denominator of a resampled ratio
UNBOUNDED = 1e6  # ends beyond this come from a floored denominator
BATCH_VALUES = 4_000_000  # resampled curve values held at once, 32 MB


@dataclass(frozen=True)
class Interval:
    """An effect and its 95 % interval, in the unit of the effect.

    The interval may leave `value` out, as percentile intervals of skewed effects do. An end is
    infinite where the denominator of a ratio may be zero.
    """

    value: float
    low: float
    high: float


def aggregate(tasks: Sequence[ArrayLike], statistic: Statistic) -> float:
    """One number for all runs of all tasks, in the unit of the scores.

    "mean": the mean over the runs of each task, then over tasks, so each task counts the same.
    "iqm": the interquartile mean of Agarwal et al. 2021: the mean without the lowest and the
    highest quarter of all runs of all tasks pooled. The quarter is rounded down, so fewer than four
    scores are all kept, and a task with more runs counts for more.

    Raises ValueError for no tasks, a task without runs or not 1-D, and a score that is not finite.
    """
    return float(combine(checked(tasks), statistic))


def score_interval(
    tasks: Sequence[ArrayLike], statistic: Statistic, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """`aggregate` of the scores and its interval. Raises ValueError as `aggregate` does."""
    samples = checked(tasks)

    def effect(samples: list[Array]) -> Array:
        return combine(samples, statistic)

    drawn = resampled(effect, samples, np.random.default_rng(seed), resamples)
    return interval(effect(samples), drawn)


def effect_interval(
    ours: Sequence[ArrayLike],
    others: Sequence[ArrayLike],
    effect: Effect,
    statistic: Statistic,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Interval:
    """Effect of `ours` against `others`, with both sides resampled, each task by itself.

    "difference": aggregate of ours minus aggregate of others, in the unit of the scores. Nothing is
    rescaled: over several environments the one with the largest scores rules a mean, and an IQM
    mostly keeps those with scores in the middle. Use it where environments share one scale.
    "ratio": the scores of each task are divided by the mean of the other side's scores of that task
    in the same resample, then aggregated; without unit, so environments of any scale count alike.
    The denominator is a mean for either statistic.

    A resample whose denominator is not positive is read as the limit of one that falls to zero, a
    ratio beyond all bounds with the sign of ours. Where more than 2.5 % of the resamples are such,
    the end of the interval is infinite.

    Raises ValueError as `aggregate` does, for lists of different lengths, and for a ratio to tasks
    whose mean is not positive: it would name the worse side as the better one.
    """
    samples_ours, samples_others = checked(ours), checked(others)
    same_length(samples_ours, samples_others)
    observed = [runs.mean() for runs in samples_others]
    if effect == "ratio":
        check_positive(observed)

    def compare(samples: list[Array]) -> Array:
        above, below = samples[: len(observed)], samples[len(observed) :]
        if effect == "difference":
            return combine(above, statistic) - combine(below, statistic)
        means = [
            np.maximum(runs.mean(axis=-1, keepdims=True), FLOOR * mean)
            for runs, mean in zip(below, observed, strict=True)
        ]
        quotients = [runs / mean for runs, mean in zip(above, means, strict=True)]
        return combine(quotients, statistic)

    samples = samples_ours + samples_others
    drawn = resampled(compare, samples, np.random.default_rng(seed), resamples)
    return interval(compare(samples), drawn, unbounded=effect == "ratio")


def published_interval(
    ours: Sequence[ArrayLike],
    numbers: Sequence[tuple[float, float | None, int | None]],
    effect: Effect,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Interval:
    """Effect of `ours` against published means, one (value, spread, seeds) for each task.

    The effect of a task is the mean of its runs minus, or divided by, the published value; the
    effects are averaged over tasks. `spread` is a standard deviation with ddof 0.

    A published mean of n seeds is uncertain too. Each resample draws it from Normal(value, standard
    error), with standard error = spread * sqrt(n / (n - 1)) / sqrt(n) = spread / sqrt(n - 1). Where
    spread or seeds is unknown, or n = 1, it cannot be had: the value is then taken as exact, and
    the interval is too narrow. A normal, not a t, distribution: narrow for few seeds as well.

    A draw that is not positive, the denominator of a ratio, is read as in `effect_interval`.

    Raises ValueError as `aggregate` does, for lists of different lengths, for a published value
    that is not finite, and for a ratio to one that is not positive.
    """
    samples = checked(ours)
    same_length(samples, numbers)
    values = np.array([value for value, _, _ in numbers], dtype=float)  # (tasks,)
    if not np.isfinite(values).all():
        raise ValueError(f"published values must be finite: {listed(values)}")
    if effect == "ratio":
        check_positive(values)
    errors = np.array([standard_error(spread, seeds) for _, spread, seeds in numbers])
    rng = np.random.default_rng(seed)

    def compare(means: Array, published: Array) -> Array:
        """(tasks, resamples) of both -> (resamples,)"""
        if effect == "difference":
            return (means - published).mean(axis=0)
        return (means / np.maximum(published, FLOOR * values[:, None])).mean(axis=0)

    means = np.stack(
        [resampled(lambda runs: runs[0].mean(axis=-1), [r], rng, resamples) for r in samples]
    )
    published = rng.normal(values[:, None], errors[:, None], means.shape)
    observed = np.array([[runs.mean()] for runs in samples])
    value = compare(observed, values[:, None])[0]
    return interval(value, compare(means, published), unbounded=effect == "ratio")


def probability_of_improvement(
    ours: Sequence[ArrayLike],
    others: Sequence[ArrayLike],
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Interval:
    """P(X > Y) + P(X = Y) / 2 for a run X of ours and Y of others, averaged over tasks.

    For each task this is the Mann-Whitney U statistic over the number of pairs (Agarwal et al.
    2021, section 4.3). In [0, 1]; 0.5 where neither side is better. Raises ValueError as
    `aggregate` does and for lists of different lengths.
    """
    samples_ours, samples_others = checked(ours), checked(others)
    same_length(samples_ours, samples_others)
    count = len(samples_ours)

    def probability(samples: list[Array]) -> Array:
        chances = []
        for above, below in zip(samples[:count], samples[count:], strict=True):
            n, m = above.shape[-1], below.shape[-1]
            # with average ranks for ties, the sum of our ranks exceeds its least value by U
            ranks = stats.rankdata(np.concatenate([above, below], axis=-1), axis=-1)
            u = ranks[..., :n].sum(axis=-1) - n * (n + 1) / 2
            chances.append(u / (n * m))
        return np.mean(chances, axis=0)

    samples = samples_ours + samples_others
    drawn = resampled(probability, samples, np.random.default_rng(seed), resamples)
    return interval(probability(samples), drawn)


def curve_band(
    curves: ArrayLike, statistic: Statistic = "mean", seed: int = 0, resamples: int = 2000
) -> tuple[Array, Array, Array]:
    """Centre and pointwise 95 % band of learning curves (runs, steps): three arrays (steps,).

    A column uses its finite values only; NaN where it has none. With one finite value the band is
    that value. Steps at which the same runs have values share their resamples, so whole curves are
    resampled and the band is no rougher than the curves. Raises ValueError if `curves` is not 2-D.
    """
    curves = np.asarray(curves, dtype=float)
    if curves.ndim != 2:
        raise ValueError(f"curves must be (runs, steps), not of shape {curves.shape}")
    rng = np.random.default_rng(seed)
    centre, low, high = np.full((3, curves.shape[1]), np.nan)

    def middle(values: Array, axis: int) -> Array:
        return combine([np.moveaxis(values, axis, -1)], statistic)

    patterns, group = np.unique(np.isfinite(curves), axis=1, return_inverse=True)
    for i, present in enumerate(patterns.T):
        if not present.any():
            continue
        steps = group == i
        values = curves[np.ix_(present, steps)].T  # (these steps, present runs)
        centre[steps] = low[steps] = high[steps] = middle(values, -1)
        if present.sum() > 1:
            band = stats.bootstrap(
                (values,),
                middle,
                axis=-1,
                vectorized=True,
                n_resamples=resamples,
                batch=max(1, BATCH_VALUES // values.size),
                method="percentile",
                rng=rng,
            ).confidence_interval
            low[steps], high[steps] = band.low, band.high
    return centre, low, high


def verdict(interval: Interval, low: float | None, high: float | None) -> Verdict:
    """Whether the effect lies in the region from `low` to `high`, both of which belong to it.

    None is unbounded. The whole interval: "reproduced"; none of it: "not reproduced"; a part of it,
    if only an end that touches the region: "inconclusive".
    """
    low = -np.inf if low is None else low
    high = np.inf if high is None else high
    if low <= interval.low and interval.high <= high:
        return "reproduced"
    if interval.high < low or high < interval.low:
        return "not reproduced"
    return "inconclusive"


def combine(samples: list[Array], statistic: Statistic) -> Array:
    """`aggregate` along the last axis: arrays (..., runs of the task) -> (...)."""
    if statistic == "mean":
        return np.mean([runs.mean(axis=-1) for runs in samples], axis=0)
    return stats.trim_mean(np.concatenate(samples, axis=-1), 0.25, axis=-1)


def resampled(
    statistic: Callable[[list[Array]], Array],
    samples: list[Array],
    rng: np.random.Generator,
    resamples: int,
) -> Array:
    """The statistic of `resamples` stratified bootstrap resamples: (resamples,).

    `statistic` maps arrays (..., runs), one for each sample, to (...).
    """
    # scipy refuses a sample of one run, which every resample would repeat
    varying = [i for i, runs in enumerate(samples) if runs.size > 1]
    if not varying:
        return np.full(resamples, statistic(samples))

    def with_fixed(*drawn: Array, axis: int) -> Array:
        full = [np.broadcast_to(runs, (*drawn[0].shape[:-1], runs.size)) for runs in samples]
        for i, runs in zip(varying, drawn, strict=True):
            full[i] = runs
        return statistic(full)

    return stats.bootstrap(
        [samples[i] for i in varying],
        with_fixed,
        vectorized=True,
        n_resamples=resamples,
        method="percentile",
        rng=rng,
    ).bootstrap_distribution


def interval(value: float, drawn: Array, unbounded: bool = False) -> Interval:
    """Percentile interval of the resampled effects (resamples,); with `unbounded`, an end that can
    only come from a floored denominator is infinite."""
    if np.ptp(drawn) == 0:
        # of equal effects: the value itself, from which they may differ in the last bit, as NumPy
        # adds up one column of many tasks in another order than several
        return Interval(float(value), float(value), float(value))
    ends = np.percentile(drawn, LEVELS)
    if unbounded:
        ends = np.where(np.abs(ends) > UNBOUNDED, np.copysign(np.inf, ends), ends)
    return Interval(float(value), float(ends[0]), float(ends[1]))


def standard_error(spread: float | None, seeds: int | None) -> float:
    """Of a published mean, in the unit of `spread` (ddof 0); 0 where it cannot be had."""
    if spread is None or seeds is None or seeds < 2:
        return 0.0
    return spread / np.sqrt(seeds - 1)


def checked(tasks: Sequence[ArrayLike]) -> list[Array]:
    """The tasks as arrays of floats. Raises ValueError as `aggregate` says."""
    samples = [np.asarray(runs, dtype=float) for runs in tasks]
    if not samples:
        raise ValueError("there are no tasks")
    for i, runs in enumerate(samples, 1):
        if runs.ndim != 1 or not runs.size:
            raise ValueError(f"task {i} must be 1-D with one run or more, not {runs.shape}")
        if not np.isfinite(runs).all():
            raise ValueError(f"task {i} has scores that are not finite: {listed(runs)}")
    return samples


def same_length(ours: Sequence, others: Sequence) -> None:
    if len(ours) != len(others):
        raise ValueError(f"{len(ours)} tasks cannot be compared with {len(others)}")


def check_positive(denominators: Sequence[float]) -> None:
    wrong = [value for value in denominators if value <= 0]
    if wrong:
        raise ValueError(f"a ratio needs positive denominators, not {listed(wrong)}")


def listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
