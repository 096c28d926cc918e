"""Fill a level database: one sweep over the blocks, in which every pass is applied with every option it has.

Blocks stay dense: all levels of a unit saw the same inputs. Where time is short, the first block tells what options take, and
the others get only those nearest to what is wanted. Around a choice, units get only options near to it, and what is chosen is
what blocks further on see.
"""

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from compressor.errors import RecipeError
from compressor.formats.base import GONE, Format, Option, QuantizedTensor, Stored, dense, stored_bits
from compressor.model.block import Block, Trial
from compressor.model.source import return_freed_memory
from compressor.model.surgery.skip_sublayers import substitutes, without
from compressor.pipeline.calibration.stats import Hessian
from compressor.pipeline.calibration.stream import BlockStats, CalibrationStream
from compressor.pipeline.contract import Pass
from compressor.pipeline.job import Event, Job, Tell
from compressor.pipeline.plan import able
from compressor.pipeline.search.clock import MEASURING, WRITING, Clock
from compressor.pipeline.search.levels import Level, LevelDB, Unit

OUTSTANDING = 5  # M of OWL
JUDGED = 8192  # tokens that errors of a block's output are taken from


@dataclass(frozen=True, slots=True)
class _Seen:
    """The output of a block, on the tokens that errors are measured on."""

    inputs: Sequence[Tensor]  # [B, S, D] of this rank
    outputs: Sequence[Tensor]


def measure(
    job: Job,
    open_stream: Callable[[], CalibrationStream],
    levels: LevelDB,
    tell: Tell,
    clock: Clock | None = None,
    wanted: float = math.inf,
    *,
    drop: bool = False,
    near: Mapping[str, Sequence[Option]] | None = None,
) -> None:
    """Add every unit of the model that is not there yet.

    Args:
        job: The model and the passes; the plan is not used.
        open_stream: Makes a stream before the first block.
        levels: Written by the first rank, read by all.
        tell: Called after each option of each block, and after each block.
        clock: Says how long everything may take; None lets it take what it takes.
        wanted: Bits of a weight, on average, that the choice among levels may come to.
        drop: Add every attention and MLP too, with what is lost if it goes.
        near: The options of each unit that count, the chosen one first; None: all, and none is chosen.

    Raises:
        RecipeError: a pass cannot be measured option by option, or there is no time for two options.
    """
    check_measurable(job.passes)
    total = len(job.source.layers)
    known = job.ranks.agree(frozenset(levels.journal.finished))
    missing = [index for index in range(total) if not units_of(job, job.source.block(index, load=False), drop) <= known]
    stream = open_stream() if missing else None
    kept: Collection[str] | None = None  # None: all
    for index in range(max(missing, default=-1) + 1):
        assert stream is not None
        started = time.monotonic()
        block = job.source.block(index)
        seconds: dict[str, float] = {}
        if index in missing:
            for unit, edits in _measured(job, stream, block, tell, kept, seconds, drop=drop, near=near):
                if job.ranks.first and unit.name not in known:
                    levels.add(unit, edits)
        if index < max(missing):
            with _chosen(job, block, levels, near or {}):
                stream.advance(block)
        job.source.release(block)
        return_freed_memory()
        tell(Event("measure", index + 1, total))
        if clock is not None and index == missing[0]:
            fixed = time.monotonic() - started - sum(seconds.values())
            kept = job.ranks.agree(affordable(planned_units(job), seconds, fixed, len(missing) - 1, clock.left(), wanted))
    job.ranks.barrier()
    if not job.ranks.first:
        levels.reread()


@contextmanager
def _chosen(job: Job, block: Block, levels: LevelDB, near: Mapping[str, Sequence[Option]]) -> Iterator[None]:
    """While it is open, a block as the choice has it."""
    chosen = {name: options[0] for name, options in near.items() if name.startswith(f"{block.prefix}.")}
    units = {unit.name: unit for unit in levels.units} if job.ranks.first else {}
    found: dict[str, Stored] = {}
    for name, option in chosen.items() if job.ranks.first else ():
        at = next((j for j, level in enumerate(units[name].levels) if level.option == option), None)
        found |= {} if at is None else levels.edits(name, at)
    block.install(job.ranks.agree(found))
    gone = {name.removeprefix(f"{block.prefix}.").partition(".")[0] for name, option in chosen.items() if option == GONE}
    with without(block.module, gone):
        yield


def check_measurable(passes: Sequence[Pass]) -> None:
    """Refuse passes that cannot be applied to one unit with one option by itself.

    Raises:
        RecipeError: there is one.
    """
    for number, step in enumerate(passes):
        if step.offers and (step.chooses or step.two_streams or step.together):
            raise RecipeError(
                f"passes.{number}: what it makes of a layer cannot be measured by itself (it chooses among options, compares "
                "with the dense model, or has layers share codebooks); search with another pass"
            )


def planned_units(job: Job) -> list[Unit]:
    """The units and the sizes of their levels as shapes tell them; nothing is measured."""
    found: dict[str, tuple[Block, tuple[str, ...], list[Level]]] = {}
    for block in (job.source.block(index, load=False) for index in range(len(job.source.layers))):
        for step in (step for step in job.passes if step.offers):
            for unit, names in step.units(block).items():
                options = able(step, block, names)
                _, _, levels = found.setdefault(f"{block.prefix}.{unit}", (block, names, []))
                sizes = [sum(option.stored_bits(block.shape(name)) for name in names) for option in options]
                levels += [Level(option, bits, 0.0, 0.0) for option, bits in zip(options, sizes, strict=True)]
    return [
        Unit(
            name=full,
            block=block.index,
            layers=names,
            weights=sum(math.prod(block.shape(name)) for name in names),
            shift=0.0,
            outliers=0.0,
            trace=0.0,
            levels=tuple(sorted(levels, key=lambda level: level.bits)),
        )
        for full, (block, names, levels) in found.items()
        if levels
    ]


def affordable(
    units: Sequence[Unit], seconds: Mapping[str, float], fixed: float, blocks: int, left: float, wanted: float
) -> Collection[str]:
    """Labels of the options that there is time to measure: those nearest to what is wanted, one of them not above it.

    Args:
        units: As planned.
        seconds: Time that each option took for a block, in seconds.
        fixed: Seconds that a block takes besides.
        blocks: Number of blocks to come.
        left: Seconds for measuring, choosing and writing.
        wanted: Bits of a weight.

    Raises:
        RecipeError: there is no time for two.
    """
    sizes: dict[str, list[float]] = {}
    for unit in units:
        for level in unit.levels:
            sizes.setdefault(level.option.label, []).append(level.bits / unit.weights)
    mean = {label: sum(sizes[label]) / len(sizes[label]) for label in seconds}
    below = max(
        (label for label in mean if mean[label] <= wanted), key=mean.__getitem__, default=min(mean, key=mean.__getitem__)
    )
    order = sorted(mean, key=lambda label: (label != below, abs(mean[label] - wanted), label))
    allowed = MEASURING * (left - WRITING * blocks * (fixed + max(seconds.values())))
    kept = [
        label for n, label in enumerate(order) if blocks * (fixed + sum(map(seconds.__getitem__, order[: n + 1]))) <= allowed
    ]
    if blocks and len(kept) < 2:
        least = blocks * (fixed + sum(map(seconds.__getitem__, order[:2])))
        missing = (least - allowed) / MEASURING
        raise RecipeError(
            f"search.minutes: two options of every layer take {least:.0f} s to measure, and the model has to be written; "
            f"allow {missing / 60:.1f} minutes more, or less calibration text"
        )
    return frozenset(kept if blocks else order)


def units_of(job: Job, block: Block, drop: bool = False) -> set[str]:
    """The full names of a block's units, and of its sub-layers if they may go."""
    units = [*(unit for step in job.passes for unit in step.units(block)), *(substitutes(block.module) if drop else ())]
    return {f"{block.prefix}.{unit}" for unit in units}


def _measured(
    job: Job,
    stream: CalibrationStream,
    block: Block,
    tell: Tell,
    kept: Collection[str] | None,
    seconds: dict[str, float],
    *,
    drop: bool,
    near: Mapping[str, Sequence[Option]] | None,
) -> Iterator[tuple[Unit, list[dict[str, QuantizedTensor]]]]:
    """Every unit of a block, with the weights of its levels; `seconds` gets what each option took."""
    began = time.monotonic()
    seen = _seen(stream, block)
    shift = _shift(seen, job)
    found: dict[str, list[tuple[Level, dict[str, QuantizedTensor]]]] = {}
    layers_of: dict[str, tuple[str, ...]] = {}
    traces: dict[str, float] = {}
    salience: dict[str, float] = {}
    for step in (step for step in job.passes if step.offers):
        units = step.units(block)
        layers = [name for names in units.values() for name in names]
        stats = stream.collect(block, layers, step.needs)
        offered = {unit: _able(step, block, names, kept) for unit, names in units.items()}
        if near is not None:
            offered = {unit: [o for o in some if o in near[f"{block.prefix}.{unit}"]] for unit, some in offered.items()}
        for unit, names in units.items():
            layers_of[unit] = names
            squares = stats[names[0], Hessian].value.diagonal() if Hessian in step.needs else None
            traces[unit] = 0.0 if squares is None else float(squares.mean())
            weights = [block.weight(name).float() for name in names]
            salience[unit] = 0.0 if squares is None else _outstanding(weights, squares)
        for option in (option for option in step.offers if any(option in some for some in offered.values())):
            started = time.monotonic()
            edits = _applied(
                job, step, block, stats, option, {u: units[u] for u, options in offered.items() if option in options}
            )
            for unit, names in units.items():
                own = {name: edits[name] for name in names if name in edits}
                if len(own) == len(names):
                    found.setdefault(unit, []).append((_level(job, block, seen, option, own), own))
            seconds[option.label] = seconds.get(option.label, 0.0) + time.monotonic() - started
            tell(Event("measure", block.index, len(job.source.layers), f"{block.prefix}: {option.label}"))
    for part in substitutes(block.module) if drop else ():
        yield _dropped(job, block, seen, shift, part), [{}]
    spent = (time.monotonic() - began) / max(len(found), 1)
    for unit, levels in found.items():
        levels.sort(key=lambda pair: (pair[0].bits, pair[0].error))
        weights = [block.weight(name).float() for name in layers_of[unit]]
        yield (
            Unit(
                name=f"{block.prefix}.{unit}",
                block=block.index,
                layers=layers_of[unit],
                weights=sum(w.numel() for w in weights),
                shift=shift,
                outliers=_outliers(weights),
                trace=traces[unit],
                salience=salience[unit],
                seconds=spent,
                levels=tuple(level for level, _ in levels),
            ),
            [edits for _, edits in levels],
        )


def _able(step: Pass, block: Block, names: Sequence[str], kept: Collection[str] | None) -> list[Format]:
    """The options that a unit can be held in: of those to be measured, or of all if it can be held in none of them."""
    options = list(able(step, block, names))
    return [option for option in options if kept is None or option.label in kept] or options


def _applied(
    job: Job, step: Pass, block: Block, stats: BlockStats, option: Format, units: Mapping[str, Sequence[str]]
) -> Mapping[str, QuantizedTensor]:
    """A pass with one option for some units, over all ranks."""
    costs = {unit: sum(block.weight(name).numel() for name in names) for unit, names in units.items()}
    outcome = job.ranks.gather(step.apply(block, stats, dict.fromkeys(job.ranks.share(costs), option)))
    return {name: new for name, new in outcome.edits.items() if isinstance(new, QuantizedTensor)}


def _seen(stream: CalibrationStream, block: Block) -> _Seen:
    """The first batches that enter a block, and what leaves it."""
    inputs: list[Tensor] = []
    most = -(-JUDGED // stream.ranks.world)
    for hidden in stream.hidden:
        inputs.append(hidden.to(stream.device))
        if sum(x.shape[0] * x.shape[1] for x in inputs) >= most:
            break
    with torch.no_grad():
        return _Seen(inputs, [block.forward(x) for x in inputs])


@torch.no_grad()
def _shift(seen: _Seen, job: Job) -> float:
    """1 - the mean cosine of what enters and what leaves."""
    total = torch.zeros(2, dtype=torch.float64, device=job.ranks.device)
    for x, y in zip(seen.inputs, seen.outputs, strict=True):
        cosine = cosine_similarity(x.float(), y.float(), dim=-1)
        total += torch.stack([cosine.double().sum(), torch.tensor(cosine.numel(), device=total.device)])
    job.ranks.sum_([total])
    return 1 - float(total[0] / total[1])


def _dropped(job: Job, block: Block, seen: _Seen, shift: float, part: str) -> Unit:
    """An attention or MLP, with what is lost if it goes."""
    layers = [name for name in block.layers if name.startswith(f"{part}.")]
    distance = sum(float(block.weight(name).float().square().sum()) for name in layers)
    level = Level(GONE, 0, _missed(job, seen, block.trying(Trial({}, {}, skips=(part,)))), distance)
    weights = sum(block.weight(name).numel() for name in layers)
    return Unit(f"{block.prefix}.{part}", block.index, (), weights, shift, 0.0, 0.0, (level,))


@torch.no_grad()
def _level(job: Job, block: Block, seen: _Seen, option: Format, edits: Mapping[str, QuantizedTensor]) -> Level:
    """Return the level of an option on a unit, measured by the block's output."""
    missed = _missed(job, seen, block.trying(Trial.of(edits, job.source.device, job.source.dtype)))
    distance = sum(float((dense(new) - block.weight(name).float()).square().sum()) for name, new in edits.items())
    return Level(option, sum(map(stored_bits, edits.values())), missed, distance)


@torch.no_grad()
def _missed(job: Job, seen: _Seen, trial: Callable[[Tensor], Tensor]) -> float:
    """The squared error of a block's output, relative to that output."""
    total = torch.zeros(2, dtype=torch.float64, device=job.ranks.device)
    for x, y in zip(seen.inputs, seen.outputs, strict=True):
        missed = trial(x).float() - y.float()
        total += torch.stack([part.square().sum().double() for part in (missed, y.float())])
    job.ranks.sum_([total])
    return float(total[0] / total[1])


def _outstanding(weights: Sequence[Tensor], squares_I: Tensor) -> float:
    """Share of weights whose size times the norm of what they meet is more than `OUTSTANDING` times the mean."""
    scores = [w.abs() * squares_I.sqrt() for w in weights]
    count = sum(score.numel() for score in scores)
    mean = sum(float(score.double().sum()) for score in scores) / count
    return sum(int((score > OUTSTANDING * mean).sum()) for score in scores) / count


def _outliers(weights: Sequence[Tensor]) -> float:
    """Share of weights more than a standard deviation above their mean."""
    count = sum(w.numel() for w in weights)
    mean = sum(float(w.double().sum()) for w in weights) / count
    spread = (sum(float((w - mean).square().double().sum()) for w in weights) / count) ** 0.5
    return sum(int((w > mean + spread).sum()) for w in weights) / count
