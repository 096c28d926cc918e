"""From a target to a plan: measure levels, choose under the budget, improve the choice as a whole, accept it on unseen text.

    levels -> allocators -> successive integer programmes -> evolution -> the best of all on text that none of them saw

Everything that takes long is kept in one directory, and a search that was broken off goes on from there.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

from compressor.errors import RecipeError
from compressor.formats.base import GONE, Option
from compressor.model.memory import available_memory, dense_bytes
from compressor.model.surgery.skip_sublayers import substitutes
from compressor.pipeline.calibration.stream import CalibrationStream
from compressor.pipeline.contract import Plan
from compressor.pipeline.job import Event, Job, Tell
from compressor.pipeline.search.allocate import Budget, BudgetError
from compressor.pipeline.search.clock import JUDGING, TRAINED, TRAINING, WRITING, Clock
from compressor.pipeline.search.evolve import Generation, evolve
from compressor.pipeline.search.fitness import Fitness, opened
from compressor.pipeline.search.importance import ALLOCATORS
from compressor.pipeline.search.joined import Joined
from compressor.pipeline.search.levels import Choice, LevelDB, Levels, Unit
from compressor.pipeline.search.measure import check_measurable, measure, planned_units
from compressor.pipeline.search.successive import Round, successive
from compressor.pipeline.search.text import HELD_OUT
from compressor.pipeline.search.trail import Trail
from compressor.recipe.schema import Search, Target

SHARE = 0.5  # of the available memory that a resident model may take, and dequantised levels beside it
T = TypeVar("T")
PROGRAMMES, EVOLUTION = "successive programmes", "evolution"
BEFORE, AGAIN = "before", ", levels made again"  # the choice that levels are made again around; of the names of contestants
REBUILDING = 4.0  # making levels again, and writing the model after it, takes at most this many times what levels took
TEXT = 0.1  # of the time that is left, at most, goes into what the dense model says of the text
FEW = 4  # samples at least, for each process
NEXT = 2  # levels on each side of it


@dataclass(frozen=True, slots=True)
class Contestant:
    """A choice and how good it is."""

    name: str
    choice: Choice
    bits_per_weight: float
    kl: float  # nats, on text that no choice was made on
    seconds: float  # after which it was there, measuring not included


@dataclass(frozen=True)
class Found:
    """The result of a search."""

    plan: Plan
    best: Contestant
    contestants: Sequence[Contestant]
    steps: Sequence[Mapping[str, Any]]  # rounds and generations: stage, number, fitness, seconds, scored
    training: float  # share of the steps of training that there is time for
    warnings: Sequence[str] = ()  # about patterns, and about what failed once the plan was written

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the report."""
        rows = [{key: value for key, value in asdict(one).items() if key != "choice"} for one in self.contestants]
        steps = [{key: value for key, value in step.items() if key != "choice"} for step in self.steps]
        return {"best": self.best.name, "contestants": rows, "steps": steps, "warnings": list(self.warnings)}


def find(
    job: Job,
    stream: Callable[[], CalibrationStream],
    text_NS: Tensor,
    levels: LevelDB,
    target: Target,
    settings: Search,
    *,
    limit: Callable[[Sequence[Unit]], int],
    clock: Clock,
    judged: int,
    training: int,
    tell: Tell,
) -> Found:
    """The best plan for a target.

    Args:
        job: The model, and passes with options to choose among.
        stream: Opens the calibration stream.
        text_NS: Tokens that whole models are compared on, the same on all ranks.
        levels: Filled if it is not full yet.
        target: For the record.
        settings: How to search.
        limit: Stored bits that the units may take altogether.
        clock: When everything has to be done, the written model included.
        judged: Tokens that the written model will be compared on.
        training: Samples that every block is to be trained on while the model is written.
        tell: Called after each step.

    Raises:
        RecipeError: nothing meets the target, or not within the time.
    """
    check_measurable(job.passes)
    planned = planned_units(job)
    wanted = limit(planned)
    blocks = [job.source.block(index, load=False) for index in range(len(job.source.layers))]
    free = [f"{block.prefix}.{name}." for block in blocks for name in substitutes(block.module)] if settings.drop else []
    check(planned, wanted, target, tuple(free))
    ground = Ground(job, text_NS, target, settings, limit, clock, judged, training, tell)
    with levels.open() if job.ranks.first else nullcontext():
        measure(job, stream, levels, tell, clock, wanted / sum(unit.weights for unit in planned), drop=settings.drop)
        found = ground.search(levels)
    for number in range(settings.rebuilds):
        if clock.left() < REBUILDING * sum(unit.seconds for unit in levels.units):
            break
        near = around(levels.units, found.plan)
        again = LevelDB(
            levels.journal.directory / f"around-{_short((target, replace(settings, minutes=None), number, near))}",
            {**levels.journal.fingerprint, "around": _short(near)},
        )
        with again.open() if job.ranks.first else nullcontext():
            measure(job, stream, again, tell, near=near, drop=settings.drop)
            found = ground.search(again, found)
        levels = again
    return found


def _short(thing: object) -> str:
    return hashlib.sha256(repr(thing).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Ground:
    """The context of a search besides its levels; arguments as of `find`."""

    job: Job
    text_NS: Tensor
    target: Target
    settings: Search
    limit: Callable[[Sequence[Unit]], int]
    clock: Clock
    judged: int
    training: int
    tell: Tell

    def search(self, levels: LevelDB, before: Found | None = None) -> Found:
        """The best plan among levels, with the one found before; what is put down in their directory is not done again."""
        job, settings, ranks = self.job, self.settings, self.job.ranks
        among: Levels = Joined(levels, before.plan if before is not None else {}) if settings.drop else levels
        units, writing = among.units, WRITING * sum(unit.seconds / len(unit.levels) for unit in levels.units)
        budget = Budget(
            {"bits": [[level.bits for level in unit.levels] for unit in units]}, {"bits": self.limit(levels.units)}
        )
        name = _short((self.target, replace(settings, minutes=None), budget.limits, self.text_NS.shape))
        trail = Trail(levels.journal.directory / f"search-{name}.jsonl" if ranks.first else None)
        trail.steps = ranks.agree(trail.steps)
        resident = fits_in_memory(job) if settings.resident is None else settings.resident
        with opened(job.source, resident=resident) as model:
            kept = int(SHARE * available_memory(job.source.device)) if resident else 0
            text_NS = self.text_NS
            if math.isfinite(self.clock.left()):  # what the dense model says of all of it may take longer than there is time
                few = Fitness(job.source, model, among, text_NS[: FEW * ranks.world], ranks)
                able = max(FEW * ranks.world, TEXT * self.clock.left() / few.pace)
                text_NS = text_NS[: int(ranks.agree(trail.once("samples", settings.minutes, able)))]
            fitness = Fitness(job.source, model, among, text_NS, ranks, kept)
            clock = self.clock.keeping(writing + JUDGING * self.judged / fitness.seq_len * fitness.pace)
            full = TRAINING * self.training * fitness.pace
            share = max(0.0, min(1.0, TRAINED * clock.left() / full)) if full else 1.0
            share = ranks.agree(trail.once("training", settings.minutes, share)) if before is None else before.training
            ways = allocations(units, budget) if before is None else {BEFORE: _as_choice(units, before.plan)}
            contestants = improve(
                ways,
                sum(unit.weights for unit in units),
                budget,
                fitness,
                settings,
                trail,
                clock=clock.keeping(share * full),
                tell=self.tell,
            )
        best = min(contestants, key=lambda one: one.kl)
        plan = {name: option for unit, at in zip(units, best.choice, strict=True) for name, option in unit.chosen(at).items()}
        earlier = before or Found({}, best, (), (), share)
        turn = sum(one.name.startswith(BEFORE) for one in earlier.contestants) + 1
        rebuilt = [replace(one, name=f"{one.name}{AGAIN} ({turn})") if before else one for one in contestants]
        best = rebuilt[contestants.index(best)]
        return Found(plan, best, (*earlier.contestants, *rebuilt), (*earlier.steps, *trail.steps), share)


def around(units: Sequence[Unit], plan: Plan) -> dict[str, tuple[Option, ...]]:
    """Options of each unit near that of a plan, that one first; of a unit that goes with its sub-layer, the smallest."""
    gone = tuple(f"{name}." for name, option in plan.items() if option == GONE)
    found: dict[str, tuple[Option, ...]] = {}
    for unit in units:
        options = [level.option for level in unit.levels]
        if gone and unit.name.startswith(gone):
            found[unit.name] = (GONE, *options[:NEXT])
            continue
        at = next(at for at, option in enumerate(options) if option == plan[unit.name])
        found[unit.name] = (options[at], *options[max(0, at - NEXT) : at], *options[at + 1 : at + 1 + NEXT])
    return found


def _as_choice(units: Sequence[Unit], plan: Plan) -> Choice:
    """The levels that a plan names."""
    return tuple(next(at for at in range(len(unit.levels)) if unit.chosen(at).items() <= plan.items()) for unit in units)


def improve(
    ways: Mapping[str, Choice],
    weights: int,
    budget: Budget,
    fitness: Fitness,
    settings: Search,
    trail: Trail,
    *,
    clock: Clock,
    tell: Tell,
) -> list[Contestant]:
    """Every choice on the way to the last one, judged on text that none was made on.

    Args:
        ways: Choices to begin with, by name.
        weights: Number of weights that `bits` of the budget are for.
        budget: Limit that no choice exceeds.
        fitness: Loss of a choice.
        settings: How to search.
        trail: The steps so far; gets the others.
        clock: Says when to end.
        tell: Called after each step.
    """
    held_out = max(1, fitness.samples // (HELD_OUT + 1))
    seen, unseen = range(fitness.samples - held_out), range(fitness.samples - held_out, fitness.samples)
    judge = seen[: max(1, len(seen) // 4)]
    table = seen[-min(len(seen), -(-settings.table_tokens // fitness.seq_len)) :]
    if not trail.begun(ways):
        trail.begin(ways, fitness(list(ways.values()), judge))
    start = min((step for step in trail.steps if step["stage"] in ways), key=lambda step: float(step["fitness"]))
    point: Choice = tuple(start["choice"])
    searching = clock.keeping(fitness.pace * (len(ways) + 2) * held_out)
    for turn in in_time(
        _rounds(point, budget, fitness, settings, table, judge, trail),
        searching,
        fitness.pace * 2 * max(settings.radii) * len(point) * len(table),
    ):
        trail.add(PROGRAMMES, turn.point, fitness=turn.fitness, scored=turn.scored, number=turn.number, moved=turn.moved)
        tell(Event("programme", turn.number, settings.rounds, error=turn.fitness))
    point = tuple(([{"choice": point}, *trail.of(PROGRAMMES)])[-1]["choice"])
    for generation in in_time(
        _generations(point, budget, fitness, settings, seen, trail),
        searching,
        fitness.pace * settings.evolve.tokens / fitness.seq_len,
    ):
        known = {"fitness": generation.fitness, "scored": generation.scored, "number": generation.number}
        trail.add(EVOLUTION, generation.parent, **known, idle=generation.idle)
        tell(Event("evolve", generation.number, settings.evolve.generations, error=generation.fitness))
    last = {name: tuple(trail.of(name)[-1]["choice"]) for name in (*ways, PROGRAMMES, EVOLUTION) if trail.of(name)}
    after = {name: float(trail.of(name)[-1]["seconds"]) for name in last}
    return [
        Contestant(name, choice, budget.used(choice)["bits"] / weights, kl, after[name])
        for (name, choice), kl in zip(last.items(), fitness(list(last.values()), unseen), strict=True)
    ]


def in_time(steps: Iterator[T], clock: Clock, seconds: float) -> Iterator[T]:
    """Steps while there is time for one more: what the last one took, or at first so many seconds."""
    left = clock.left()
    while left > seconds:
        for step in steps:
            yield step
            break
        else:
            return
        before, left = left, clock.left()
        seconds = before - left if math.isfinite(left) else 0.0


def _rounds(
    start: Choice,
    budget: Budget,
    fitness: Fitness,
    settings: Search,
    table: Sequence[int],
    judge: Sequence[int],
    trail: Trail,
) -> Iterator[Round]:
    """Successive programmes from where they were broken off."""
    done = trail.of(PROGRAMMES)
    if done and not done[-1]["moved"]:
        return
    point = tuple(done[-1]["choice"]) if done else start
    ahead = range(len(done) + 1, settings.rounds + 1)
    yield from successive(point, budget, fitness, table=table, judge=judge, radii=settings.radii, rounds=ahead)


def _generations(
    start: Choice, budget: Budget, fitness: Fitness, settings: Search, seen: Sequence[int], trail: Trail
) -> Iterator[Generation]:
    """Evolution from where it was broken off."""
    done = trail.of(EVOLUTION)
    last = None
    if done:
        fields = {key: done[-1][key] for key in ("number", "fitness", "idle", "scored")}
        last = Generation(parent=tuple(done[-1]["choice"]), **fields)
    yield from evolve(
        settings.evolve, start, budget, fitness, samples=len(seen), seq_len=fitness.seq_len, seed=settings.seed, done=last
    )


def allocations(units: Sequence[Unit], budget: Budget) -> dict[str, Choice]:
    """Return the choice of each allocator, except of those that find nothing because they give all units the same option."""
    found = {}
    for name, allocate in ALLOCATORS.items():
        with suppress(BudgetError):
            found[name] = allocate(units, budget)
    return found


def check(units: Sequence[Unit], limit: int, target: Target, free: tuple[str, ...] = ()) -> None:
    """Refuse a target that the smallest levels do not meet; units whose names begin with some of `free` may go.

    Raises:
        RecipeError: with what they come to.
    """
    weights, needed = (
        sum(unit.weights for unit in units),
        [unit for unit in units if not free or not unit.name.startswith(free)],
    )
    least = sum(min(level.bits for level in unit.levels) for unit in needed)
    if least <= limit:
        return
    labels = sorted({min(unit.levels, key=lambda level: level.bits).option.label for unit in needed}) or ["none at all"]
    short = -(-(least - limit) // 8)
    reach = f"bits {math.ceil(1000 * least / weights) / 1000}" if target.bits is not None else f"{short:,} bytes more"
    if target.size is not None:
        reach = f"size {target.bytes + short}"
    raise RecipeError(
        f"target {target.label}: leaves {limit / weights:.3f} bits for each of {weights:,} weights, the smallest options "
        f"({', '.join(labels)}) take {least / weights:.3f}; allow {reach}, or offer smaller options"
    )


def fits_in_memory(job: Job) -> bool:
    """Whether to hold the model in memory."""
    return dense_bytes(job.source) <= SHARE * available_memory(job.source.device)
