"""Width pruning. One sweep refits every part for every candidate width; chosen widths are applied as the checkpoint is read.

A width of a part consists of the kept units and the writer refitted to them (compressor/passes/prune/order.py). Later blocks
see the mean of the writer over all widths, so that one sweep suffices. The idea is that of "Týr-the-Pruner", NeurIPS 2025,
but one forward pass computes the expectation. With a single width this is exactly the model that will be written.

Results are stored on disk as levels (compressor/pipeline/search/levels.py): the kept units and the writer, in the
checkpoint's dtype.

Shape suffixes: O out_features, S kept columns, U units.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from compressor.formats.base import Edits, Kept, dense
from compressor.model.block import Block, Trial
from compressor.model.edited import Rewriting
from compressor.model.source import ModelSource, return_freed_memory
from compressor.passes.prune.order import by_score, greedy
from compressor.passes.prune.prunable import Part, find_all, find_parts, spread
from compressor.passes.prune.scores import SCORES, Seen
from compressor.pipeline.calibration.stats import Hessian, Mean
from compressor.pipeline.calibration.stream import BlockStats, CalibrationStream
from compressor.pipeline.job import Event, Job, Tell
from compressor.pipeline.plan import describe_option
from compressor.pipeline.search.levels import Choice, Level, LevelDB, Unit

UNITS = "units"  # key of the kept units in a level


class Narrows(Protocol):
    """A choice of units and treatment of the writer. Its `repr` is a cache key and must contain all settings."""

    def widths(self, block: Block, part: Part, stats: BlockStats, wanted: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the kept units [U] and the writer [O, S] for each wanted number, the largest first."""


@dataclass(frozen=True)
class Way:
    """A choice of units part by part, from the statistics of each.

    Args:
        score: Score of units: `obs`, or a name in compressor/passes/prune/scores.py.
        refit: Refit the writer to the kept units.
        damp: Damping of the refit.
    """

    score: str
    refit: bool
    damp: float

    def widths(self, block: Block, part: Part, stats: BlockStats, wanted: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the kept units [U] and the writer [O, S] for each wanted number, the largest first."""
        w_OI, h_II = block.weight(part.writer), stats[part.writer, Hessian].value
        if self.score == "obs":
            return greedy(w_OI, h_II, part.columns, wanted, self.damp)
        score_U = SCORES[self.score](Seen.of(block, part, stats))
        return by_score(w_OI, h_II, score_U, wanted, self.damp, refit=self.refit)


@dataclass(frozen=True)
class Chosen:
    """A choice of units made in advance.

    Args:
        units: Kept units, by full name of the part.
        refit: Refit the writer to the kept units.
        damp: Damping of the refit.
    """

    units: Mapping[str, tuple[int, ...]]
    refit: bool
    damp: float

    def widths(self, block: Block, part: Part, stats: BlockStats, wanted: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the kept units and the writer's weight of the one wanted width."""
        w_OI, h_II = block.weight(part.writer), stats[part.writer, Hessian].value
        stays_U = torch.zeros(part.count, device=w_OI.device)
        stays_U[list(self.units[f"{block.prefix}.{part.name}"])] = 1
        return by_score(w_OI, h_II, stays_U, wanted, self.damp, refit=self.refit)


def sweep(
    job: Job,
    open_stream: Callable[[], CalibrationStream],
    way: Narrows,
    wanted: Mapping[str, Sequence[int]],
    levels: LevelDB,
    tell: Tell,
) -> None:
    """Compute the widths of all parts that are not stored yet.

    Args:
        job: The model. Its passes are not used.
        open_stream: Function that opens a stream before the first block.
        way: Choice of units and treatment of the writer.
        wanted: Numbers of units, by full name of the part. Parts that are not listed do not change.
        levels: Store of results, written by the first rank and read by all.
        tell: Callback for progress, called after each part.
    """
    total, source = len(job.source.layers), job.source
    known = job.ranks.agree(frozenset(levels.journal.finished))
    last = max((i for i in range(total) if not _names(source, i) & wanted.keys() <= known), default=-1)
    stream = open_stream() if last >= 0 else None
    for index in range(last + 1):
        assert stream is not None
        block = source.block(index)
        for name, part in ((f"{block.prefix}.{part.name}", part) for part in find_parts(source, block)):
            if name not in wanted:
                continue
            if name not in known:
                _measure(job, stream, block, part, way, wanted[name], levels)
            made = [levels.edits(name, n) for n in range(len(wanted[name]))] if job.ranks.first else []
            block.install({part.writer: _mean(block, part, job.ranks.agree(made))})
            return_freed_memory()
            tell(Event("prune", index, total, name))
        if index < last:
            stream.advance(block)
        source.release(block)
        return_freed_memory()
        tell(Event("prune", index + 1, total))
    job.ranks.barrier()
    if not job.ranks.first:
        levels.reread()


def _measure(
    job: Job,
    stream: CalibrationStream,
    block: Block,
    part: Part,
    way: Narrows,
    counts: Sequence[int],
    levels: LevelDB,
) -> None:
    """Compute and store one part, in a function of its own so that its memory is freed afterwards."""
    stats = stream.collect(block, [part.writer], (Hessian, Mean))
    found = job.ranks.agree(list(way.widths(block, part, stats, counts)) if job.ranks.first else [])
    if job.ranks.first:
        levels.add(*_unit(block, part, stats, found))


def _names(source: ModelSource, index: int) -> set[str]:
    block = source.block(index, load=False)
    return {f"{block.prefix}.{part.name}" for part in find_parts(source, block)}


def _unit(
    block: Block, part: Part, stats: BlockStats, found: Sequence[tuple[Tensor, Tensor]]
) -> tuple[Unit, list[dict[str, Tensor]]]:
    """Return the search unit of a part with its widths, the narrowest first, and the tensors of each width."""
    dtype, h_II = block.dtypes[f"{part.writer}.weight"], stats[part.writer, Hessian].value.double()
    w_OI = block.weight(part.writer).double()
    each = part.parameters(block)
    levels, edits = [], []
    for units, writer in reversed(found):
        new = writer.to(dtype)
        off = w_OI.clone()
        off[:, part.columns_of(units)] -= new.double()
        error = float(((off @ h_II) * off).sum() / ((w_OI @ h_II) * w_OI).sum().clamp(min=1e-30))
        bits = 8 * dtype.itemsize * each * len(units)
        levels.append(Level(Kept(len(units), part.count), bits, error, float(off.square().sum())))
        edits.append({UNITS: units.int().cpu(), part.writer: new.cpu().contiguous()})
    unit = Unit(
        name=f"{block.prefix}.{part.name}",
        block=block.index,
        layers=(*(name for name in part.rows if name in block.layers), part.writer),
        weights=each * part.count,
        shift=0.0,
        outliers=0.0,
        trace=float(h_II.diagonal().mean()),
        levels=tuple(levels),
    )
    return unit, edits


def _mean(block: Block, part: Part, made: Sequence[Edits]) -> Tensor:
    """Return the mean of the writer [O, I] over widths, with zeros for dropped columns."""
    total = torch.zeros_like(block.weight(part.writer), dtype=torch.float32)
    for edits in made:
        total[:, part.columns_of(dense(edits[UNITS]).long().to(total.device))] += dense(edits[part.writer]).to(total)
    return total / len(made)


class Widths:
    """Computed widths as levels for `Fitness`, with the rows before the writer, which are taken from the model.

    Args:
        source: The model.
        levels: Levels computed by `sweep`.
    """

    def __init__(self, source: ModelSource, levels: LevelDB) -> None:
        self.source, self.levels, self.units = source, levels, levels.units
        found = find_all(source)
        self.parts = {name: part for name, (_, part) in found.items()}

    def kept(self, unit: str, level: int) -> Tensor:
        """Return the kept units [U] of a level."""
        return dense(self.levels.edits(unit, level)[UNITS]).long()

    def trial(self, unit: str, level: int, device: torch.device, dtype: torch.dtype) -> Trial:
        """Return the trial of a narrower part, for `Fitness`."""
        return Trial.of(self.edits(unit, level), device, dtype)

    def edits(self, unit: str, level: int) -> Edits:
        """Return the weights and biases of a narrower part by name inside the block."""
        found = dict(self.levels.edits(unit, level))
        units, part, prefix = dense(found.pop(UNITS)).long(), self.parts[unit], unit.rpartition(".")[0]
        return found | {
            name: self.source.read(_parameter(self.source, prefix, name))[spread(units, rows)]
            for name, rows in part.rows.items()
        }

    def uniform(self, keep: Mapping[str, int]) -> Choice:
        """Return the choice in which every block keeps the given number of units of each part."""
        counts = [[level.option.keep for level in unit.levels if isinstance(level.option, Kept)] for unit in self.units]
        return tuple(row.index(keep[self.parts[unit.name].name]) for unit, row in zip(self.units, counts, strict=True))

    def describe(self, choice: Choice) -> list[dict[str, Any]]:
        """Return how many units each part keeps, and the relative error of its output: plain data."""
        found = [(unit.name, unit.levels[at]) for unit, at in zip(self.units, choice, strict=True)]
        return [{"unit": name, **describe_option(level.option), "error": level.error} for name, level in found]

    def keep(self, choice: Choice) -> dict[str, int]:
        """Return the number of kept units of each part, by full name."""
        found = [(unit.name, unit.levels[at].option) for unit, at in zip(self.units, choice, strict=True)]
        return {name: option.keep for name, option in found if isinstance(option, Kept)}

    def rewriting(self, choice: Choice) -> Rewriting:
        """Return the change to the weights for a level of each unit, without changes to the config."""
        tensors: dict[str, Callable[[Tensor], Tensor]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for unit, level in zip(self.units, choice, strict=True):
            part, prefix, units = self.parts[unit.name], unit.name.rpartition(".")[0], self.kept(unit.name, level)
            if len(units) == part.count:
                continue
            for name, rows in part.rows.items():
                stored = self.source.names[_parameter(self.source, prefix, name)]
                at = spread(units, rows)
                tensors[stored] = partial(_rows_of, at)
                shapes[stored] = (len(at), *self.source.checkpoint.headers[stored].shape[1:])
            stored = self.source.names[f"{prefix}.{part.writer}.weight"]
            tensors[stored] = partial(self._writer, unit.name, level, part.writer)
            shapes[stored] = (self.source.checkpoint.headers[stored].shape[0], len(units) * part.columns)
        return Rewriting(tensors, shapes=shapes)

    def _writer(self, unit: str, level: int, name: str, old: Tensor) -> Tensor:
        return dense(self.levels.edits(unit, level)[name]).to(old)


def _rows_of(at: Tensor, old: Tensor) -> Tensor:
    return old[at]


def _parameter(source: ModelSource, prefix: str, name: str) -> str:
    """Return the full name of a layer's weight, or of a parameter."""
    return name if (name := f"{prefix}.{name}") in source.names else f"{name}.weight"
