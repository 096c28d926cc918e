"""The search from a target to a plan: measure levels, choose under the budget, improve the choice, accept it on unseen text.

    levels -> allocators -> successive integer programmes -> evolution -> the best of all on text that none of them saw

All results that take long are kept in one directory, so that an interrupted search can resume.
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

SHARE = 0.5  # share of available memory for a resident model; the same share of the rest for dequantized levels
T = TypeVar("T")
PROGRAMMES, EVOLUTION = "successive programmes", "evolution"
BEFORE, AGAIN = "before", ", levels made again"  # name of the choice that levels are rebuilt around; suffix of names then
REBUILDING = 4.0  # largest time to rebuild levels and then write the model, relative to measuring the levels before
TEXT = 0.1  # largest share of the time left for the dense model's predictions
FEW = 4  # minimum number of samples per process
NEXT = 2  # number of levels to rebuild on each side of the chosen one


@dataclass(frozen=True, slots=True)
class Contestant:
    """A candidate: a choice and its score."""

    name: str
    choice: Choice
    bits_per_weight: float
    kl: float  # KL divergence in nats, on held-out text
    seconds: float  # time until it was found, without measuring levels


@dataclass(frozen=True)
class Found:
    """The result of a search."""

    plan: Plan
    best: Contestant
    contestants: Sequence[Contestant]
    steps: Sequence[Mapping[str, Any]]  # rounds and generations: stage, number, fitness, seconds, scored
    training: float  # share of the training steps that there is time for
    warnings: Sequence[str] = ()  # warnings about patterns, and about failures after the plan was written

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for the report."""
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
    """Find the best plan for a target.

    Args:
        job: The model, and passes with options to choose among.
        stream: Function that opens the calibration stream.
        text_NS: Tokens for scoring candidate models, the same on all ranks.
        levels: Level database; missing levels are measured and added.
        target: The target, for messages and as part of the search's identity.
        settings: Settings of the search.
        limit: Function that returns the limit of stored bits for all units together.
        clock: Time limit for the complete run, including writing the model.
        judged: Number of tokens that the written model will be evaluated on.
        training: Number of samples that every block is trained on while the model is written.
        tell: Called after each step.

    Raises:
        RecipeError: nothing meets the target, or there is too little time.
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
    """The context of a search, except its levels. For the fields see `find`."""

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
        """Find the best plan among some levels. Steps that are logged in their directory are not repeated.

        Args:
            levels: Measured levels.
            before: Earlier result that the search starts from; None for a first search.
        """
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
            if math.isfinite(self.clock.left()):  # all of the text may take too long
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
    """Return the options of each unit near the plan's option, which comes first.

    For a unit in a dropped sub-layer, return `GONE` and the smallest options.
    """
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
    """Return the levels that a plan names."""
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
    """Improve the best of some choices. Return the starting choices and the result of each stage, scored on held-out text.

    Args:
        ways: Starting choices, by name.
        weights: Number of weights that share the budget's `bits`.
        budget: Limit that no choice exceeds.
        fitness: Loss function of choices.
        settings: Settings of the search.
        trail: Log of the steps so far, to which new steps are added.
        clock: Time limit of the search.
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
    """Yield steps while there is time for another one. The estimate is the last step's time, at first `seconds`."""
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
    """Yield the rounds of successive programmes that are not logged yet."""
    done = trail.of(PROGRAMMES)
    if done and not done[-1]["moved"]:
        return
    point = tuple(done[-1]["choice"]) if done else start
    ahead = range(len(done) + 1, settings.rounds + 1)
    yield from successive(point, budget, fitness, table=table, judge=judge, radii=settings.radii, rounds=ahead)


def _generations(
    start: Choice, budget: Budget, fitness: Fitness, settings: Search, seen: Sequence[int], trail: Trail
) -> Iterator[Generation]:
    """Yield the generations of evolution that are not logged yet."""
    done = trail.of(EVOLUTION)
    last = None
    if done:
        fields = {key: done[-1][key] for key in ("number", "fitness", "idle", "scored")}
        last = Generation(parent=tuple(done[-1]["choice"]), **fields)
    yield from evolve(
        settings.evolve, start, budget, fitness, samples=len(seen), seq_len=fitness.seq_len, seed=settings.seed, done=last
    )


def allocations(units: Sequence[Unit], budget: Budget) -> dict[str, Choice]:
    """Return the choice of each allocator, by name, without allocators that find none within the budget."""
    found = {}
    for name, allocate in ALLOCATORS.items():
        with suppress(BudgetError):
            found[name] = allocate(units, budget)
    return found


def check(units: Sequence[Unit], limit: int, target: Target, free: tuple[str, ...] = ()) -> None:
    """Refuse a target that the smallest levels do not meet. Units whose names begin with an item of `free` may be dropped.

    Raises:
        RecipeError: the target is too small; the message gives the smallest possible size.
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
    """Return whether the dense model takes at most `SHARE` of the available memory."""
    return dense_bytes(job.source) <= SHARE * available_memory(job.source.device)
