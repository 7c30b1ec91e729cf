"""Scores that need a reference value of the environment."""

import re
from collections.abc import Sequence

import numpy as np

FAS_LENGTHS = (1, *range(2, 31, 2))
EVALUATED_LENGTHS = (*FAS_LENGTHS, None)  # None: drawn anew at each decision
# {environment without version: (R_max, c)}, from notebooks/table2.ipynb of the authors' code of
# arXiv 2410.08979: the best return, and what makes returns positive
FAS_REFERENCE = {
    "Ant": (6500.0, 0.0),
    "HalfCheetah": (17000.0, 0.0),
    "Hopper": (3600.0, 0.0),
    "Humanoid": (10500.0, 0.0),
    "InvertedDoublePendulum": (9400.0, 0.0),
    "InvertedPendulum": (1000.0, 0.0),
    "LunarLanderContinuous": (300.0, 0.0),
    "Pendulum": (1350.0, 1550.0),
    "Reacher": (60.0, 65.0),
    "Swimmer": (350.0, 0.0),
    "Walker2d": (5000.0, 0.0),
}


def frequency_averaged_score(returns: Sequence[float], env_id: str) -> float | None:
    """FAS: the mean return over the steps that one decision lasts, as a share of the best return.

    returns: at each of FAS_LENGTHS. None for an environment without reference values.
    """
    best, offset = FAS_REFERENCE.get(re.sub(r"-v\d+$", "", env_id), (None, 0.0))
    if best is None:
        return None
    area = np.trapezoid(np.asarray(returns) + offset, FAS_LENGTHS)
    # PITFALL: lengths 1 to 30 are an interval of 29, and the authors divide by 30: at best 0.967
    return float(area / (FAS_LENGTHS[-1] * best))


def length_metrics(
    returns: Sequence[float], own_return: float, best: dict[str, float], env_id: str
) -> dict[str, float]:
    """What to log of an evaluation at EVALUATED_LENGTHS; returns: the mean at each of them.

    own_return: at the length of training, in other episodes. best: own return and FAS where the
    former was highest so far, brought up to date here.
    """
    names = [f"eval/return@{length or 'random'}" for length in EVALUATED_LENGTHS]
    metrics = dict(zip(names, returns, strict=True))
    fas = frequency_averaged_score(returns[:-1], env_id)
    if fas is not None:
        if own_return > best["return"]:
            best.update({"return": float(own_return), "fas": fas})
        metrics |= {"eval/fas": fas, "eval/fas_of_best": best["fas"]}
    return metrics
