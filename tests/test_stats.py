"""benchmark/stats.py against rliable, exact enumeration, closed forms and hand-computed cases."""

import itertools

import numpy as np
import pytest
from rliable import library, metrics
from scipy import stats

from benchmark.stats import (
    Interval,
    aggregate,
    curve_band,
    effect_interval,
    probability_of_improvement,
    published_interval,
    score_interval,
    verdict,
)

pytestmark = pytest.mark.filterwarnings("error")

# three environments with scales of their own, six and five runs
OURS = [
    np.array([3.1, 4.7, 5.2, 2.2, 6.9, 4.1]),
    np.array([9.5, 7.3, 8.8, 11.2, 6.1, 7.9]),
    np.array([1.2, 14.8, 6.6, 10.3, 3.9, 8.1]),
]
OTHERS = [
    np.array([2.9, 3.3, 4.9, 1.7, 4.2]),
    np.array([8.1, 9.9, 5.5, 7.7, 6.8]),
    np.array([2.4, 5.1, 11.6, 4.4, 7.2]),
]


def close(interval, expected, share=0.05):
    """Both ends within a share of the expected width, which is a fifth of a standard error."""
    low, high = expected
    return max(abs(interval.low - low), abs(interval.high - high)) < share * (high - low)


def exact(effect, samples):
    """95 % percentile interval of effect(samples) over all resamples, which are equally likely."""
    pools = [list(itertools.product(runs, repeat=len(runs))) for runs in samples]
    effects = [effect(*map(np.array, draw)) for draw in itertools.product(*pools)]
    # without interpolation: few resamples have jumps between their effects
    return np.percentile(effects, [2.5, 97.5], method="inverted_cdf")


def iqm(runs):
    return stats.trim_mean(runs, 0.25)


def is_point(interval, value):
    return interval.low == interval.value == interval.high == pytest.approx(value)


# ------------------------------------------------------------------------------- VALUES


def test_aggregate_by_hand():
    # 8 scores: the two lowest (0, 1) and the two highest (8, 100) go
    tasks = [[100, 2, 3, 1], [0, 8, 4, 7]]
    assert aggregate(tasks, "iqm") == (2 + 3 + 4 + 7) / 4
    assert aggregate(tasks, "mean") == (106 / 4 + 19 / 4) / 2
    # 5 scores: a quarter rounded down is one on each side; 3 scores: none
    assert aggregate([[9, 1, 2, 3, -50]], "iqm") == 2
    assert aggregate([[1, 2, 9]], "iqm") == 4
    # each task counts the same for the mean, each run for the IQM
    assert aggregate([[1, 1, 1, 1, 1, 1], [7]], "mean") == 4
    assert aggregate([[1, 1, 1, 1, 1, 1], [7]], "iqm") == 1


def test_effects_by_hand():
    ours, others = [[2.0, 4.0], [30.0]], [[1.0, 2.0], [10.0, 50.0]]
    assert effect_interval(ours, others, "difference", "mean").value == 33 / 2 - 31.5 / 2
    assert effect_interval(ours, others, "ratio", "mean").value == (3 / 1.5 + 30 / 30) / 2
    # the quotients 2/1.5, 4/1.5 and 1: fewer than four, so none is trimmed
    value = effect_interval(ours, others, "ratio", "iqm").value
    assert value == pytest.approx((2 / 1.5 + 4 / 1.5 + 1) / 3)
    numbers = [(2.0, None, None), (10.0, None, None)]
    assert published_interval(ours, numbers, "difference").value == (1 + 20) / 2
    assert published_interval(ours, numbers, "ratio").value == (3 / 2 + 30 / 10) / 2
    # pairs won: 3 > 1, 3 > 2, half of 2 = 2, 2 > 1; the second task is lost
    value = probability_of_improvement([[3.0, 2.0], [0.0]], [[1.0, 2.0], [5.0]]).value
    assert value == (3.5 / 4 + 0) / 2


# ------------------------------------------------------------------------------- RLIABLE


@pytest.fixture
def global_seed():
    # rliable draws from NumPy's global generator, whatever random_state it is given
    np.random.seed(0)


def test_iqm_equals_rliable(global_seed):
    matrix = np.stack(OURS, axis=1)
    values, ends = library.get_interval_estimates(
        {"ours": matrix}, lambda scores: np.array([metrics.aggregate_iqm(scores)]), reps=8000
    )
    found = score_interval(OURS, "iqm")
    assert found.value == pytest.approx(values["ours"][0], rel=1e-12)
    assert close(found, ends["ours"][:, 0])


def test_mean_equals_rliable(global_seed):
    matrix = np.stack(OURS, axis=1)
    values, ends = library.get_interval_estimates(
        {"ours": matrix}, lambda scores: np.array([metrics.aggregate_mean(scores)]), reps=8000
    )
    found = score_interval(OURS, "mean")
    assert found.value == pytest.approx(values["ours"][0], rel=1e-12)
    assert close(found, ends["ours"][:, 0])


def test_probability_of_improvement_equals_rliable(global_seed):
    pair = (np.stack(OURS, axis=1), np.stack(OTHERS, axis=1))
    values, ends = library.get_interval_estimates(
        {"pair": pair},
        lambda x, y: np.array([metrics.probability_of_improvement(x, y)]),
        reps=1000,
    )
    found = probability_of_improvement(OURS, OTHERS)
    assert found.value == pytest.approx(values["pair"][0], rel=1e-12)
    assert close(found, ends["pair"][:, 0], share=0.08)


# ------------------------------------------------------------------------------- ENUMERATION


def test_mean_interval_is_binomial():
    # the mean of 20 resampled runs, half of them 1, is Binomial(20, 1/2) / 20
    ends = stats.binom(20, 0.5).ppf([0.025, 0.975]) / 20
    found = score_interval([[0.0, 1.0] * 10], "mean")
    assert (found.low, found.high) == pytest.approx(ends) == (0.3, 0.7)


@pytest.mark.parametrize(
    ("effect", "statistic", "function"),
    [
        ("difference", "mean", lambda a, b: a.mean() - b.mean()),
        ("difference", "iqm", lambda a, b: iqm(a) - iqm(b)),
        ("ratio", "mean", lambda a, b: a.mean() / b.mean()),
        ("ratio", "iqm", lambda a, b: iqm(a / b.mean())),
    ],
)
def test_effect_intervals_equal_enumeration(effect, statistic, function):
    x, y = np.array([4.1, 7.3, 5.2, 9.4]), np.array([2.2, 3.9, 3.1])
    assert close(effect_interval([x], [y], effect, statistic), exact(function, [x, y]))


def test_ratio_over_tasks_equals_enumeration():
    # the second environment's scale is a thousand times the first's, and its numbers of runs differ
    a, b = np.array([1.0, 1.4, 2.1]), np.array([0.6, 0.8, 1.3])
    c, d = np.array([2000.0, 3100.0]), np.array([900.0, 1700.0, 2600.0])
    found = effect_interval([a, c], [b, d], "ratio", "mean")
    expected = exact(
        lambda a, c, b, d: (a.mean() / b.mean() + c.mean() / d.mean()) / 2, [a, c, b, d]
    )
    assert close(found, expected)
    # in any unit it is the same ratio
    other_unit = effect_interval([a, c / 1024], [b, d / 1024], "ratio", "mean")
    assert other_unit == found


def test_strata_are_resampled_by_themselves():
    # runs of a task hardly differ, tasks do: pooled runs would mix tasks in other shares
    tasks = [np.array([0.0, 0.2, 0.5]), np.array([10.0, 10.3, 10.4, 10.8])]
    found = score_interval(tasks, "mean")
    assert close(found, exact(lambda a, b: (a.mean() + b.mean()) / 2, tasks))
    pooled = score_interval([np.concatenate(tasks)], "mean")
    assert pooled.high - pooled.low > 10 * (found.high - found.low)
    both = effect_interval(tasks, [t - 1 for t in tasks], "difference", "mean")
    assert both.value == pytest.approx(1) and 0 < both.low < both.high < 2


def test_sides_are_not_paired():
    # equal runs on both sides: paired resampling would give a difference of exactly zero
    found = effect_interval(OURS, OURS, "difference", "mean")
    assert found.value == 0 and found.low < -0.5 and found.high > 0.5


# ------------------------------------------------------------------------------- PUBLISHED


def test_published_interval_closed_form():
    # our runs are constant, so the published mean alone is uncertain: 3 seeds, standard error
    # 2 * sqrt(3 / 2) / sqrt(3) = sqrt(2)
    published = stats.norm(20, np.sqrt(2)).ppf([0.025, 0.975])
    found = published_interval([[30.0, 30.0]], [(20.0, 2.0, 3)], "difference")
    assert found.value == 10 and close(found, 30 - published[::-1], share=0.03)
    found = published_interval([[30.0, 30.0]], [(20.0, 2.0, 3)], "ratio")
    assert found.value == 1.5 and close(found, 30 / published[::-1], share=0.03)


def test_published_interval_adds_both_uncertainties():
    # the variances of the means add, over two tasks at a quarter of their sum each
    runs = stats.norm(50, 3).ppf((np.arange(200) + 0.5) / 200)
    numbers = [(40.0, 1.0, 5), (30.0, None, 5)]
    error = np.sqrt(2 * runs.var() / 200 + 1.0 / 4) / 2
    found = published_interval([runs, runs], numbers, "difference")
    assert found.value == pytest.approx(15)
    assert close(found, stats.norm(15, error).ppf([0.025, 0.975]))


@pytest.mark.parametrize("number", [(4.0, None, 5), (4.0, 2.0, None), (4.0, 2.0, 1), (4.0, 0.0, 5)])
def test_published_value_without_error_is_exact(number):
    assert is_point(published_interval([[6.0]], [number], "ratio"), 1.5)
    found = published_interval([[5.0, 6.1, 7.3, 8.8]], [number], "difference")
    expected = exact(lambda a: a.mean() - 4, [[5.0, 6.1, 7.3, 8.8]])
    assert close(found, expected)


# ------------------------------------------------------------------------------- DENOMINATORS


def test_denominator_near_zero():
    # standard error 1 about 1: every sixth draw is negative, so the ratio has no upper end
    low = 2 / stats.norm(1, 1).ppf(0.975)
    found = published_interval([[2.0]], [(1.0, 2.0, 5)], "ratio")
    assert found.value == 2 and found.low == pytest.approx(low, rel=0.05)
    assert found.high == np.inf
    # with a negative score it has no lower one
    found = published_interval([[-2.0]], [(1.0, 2.0, 5)], "ratio")
    assert found.low == -np.inf and found.high == pytest.approx(-low, rel=0.05)
    # and so for a resampled baseline: its mean is positive, half of its resamples' are not
    found = effect_interval([[2.0]], [[-4.0, 5.0]], "ratio", "mean")
    assert (found.value, found.low, found.high) == (4, 0.4, np.inf)
    # zero over anything positive is zero
    assert is_point(published_interval([[0.0]], [(1.0, 2.0, 5)], "ratio"), 0)


def test_denominators_must_be_positive():
    ones = [[1.0], [1.0], [1.0]]
    with pytest.raises(ValueError, match=r"positive denominators, not -2\.5, 0$"):
        effect_interval(ones, [[-3.0, -2.0], [4.0], [0.0]], "ratio", "mean")
    with pytest.raises(ValueError, match=r"positive denominators, not -2\.5$"):
        published_interval(ones, [(-2.5, 1.0, 5), (1.0, None, None), (2.0, 1.0, 1)], "ratio")
    # a difference may have any sign
    assert is_point(effect_interval([[1.0]], [[-2.5]], "difference", "iqm"), 3.5)


# ------------------------------------------------------------------------------- DEGENERATE


@pytest.mark.parametrize("statistic", ["mean", "iqm"])
def test_nothing_to_resample(statistic):
    assert is_point(score_interval([[0.1]], statistic), 0.1)
    value = {"mean": (0.1 + 0.7) / 2, "iqm": 0.1}[statistic]
    assert is_point(score_interval([[0.1] * 3, [0.7]], statistic), value)
    assert is_point(effect_interval([[0.3] * 3], [[0.1] * 7], "ratio", statistic), 3)
    assert is_point(effect_interval([[0.3]], [[0.1]], "difference", statistic), 0.2)
    assert is_point(probability_of_improvement([[1.0]], [[1.0] * 4]), 0.5)


def test_rounding_makes_no_interval():
    # a mean over 8 tasks differs in the last bit between one resample and many
    runs = np.random.default_rng(0).random((20, 1))
    for count in range(1, 21):
        numbers = [(0.1, None, None)] * count
        assert is_point(
            published_interval(runs[:count], numbers, "ratio", resamples=50),
            runs[:count].mean() / 0.1,
        )


def test_single_run_beside_others():
    # the single run counts, though it cannot be resampled
    runs = np.array([1.0, 2.2, 3.1, 5.7])
    found = score_interval([[10.0], runs], "mean")
    assert close(found, exact(lambda a: (10 + a.mean()) / 2, [runs]))
    found = score_interval([runs, [2.0]], "iqm")
    assert close(found, exact(lambda a: iqm([*a, 2.0]), [runs]))
    found = probability_of_improvement([runs], [[2.0]])
    assert close(found, exact(lambda a: (a > 2).mean(), [runs]))


def test_separated_scores_always_improve():
    assert is_point(probability_of_improvement([[5.0, 6.0, 7.0]], [[1.0, 2.0, 4.0]]), 1)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([], "no tasks"),
        ([[1.0], []], "task 2"),
        ([[[1.0, 2.0]]], "task 1"),
        ([[1.0], [1.0, np.nan]], r"task 2 has scores that are not finite: 1, nan"),
    ],
)
def test_bad_scores_are_refused(tasks, message):
    with pytest.raises(ValueError, match=message):
        score_interval(tasks, "mean")


def test_different_tasks_are_refused():
    one, two = [[1.0, 2.0]], [[1.0, 2.0], [3.0, 4.0]]
    with pytest.raises(ValueError, match="1 tasks cannot be compared with 2"):
        effect_interval(one, two, "difference", "mean")
    with pytest.raises(ValueError, match="2 tasks cannot be compared with 1"):
        probability_of_improvement(two, one)
    with pytest.raises(ValueError, match="1 tasks cannot be compared with 2"):
        published_interval(one, [(1.0, None, None)] * 2, "ratio")
    with pytest.raises(ValueError, match="published values must be finite: nan"):
        published_interval(one, [(np.nan, None, None)], "difference")


def test_seed_decides():
    curves = np.random.default_rng(0).normal(size=(12, 4))
    calls = [
        lambda seed: score_interval(OURS, "iqm", seed),
        lambda seed: effect_interval(OURS, OTHERS, "ratio", "iqm", seed),
        lambda seed: published_interval(OURS, [(5.0, 1.0, 5)] * 3, "difference", seed),
        lambda seed: curve_band(curves, "mean", seed)[1].tolist(),
    ]
    for call in calls:
        assert call(3) == call(3) != call(4)
    # 35 pairs a task make a coarse grid, on which ends of different seeds can be the same
    assert probability_of_improvement(OURS, OTHERS, 3) == probability_of_improvement(
        OURS, OTHERS, 3
    )


# ------------------------------------------------------------------------------- CURVES


def test_curve_band_is_pointwise():
    curves = np.array([[0.0, 5.0, 1.0], [1.0, 9.0, 1.5], [4.0, 6.0, 7.0], [6.0, 2.0, 3.0]])
    for statistic, function in (("mean", np.mean), ("iqm", iqm)):
        centre, low, high = curve_band(curves, statistic, resamples=10_000)
        for step, column in enumerate(curves.T):
            assert centre[step] == pytest.approx(function(column))
            assert close(Interval(0, low[step], high[step]), exact(function, [column]))


def test_curve_band_uses_finite_values():
    nan = np.nan
    runs = np.array([1.0, 3.5, 4.0, 9.0])
    curves = np.full((5, 6), nan)
    curves[:4, 0] = curves[1:, 1] = curves[:4, 4] = runs  # four runs each, not the same four
    curves[2, 2] = 7.0  # one run
    curves[0, 4] = np.inf  # three runs; no run has a value at step 3
    curves[1:3, 5] = [2.0, 8.0]
    centre, low, high = curve_band(curves, resamples=10_000)
    assert centre == pytest.approx([17.5 / 4, 17.5 / 4, 7, nan, 16.5 / 3, 5], nan_ok=True)
    assert (low[2], high[2]) == (7, 7) and np.isnan([low[3], high[3]]).all()
    for step, column in ((0, runs), (1, runs), (4, runs[1:]), (5, curves[1:3, 5])):
        assert close(Interval(0, low[step], high[step]), exact(np.mean, [column]))


def test_curve_band_of_one_run_is_the_curve():
    curve = np.array([[0.1, np.nan, 0.3, -2.0]])
    for line in curve_band(curve):
        np.testing.assert_array_equal(line, curve[0])
    assert [line.shape for line in curve_band(np.empty((3, 0)))] == [(0,)] * 3
    with pytest.raises(ValueError, match=r"not of shape \(4,\)"):
        curve_band(curve[0])


def test_long_curves_are_resampled_in_batches(monkeypatch):
    curves = np.random.default_rng(0).normal(size=(4, 50))
    whole = curve_band(curves)
    monkeypatch.setattr("benchmark.stats.BATCH_VALUES", 200 * 7)
    np.testing.assert_array_equal(whole, curve_band(curves))


# ------------------------------------------------------------------------------- VERDICT


@pytest.mark.parametrize(
    ("low", "high", "bounds", "expected"),
    [
        (1, 2, (0, 3), "reproduced"),
        (1, 2, (0, None), "reproduced"),
        (1, 2, (None, 3), "reproduced"),
        (1, 2, (1, 2), "reproduced"),  # bounds belong to the region
        (1, 1, (1, None), "reproduced"),
        (1, 1, (None, 1), "reproduced"),
        (1, np.inf, (1, None), "reproduced"),
        (1, 2, (3, None), "not reproduced"),
        (1, 2, (None, 0.5), "not reproduced"),
        (1, 2, (3, 4), "not reproduced"),
        (1, 1, (1.1, None), "not reproduced"),
        (1, 2, (1.5, None), "inconclusive"),
        (1, 2, (None, 1.5), "inconclusive"),
        (1, 2, (1.2, 1.8), "inconclusive"),  # the region lies within the interval
        (1, 2, (2, None), "inconclusive"),  # touches from below
        (1, 2, (None, 1), "inconclusive"),  # touches from above
        (1, np.inf, (0, 5), "inconclusive"),
    ],
)
def test_verdict(low, high, bounds, expected):
    assert verdict(Interval(1.5, low, high), *bounds) == expected
