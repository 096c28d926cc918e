"""Schedules of passes that prune in steps: the fraction of the final sparsity that is reached after a fraction of the steps.

Source: Zhu and Gupta, "To Prune, or Not to Prune: Exploring the Efficacy of Pruning for Model Compression", 2017, equation 1:
sparsity rises from s_i to s_f as s_f + (s_i - s_f) (1 - t)³, fast while much is redundant, slowly towards the end.
"""

from collections.abc import Callable, Mapping
from typing import Literal

Kind = Literal["linear", "cubic"]


def linear(progress: float) -> float:
    """Drop the same number in every step."""
    return min(max(progress, 0.0), 1.0)


def cubic(progress: float) -> float:
    """Drop most units early: more than half (0.578) in the first quarter of the steps."""
    return 1 - (1 - linear(progress)) ** 3


SCHEDULES: Mapping[Kind, Callable[[float], float]] = {"linear": linear, "cubic": cubic}


def left(count: int, keep: int, share: float) -> int:
    """Return how many units remain once the fraction `share` of those to drop has been dropped."""
    return count - round((count - keep) * share)
