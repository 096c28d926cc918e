"""Fill a level database: one sweep over the blocks, in which every pass is applied with every option it has.

Blocks are kept dense, so all levels of a unit are made from the same inputs. If time is short, options are timed on the first
block, and the other blocks get only the options nearest to the wanted bits. When levels are rebuilt around a choice, units
get only options near it, and later blocks receive the outputs of the chosen levels.
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
JUDGED = 8192  # tokens for measuring errors of a block's output, over all ranks


@dataclass(frozen=True, slots=True)
class _Seen:
    """Inputs and dense outputs of a block for the tokens that errors are measured on."""

    inputs: Sequence[Tensor]  # this rank's, [B, S, D]
    outputs: Sequence[Tensor]  # the same shapes


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
    """Measure every unit of the model that is not in the database yet, and add it.

    Args:
        job: The model and the passes; the plan is not used.
        open_stream: Function that opens a stream before the first block.
        levels: Level database, written by the first rank and read by all.
        tell: Called after each option of each block, and after each block.
        clock: Time limit of the complete run; None for no limit.
        wanted: Mean bits per weight that the budget allows.
        drop: Whether to add every attention layer and MLP, with the error of dropping it.
        near: Options of each unit to measure, the chosen one first; None measures all options, with none chosen.

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
    """Install the chosen levels in a block, and skip dropped sub-layers while the context is open."""
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
    """Refuse passes that cannot be applied to a single unit with a single option.

    Raises:
        RecipeError: there is such a pass.
    """
    for number, step in enumerate(passes):
        if step.offers and (step.chooses or step.two_streams or step.together):
            raise RecipeError(
                f"passes.{number}: what it makes of a layer cannot be measured by itself (it chooses among options, compares "
                "with the dense model, or has layers share codebooks); search with another pass"
            )


def planned_units(job: Job) -> list[Unit]:
    """Return the units and their levels, with sizes computed from shapes alone. Errors are 0: nothing is measured."""
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
    """Return the labels of the options that there is time to measure: those nearest to the wanted bits.

    The largest option that does not exceed the wanted bits comes first (if none exists, the smallest option).

    Args:
        units: Units from `planned_units`.
        seconds: Time that each option took for one block, in seconds.
        fixed: Time for the other work on a block, in seconds.
        blocks: Number of remaining blocks.
        left: Time left for measuring, choosing and writing, in seconds.
        wanted: Wanted bits per weight.

    Raises:
        RecipeError: there is no time for two options.
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
    """Return the full names of a block's units, and of its sub-layers if they may be dropped."""
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
    """Yield every unit of a block, with the weights of its levels. Add the time of each option, by label, to `seconds`."""
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
    """Return the options to measure for a unit, of those that can hold it. If there are none, return all that can hold it."""
    options = list(able(step, block, names))
    return [option for option in options if kept is None or option.label in kept] or options


def _applied(
    job: Job, step: Pass, block: Block, stats: BlockStats, option: Format, units: Mapping[str, Sequence[str]]
) -> Mapping[str, QuantizedTensor]:
    """Apply a pass with one option to some units, shared out over all ranks. Return the new layers of all ranks."""
    costs = {unit: sum(block.weight(name).numel() for name in names) for unit, names in units.items()}
    outcome = job.ranks.gather(step.apply(block, stats, dict.fromkeys(job.ranks.share(costs), option)))
    return {name: new for name, new in outcome.edits.items() if isinstance(new, QuantizedTensor)}


def _seen(stream: CalibrationStream, block: Block) -> _Seen:
    """Return the first batches that enter a block, and the block's outputs."""
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
    """Return 1 - the mean cosine similarity of a block's inputs and outputs."""
    total = torch.zeros(2, dtype=torch.float64, device=job.ranks.device)
    for x, y in zip(seen.inputs, seen.outputs, strict=True):
        cosine = cosine_similarity(x.float(), y.float(), dim=-1)
        total += torch.stack([cosine.double().sum(), torch.tensor(cosine.numel(), device=total.device)])
    job.ranks.sum_([total])
    return 1 - float(total[0] / total[1])


def _dropped(job: Job, block: Block, seen: _Seen, shift: float, part: str) -> Unit:
    """Return an attention layer or MLP as a unit whose only level is dropping it, with the error of that."""
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
    """Return the squared error of a block's output, relative to the square of that output."""
    total = torch.zeros(2, dtype=torch.float64, device=job.ranks.device)
    for x, y in zip(seen.inputs, seen.outputs, strict=True):
        missed = trial(x).float() - y.float()
        total += torch.stack([part.square().sum().double() for part in (missed, y.float())])
    job.ranks.sum_([total])
    return float(total[0] / total[1])


def _outstanding(weights: Sequence[Tensor], squares_I: Tensor) -> float:
    """Return the share of weights whose magnitude times the norm of their input is above `OUTSTANDING` times the mean."""
    scores = [w.abs() * squares_I.sqrt() for w in weights]
    count = sum(score.numel() for score in scores)
    mean = sum(float(score.double().sum()) for score in scores) / count
    return sum(int((score > OUTSTANDING * mean).sum()) for score in scores) / count


def _outliers(weights: Sequence[Tensor]) -> float:
    """Return the share of weights more than a standard deviation above their mean."""
    count = sum(w.numel() for w in weights)
    mean = sum(float(w.double().sum()) for w in weights) / count
    spread = (sum(float((w - mean).square().double().sum()) for w in weights) / count) ** 0.5
    return sum(int((w > mean + spread).sum()) for w in weights) / count
