"""Successive integer programmes. Losses add up only near a point, so each round measures them there, solves, and moves.

Around the current choice, each unit is moved a few levels up and down, one unit at a time, and the complete model's
divergence is measured. The integer programme on this table proposes choices within a radius of levels. The best proposal
becomes the next point if it is better on other samples. The search ends when none is.

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
    """The result of one round."""

    number: int  # counted from 1
    point: Choice  # best choice so far
    fitness: float  # fitness of `point` on the samples for judging proposals
    moved: bool  # whether the round found a better point
    scored: int  # number of choices scored


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
    """Yield rounds until one finds nothing better.

    Args:
        start: The first point, which fits the budget.
        budget: Limit that no point exceeds.
        score: Fitness function.
        table: Samples for measuring losses.
        judge: Samples for judging proposals.
        radii: Maximum distances of a proposal from the point, in levels per unit. Losses are measured up to the largest.
        rounds: Numbers of the rounds; the search may end earlier.
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
    """Return the fitness by unit and by level, with only that unit's level changed. Each distinct choice is scored once."""
    near = [range(max(0, at - radius), min(count, at + radius + 1)) for at, count in zip(point, budget.counts, strict=True)]
    asked = [{level: (*point[:unit], level, *point[unit + 1 :]) for level in levels} for unit, levels in enumerate(near)]
    distinct = list(dict.fromkeys(choice for row in asked for choice in row.values()))
    known = dict(zip(distinct, score(distinct), strict=True))
    return [{level: known[choice] for level, choice in row.items()} for row in asked]


def _within(losses: Table, point: Choice, radius: int) -> Table:
    """Return the entries of a table that are within a radius of a point."""
    return [{j: loss for j, loss in row.items() if abs(j - at) <= radius} for row, at in zip(losses, point, strict=True)]
