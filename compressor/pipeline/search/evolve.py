"""EvoPress: evolutionary search over levels, with the divergence of whole models as fitness.

Each generation makes offspring of one parent by switching levels, and lets the best few through stages of ever more tokens;
every stage draws its samples anew, the same for all. The parent takes part in the last stage and is scored on its samples.

Source: Sieberling et al., "EvoPress: Accurate Dynamic Model Compression via Evolutionary Search", ICML 2025, algorithm 1.
What differs: units of any size may trade, and what no longer fits is repaired, where the original switches levels only among
units of equal size; a switch may be of several levels; a child also takes whatever still fits; fitness is a lower bound of
the KL divergence (fitness.py).
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from compressor.pipeline.search.allocate import Budget
from compressor.pipeline.search.levels import Choice
from compressor.recipe.schema import Evolve

Score = Callable[[Sequence[Choice], Sequence[int]], list[float]]  # of choices on samples: less is better
LONGER = 0.25  # share of the switches by a level that go on for another
ATTEMPTS = 20  # to make each offspring that there is not yet


@dataclass(frozen=True, slots=True)
class Generation:
    """How far evolution has come."""

    number: int  # from 1
    parent: Choice  # the best
    fitness: float  # on the samples of this generation's last stage
    idle: int  # generations since the parent last changed
    scored: int  # choices times stages


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
    """Generations, until there is nothing more to be gained.

    Args:
        settings: How.
        start: The first parent; it fits.
        budget: Limit that no offspring exceeds.
        score: Fitness.
        samples: How many there are to draw from.
        seq_len: Tokens of each.
        seed: Seed of all random draws.
        done: The last generation of a search that was broken off.
    """
    parent, idle = (start, 0) if done is None else (done.parent, done.idle)
    for number in range(1 if done is None else done.number + 1, settings.generations + 1):
        if idle >= settings.patience:
            return
        rng = random.Random(f"{seed}-{number}")  # of each generation by itself: nothing else has to be kept
        pool = _offspring(settings, parent, budget, rng)
        if not pool:
            return
        fitness, scored = [0.0], 0
        for stage, (survivors, tokens) in enumerate(settings.stages):
            if stage == len(settings.stages) - 1:
                pool = [parent, *(child for child in pool if child != parent)]
            drawn = rng.sample(range(samples), min(samples, -(-tokens // seq_len)))
            fitness, scored = score(pool, drawn), scored + len(pool)
            best = sorted(range(len(pool)), key=fitness.__getitem__)[:survivors]  # stable: of equals the parent stays
            pool, fitness = [pool[i] for i in best], [fitness[i] for i in best]
        idle = idle + 1 if pool[0] == parent else 0
        parent = pool[0]
        yield Generation(number, parent, fitness[0], idle, scored)


def _offspring(settings: Evolve, parent: Choice, budget: Budget, rng: random.Random) -> list[Choice]:
    """Different children of a parent; fewer than asked for where there are no more."""
    found: dict[Choice, None] = {}
    for _ in range(ATTEMPTS * settings.offspring):
        child = mutated(parent, budget, settings.switches, rng)
        if child != parent:
            found.setdefault(child)
        if len(found) == settings.offspring:
            break
    return list(found)


def mutated(parent: Choice, budget: Budget, switches: int, rng: random.Random) -> Choice:
    """A few units up, others down until it fits and sometimes further, and up again whatever still fits."""
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
    """From 1 on, small numbers more often."""
    return min(rng.randint(1, most), rng.randint(1, most))


def _step(rng: random.Random) -> int:
    """Levels of a switch: one, or now and then more, for where one alone gains nothing."""
    step = 1
    while rng.random() < LONGER:
        step += 1
    return step
