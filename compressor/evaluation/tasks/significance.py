"""Whether two models that answered the same questions differ.

Source: McNemar, "Note on the sampling error of the difference between correlated proportions or percentages",
Psychometrika 1947, in its exact form: of the questions that only one model has right, each model has half by chance.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb


@dataclass(frozen=True)
class Paired:
    """The changes from the reference to a model."""

    lost: int  # right before, wrong now
    won: int  # wrong before, right now
    flips: float  # share of questions that are one or the other
    p_value: float  # of a change at least as uneven by chance alone, two-sided


def paired(model: Sequence[bool], reference: Sequence[bool]) -> Paired:
    """Compare two models question by question; what is given says whether each was answered right."""
    lost = sum(before and not now for now, before in zip(model, reference, strict=True))
    won = sum(now and not before for now, before in zip(model, reference, strict=True))
    return Paired(lost, won, (lost + won) / len(model), mcnemar(lost, won))


def mcnemar(lost: int, won: int) -> float:
    """The two-sided p-value of a fair coin that falls `lost` times on one side and `won` times on the other."""
    tosses = lost + won
    tail = sum(comb(tosses, n) for n in range(min(lost, won) + 1))
    return min(1.0, 2 * tail / (1 << tosses))
