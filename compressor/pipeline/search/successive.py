"""Successive integer programmes: losses add up only near a point, so take them there, solve, go there, and take them again.

Around the choice at hand, every unit is put a few levels up and down, one at a time, and the whole model's divergence taken.
The integer programme on that table, within a radius of levels, proposes choices; the best of them is the next point, if it is
better on other samples. It ends where none is.

Source: the trust-region method on the integer programme of allocate.py; Griffith and Stewart, "A Nonlinear Programming
Technique for the Optimization of Continuous Processing Systems", Management Science, 1961.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from compressor.pipeline.search.allocate import Budget, Table, milp
from compressor.pipeline.search.evolve import Score
from compressor.pipeline.search.levels import Choice


@dataclass(frozen=True, slots=True)
class Round:
    """One table and what came of it."""

    number: int  # from 1
    point: Choice
    fitness: float  # on the samples that proposals are judged on
    moved: bool
    scored: int  # choices


def successive(
    start: Choice,
    budget: Budget,
    score: Score,
    *,
    table: Sequence[int],
    judge: Sequence[int],
    radii: Sequence[int] = (1, 2),
    rounds: Sequence[int] = range(1, 5),
) -> Iterator[Round]:
    """Rounds, until one finds nothing better.

    Args:
        start: The first point; it fits.
        budget: Limit that no point exceeds.
        score: Fitness.
        table: Samples that losses are taken on.
        judge: Samples that proposals are judged on.
        radii: Levels that a proposal may lie from the point in each unit; the largest one says how far losses are taken.
        rounds: Their numbers; it may end before.
    """
    point = start
    (fitness,) = score([point], judge)
    for number in rounds:
        losses = losses_around(point, budget, lambda choices: score(choices, table), max(radii))
        proposals = dict.fromkeys(milp(_within(losses, point, radius), budget) for radius in radii)
        proposals.pop(point, None)
        found = score(list(proposals), judge) if proposals else []
        best = min(zip(found, proposals, strict=True), default=(fitness, point))
        moved = best[0] < fitness
        if moved:
            fitness, point = best
        scored = sum(len(row) for row in losses) + len(found)
        yield Round(number, point, fitness, moved, scored)
        if not moved:
            return


def losses_around(
    point: Choice, budget: Budget, score: Callable[[Sequence[Choice]], list[float]], radius: int
) -> list[dict[int, float]]:
    """By unit, by level: the fitness with that one level changed."""
    near = [range(max(0, at - radius), min(count, at + radius + 1)) for at, count in zip(point, budget.counts, strict=True)]
    asked = [{level: (*point[:unit], level, *point[unit + 1 :]) for level in levels} for unit, levels in enumerate(near)]
    distinct = list(dict.fromkeys(choice for row in asked for choice in row.values()))
    known = dict(zip(distinct, score(distinct), strict=True))
    return [{level: known[choice] for level, choice in row.items()} for row in asked]


def _within(losses: Table, point: Choice, radius: int) -> Table:
    """Return the entries of a table that are within a radius of a point."""
    return [{j: loss for j, loss in row.items() if abs(j - at) <= radius} for row, at in zip(losses, point, strict=True)]
