"""EvoPress: evolutionary search over levels. The fitness is the divergence of the complete model.

Each generation makes offspring of one parent by switching levels. The best offspring pass through stages with more and more
tokens. Every stage draws new samples, the same for all offspring. The parent takes part in the last stage and is scored on
its samples.

Source: Sieberling et al., "EvoPress: Accurate Dynamic Model Compression via Evolutionary Search", ICML 2025, algorithm 1.
Differences: the original switches levels only among units of equal size. Here units of any size may trade, and a child that
no longer fits is repaired. A switch may cover several levels. A child also spends leftover budget. Fitness is a lower bound
of the KL divergence (fitness.py).
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from compressor.pipeline.search.allocate import Budget
from compressor.pipeline.search.levels import Choice
from compressor.recipe.schema import Evolve

Score = Callable[[Sequence[Choice], Sequence[int]], list[float]]  # scores choices on samples; lower is better
LONGER = 0.25  # probability that a switch continues by another level
ATTEMPTS = 20  # number of attempts per requested offspring to make one that differs from the others


@dataclass(frozen=True, slots=True)
class Generation:
    """The state of evolution after a generation."""

    number: int  # counted from 1
    parent: Choice  # best choice, the next parent
    fitness: float  # fitness of `parent` on the samples of this generation's last stage
    idle: int  # number of generations since the parent last changed
    scored: int  # number of scores computed, over all stages


def evolve(
    settings: Evolve,
    start: Choice,
    budget: Budget,
    score: Score,
    *,
    samples: int,
    seq_len: int,
    seed: int = 0,
    done: Generation | None = None,
) -> Iterator[Generation]:
    """Yield generations until the settings' limit, or until there is no more improvement.

    Args:
        settings: Settings of the search.
        start: The first parent, which fits the budget.
        budget: Limit that no offspring exceeds.
        score: Fitness function.
        samples: Number of samples to draw from.
        seq_len: Tokens per sample.
        seed: Seed of all random draws.
        done: The last generation of an interrupted search.
    """
    parent, idle = (start, 0) if done is None else (done.parent, done.idle)
    for number in range(1 if done is None else done.number + 1, settings.generations + 1):
        if idle >= settings.patience:
            return
        rng = random.Random(f"{seed}-{number}")  # one per generation, so that resuming needs no random state
        pool = _offspring(settings, parent, budget, rng)
        if not pool:
            return
        fitness, scored = [0.0], 0
        for stage, (survivors, tokens) in enumerate(settings.stages):
            if stage == len(settings.stages) - 1:
                pool = [parent, *(child for child in pool if child != parent)]
            drawn = rng.sample(range(samples), min(samples, -(-tokens // seq_len)))
            fitness, scored = score(pool, drawn), scored + len(pool)
            best = sorted(range(len(pool)), key=fitness.__getitem__)[:survivors]  # stable: the parent wins ties
            pool, fitness = [pool[i] for i in best], [fitness[i] for i in best]
        idle = idle + 1 if pool[0] == parent else 0
        parent = pool[0]
        yield Generation(number, parent, fitness[0], idle, scored)


def _offspring(settings: Evolve, parent: Choice, budget: Budget, rng: random.Random) -> list[Choice]:
    """Return distinct children of a parent, fewer than requested if no more are found."""
    found: dict[Choice, None] = {}
    for _ in range(ATTEMPTS * settings.offspring):
        child = mutated(parent, budget, settings.switches, rng)
        if child != parent:
            found.setdefault(child)
        if len(found) == settings.offspring:
            break
    return list(found)


def mutated(parent: Choice, budget: Budget, switches: int, rng: random.Random) -> Choice:
    """Return a child of a choice.

    A few units are raised. Others are lowered until the child fits, and sometimes further. Then leftover budget is spent by
    raising units that were not lowered. The parent is returned if no child fits.
    """
    counts, child = budget.counts, list(parent)
    able = [unit for unit, count in enumerate(counts) if child[unit] + 1 < count]
    raised = rng.sample(able, min(len(able), _few(switches, rng)))
    for unit in raised:
        child[unit] = min(child[unit] + _step(rng), counts[unit] - 1)
    lowered: set[int] = set()
    more = _few(switches, rng) - 1
    while more or not budget.fits(tuple(child)):
        able = [unit for unit, level in enumerate(child) if level and unit not in raised]
        if not able:
            break
        lowered.add(unit := rng.choice(able))
        child[unit] = max(child[unit] - _step(rng), 0)
        more = max(more - 1, 0)
    if not budget.fits(tuple(child)):
        return parent
    for unit in rng.sample(range(len(child)), len(child)):
        fuller = (*child[:unit], child[unit] + 1, *child[unit + 1 :])
        if unit not in lowered and fuller[unit] < counts[unit] and budget.fits(fuller):
            child[unit] += 1
    return tuple(child)


def _few(most: int, rng: random.Random) -> int:
    """Draw a number from 1 to `most`; small numbers are more likely."""
    return min(rng.randint(1, most), rng.randint(1, most))


def _step(rng: random.Random) -> int:
    """Draw the number of levels of a switch: usually one, sometimes more, because one level alone may gain nothing."""
    step = 1
    while rng.random() < LONGER:
        step += 1
    return step
