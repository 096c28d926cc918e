"""Choose a level for each unit from a table of scores, under a budget. The choice is optimal if losses add up.

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

Table = Sequence[Mapping[int, float]]  # scores by unit, by level; a missing level may not be chosen
ROUNDING = 1e-6  # first margin below a limit that the solver's choice exceeds, as a share of it
PATIENCE = 300.0  # time limit of the solver, in seconds
TIMED_OUT = 1  # status of the solver


class BudgetError(RecipeError):
    """No choice fits the budget."""


@dataclass(frozen=True)
class Budget:
    """The budget of a choice, for one or more resources.

    Args:
        costs: Costs by resource, by unit, by level.
        limits: Limits by resource.
    """

    costs: Mapping[str, Sequence[Sequence[int]]]
    limits: Mapping[str, int]

    @property
    def counts(self) -> list[int]:
        """Number of levels of each unit."""
        return [len(levels) for levels in next(iter(self.costs.values()))]

    def used(self, choice: Choice) -> dict[str, int]:
        """Return the cost of a choice, by resource."""
        return {name: sum(c[j] for c, j in zip(costs, choice, strict=True)) for name, costs in self.costs.items()}

    def fits(self, choice: Choice) -> bool:
        """Return whether a choice is within all limits."""
        return all(used <= self.limits[name] for name, used in self.used(choice).items())

    def undominated(self, scores: Table) -> list[list[int]]:
        """Return the levels of each unit that no other level beats in score and all costs. Of equal levels keep the first."""
        kept = []
        for unit, row in enumerate(scores):
            rows = {level: (score, *(costs[unit][level] for costs in self.costs.values())) for level, score in row.items()}
            kept.append([level for level in rows if not any(_beats(rows, other, level) for other in rows if other != level)])
        return kept

    def check(self) -> None:
        """Refuse a limit that every choice exceeds.

        Raises:
            BudgetError: the smallest choice exceeds a limit; the message gives both numbers.
        """
        for name, costs in self.costs.items():
            least = sum(min(levels) for levels in costs)
            if least > self.limits[name]:
                raise BudgetError(f"{name}: {self.limits[name]} allowed, the smallest choice takes {least}")


def _beats(rows: Mapping[int, tuple[float, ...]], one: int, other: int) -> bool:
    """Return whether a level dominates another one."""
    if rows[one] == rows[other]:
        return one < other
    return all(a <= b for a, b in zip(rows[one], rows[other], strict=True))


def milp(scores: Table, budget: Budget) -> Choice:
    """Return the choice with the least sum of scores that fits.

    If the solver runs out of time, the choice may not be optimal, but it is at least as good as that of `greedy`.

    Args:
        scores: Finite scores; lower is better.
        budget: Budget with integer costs.

    Raises:
        BudgetError: no choice fits.
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
    """Redirect standard output to standard error while the context is open.

    HiGHS prints lines for its developers, which would otherwise mix with the results of a command.
    """
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)  # without a terminal, C buffers its output until the process ends
        os.dup2(kept, 1)
        os.close(kept)


def _taken(x: "np.ndarray[Any, Any]", at: Sequence[tuple[int, int]]) -> Choice:
    """Return the level that a solution takes for each unit. `at` is the unit and the level of each variable."""
    return tuple(level for (_, level), z in sorted(zip(at, x, strict=True)) if z > 0.5)


def _better(x: "np.ndarray[Any, Any] | None", at: Sequence[tuple[int, int]], scores: Table, budget: Budget) -> Choice:
    """Return the better of the greedy choice and the solver's, which may not be optimal. Ignore it if it does not fit."""
    found = [greedy(scores, budget)]
    if x is not None and budget.fits(choice := _taken(x, at)):
        found.append(choice)
    return min(found, key=lambda choice: sum(row[level] for row, level in zip(scores, choice, strict=True)))


def greedy(scores: Table, budget: Budget) -> Choice:
    """Choose greedily: start from the smallest levels, and repeat the step with the largest gain per cost until none fits.

    The cost of a level is its largest share of a limit, over all resources.

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
    """Start with all units one rung above the highest that fits, and lower units by one rung, in order, until all fits.

    Args:
        order: Units in the order of lowering.
        ladder: Rungs from the smallest up, each with the level of every unit. A unit without that option has None, and keeps
            its level of the rung below.
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
