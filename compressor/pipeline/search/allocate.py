"""Choose a level for each unit from a table of scores, under a budget: what is best if losses add up.

`milp` solves it exactly, as the integer programme  min Σ score·z,  Σ_j z_ij = 1,  Σ cost_r·z ≤ limit_r  for each resource r.
Sources: Frantar and Alistarh, "SPDY", ICML 2022; Bercovich et al., "Puzzle", ICML 2025, section 4.2, with several resources;
Huang et al., "MC-MoE", ICLR 2025.
"""

import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint
from scipy.optimize import milp as solve

from compressor.errors import RecipeError
from compressor.pipeline.search.levels import Choice

Table = Sequence[Mapping[int, float]]  # by unit, by level; what is not there may not be chosen
ROUNDING = 1e-6  # of a limit, that the solver may exceed it by
PATIENCE = 300.0  # seconds
TIMED_OUT = 1  # status of the solver


class BudgetError(RecipeError):
    """No choice fits the budget."""


@dataclass(frozen=True)
class Budget:
    """The budget of a choice, of several resources.

    Args:
        costs: By resource, by unit, by level.
        limits: By resource.
    """

    costs: Mapping[str, Sequence[Sequence[int]]]
    limits: Mapping[str, int]

    @property
    def counts(self) -> list[int]:
        """How many levels each unit has."""
        return [len(levels) for levels in next(iter(self.costs.values()))]

    def used(self, choice: Choice) -> dict[str, int]:
        """Return the cost of a choice."""
        return {name: sum(c[j] for c, j in zip(costs, choice, strict=True)) for name, costs in self.costs.items()}

    def fits(self, choice: Choice) -> bool:
        """Whether that is within all limits."""
        return all(used <= self.limits[name] for name, used in self.used(choice).items())

    def undominated(self, scores: Table) -> list[list[int]]:
        """Levels of each unit that no other one beats or equals in score and in all costs; the first of equal ones stays."""
        kept = []
        for unit, row in enumerate(scores):
            rows = {level: (score, *(costs[unit][level] for costs in self.costs.values())) for level, score in row.items()}
            kept.append([level for level in rows if not any(_beats(rows, other, level) for other in rows if other != level)])
        return kept

    def check(self) -> None:
        """Refuse a limit that whatever is chosen exceeds.

        Raises:
            BudgetError: with the numbers.
        """
        for name, costs in self.costs.items():
            least = sum(min(levels) for levels in costs)
            if least > self.limits[name]:
                raise BudgetError(f"{name}: {self.limits[name]} allowed, the smallest choice takes {least}")


def _beats(rows: Mapping[int, tuple[float, ...]], one: int, other: int) -> bool:
    """Whether a level makes another one useless."""
    if rows[one] == rows[other]:
        return one < other
    return all(a <= b for a, b in zip(rows[one], rows[other], strict=True))


def milp(scores: Table, budget: Budget) -> Choice:
    """The choice with the least sum of scores that fits; what `greedy` finds, or better, if that takes the solver too long.

    Args:
        scores: Finite; the less, the better.
        budget: With integer costs.

    Raises:
        BudgetError: nothing fits.
    """
    budget.check()
    kept = budget.undominated(scores)
    at = [(unit, level) for unit, levels in enumerate(kept) for level in levels]
    value = np.array([scores[unit][level] for unit, level in at])
    one_each = np.array([[float(unit == row) for unit, _ in at] for row in range(len(kept))])
    scale = np.abs(value).max() or 1.0
    margin = 0.0
    while True:
        rules = [LinearConstraint(one_each, 1, 1)]
        for name, costs in budget.costs.items():
            limit = budget.limits[name]
            row = np.array([costs[unit][level] for unit, level in at]) / max(limit, 1)
            rules.append(LinearConstraint(row, ub=1 - margin))
        with _aside():
            found = solve(
                value / scale,
                integrality=np.ones(len(at)),
                bounds=Bounds(0, 1),
                constraints=rules,
                options={"mip_rel_gap": 0, "time_limit": PATIENCE},
            )
        if found.status == TIMED_OUT:
            return _better(found.x, at, scores, budget)
        if found.x is None:
            raise BudgetError(f"no choice of levels is within {dict(budget.limits)}")
        choice = _taken(found.x, at)
        if budget.fits(choice):
            return choice
        margin = 2 * margin or ROUNDING


@contextlib.contextmanager
def _aside() -> Iterator[None]:
    """While it is open, what is written to standard output goes to standard error: HiGHS leaves lines there that it means for
    its developers, among the results of a command."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)  # of C, which keeps them until the end of the process where no terminal listens
        os.dup2(kept, 1)
        os.close(kept)


def _taken(x: "np.ndarray[Any, Any]", at: Sequence[tuple[int, int]]) -> Choice:
    """The level of each unit that a solution takes; `at` is the unit and the level of each of its numbers."""
    return tuple(level for (_, level), z in sorted(zip(at, x, strict=True)) if z > 0.5)


def _better(x: "np.ndarray[Any, Any] | None", at: Sequence[tuple[int, int]], scores: Table, budget: Budget) -> Choice:
    """Return the better one that fits, of a solution that may not be the best and a greedy one."""
    found = [greedy(scores, budget)]
    if x is not None and budget.fits(choice := _taken(x, at)):
        found.append(choice)
    return min(found, key=lambda choice: sum(row[level] for row, level in zip(scores, choice, strict=True)))


def greedy(scores: Table, budget: Budget) -> Choice:
    """From the smallest levels on, the step that lowers scores most for its cost of the scarcest resource, until none fits.

    Raises:
        BudgetError: not even the smallest levels fit.
    """
    budget.check()
    kept = budget.undominated(scores)
    shares = {
        name: [[cost / max(budget.limits[name], 1) for cost in c] for c in costs] for name, costs in budget.costs.items()
    }

    def size(unit: int, level: int) -> float:
        return max(share[unit][level] for share in shares.values())

    choice = [min(levels, key=functools.partial(size, unit)) for unit, levels in enumerate(kept)]
    if not budget.fits(tuple(choice)):
        raise BudgetError(f"the smallest levels together are not within {dict(budget.limits)}")
    while True:
        steps = []
        for unit, levels in enumerate(kept):
            for level in levels:
                gain = scores[unit][choice[unit]] - scores[unit][level]
                more = size(unit, level) - size(unit, choice[unit])
                if gain > 0 and budget.fits((*choice[:unit], level, *choice[unit + 1 :])):
                    steps.append((gain / more if more > 0 else float("inf"), -unit, -level))
        if not steps:
            return tuple(choice)
        _, unit, level = max(steps)
        choice[-unit] = -level


def by_order(order: Sequence[int], ladder: Sequence[Sequence[int | None]], budget: Budget) -> Choice:
    """One rung for all units, the highest that does not fit, lowered to the next unit by unit until it fits.

    Args:
        order: Units, the first one to be lowered in front.
        ladder: Rungs from the smallest up: the level of each unit; None where it lacks that option and keeps the rung below.
        budget: Limit of the cost.

    Raises:
        BudgetError: not even the lowest rung fits.
    """
    budget.check()
    rungs: list[list[int]] = []
    for rung in ladder:
        below = rungs[-1] if rungs else [0] * len(budget.counts)
        rungs.append([level if level is not None else below[unit] for unit, level in enumerate(rung)])
    low = max((n for n, rung in enumerate(rungs) if budget.fits(tuple(rung))), default=None)
    if low is None:
        raise BudgetError(f"the lowest rung is not within {dict(budget.limits)}")
    choice = list(rungs[min(low + 1, len(rungs) - 1)])
    for unit in order:
        if budget.fits(tuple(choice)):
            break
        choice[unit] = rungs[low][unit]
    return tuple(choice)
