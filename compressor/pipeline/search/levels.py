"""The level database: every option of every unit, computed once, so that a search only has to choose.

It is a directory with a journal (compressor/model/journal.py) and one file per unit. The journal's fingerprint identifies
the model, data, passes and arithmetic that the levels are valid for. A unit's file holds the packed tensors of all its
levels, named `<level>/<layer>.<part>`. Files are memory-mapped, so a database may be larger than memory.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from compressor.formats.base import Edits, Format, Kept, Option, QuantizedTensor, Stored
from compressor.model.block import Trial
from compressor.model.journal import Journal, sound
from compressor.pipeline.plan import describe_option, read_option
from compressor.recipe import registry

NAMED = "name another directory with --levels"
DENSE = "dense"  # name of the tensor of a weight that is not packed
Choice = tuple[int, ...]  # level of each unit, in the order of the units


@dataclass(frozen=True, slots=True)
class Together:
    """Options of several units that are chosen together."""

    options: tuple[tuple[str, Option], ...]  # pairs of unit name and option

    @property
    def alike(self) -> Option | None:
        """The common option of all units; None if they differ."""
        found = {option for _, option in self.options}
        return found.pop() if len(found) == 1 else None

    @property
    def label(self) -> str:
        """Label for display."""
        return self.alike.label if self.alike is not None else "+".join(option.label for _, option in self.options)


@dataclass(frozen=True, slots=True)
class Level:
    """The result of an option on a unit."""

    option: Format | Kept | Together
    bits: int  # stored bits, counted from the tensors
    error: float  # squared error of the block's output with only this unit changed, relative to the output's square
    distance: float  # squared distance of the weights from the dense ones


@dataclass(frozen=True, slots=True)
class Unit:
    """Layers that are stored alike, and their levels from the fewest bits to the most."""

    name: str  # full name
    block: int  # number of the block
    layers: tuple[str, ...]  # names inside the block
    weights: int  # number of weights
    shift: float  # 1 - the mean cosine similarity of the block's input and output
    outliers: float  # share of weights more than a standard deviation above their mean
    trace: float  # mean diagonal of the Hessian of the layers' input
    levels: tuple[Level, ...]
    salience: float = 0.0  # share of weights whose effect on outputs is far above the mean (OWL)
    seconds: float = field(default=0.0, compare=False)  # time for its levels, with its share of the block's other work

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for the journal."""
        return {
            **asdict(self),
            "levels": [{**asdict(level), "option": describe_option(level.option)} for level in self.levels],
        }

    def chosen(self, level: int) -> Mapping[str, Option]:
        """Return the option that a level gives each unit that it covers, by full name."""
        option = self.levels[level].option
        return dict(option.options) if isinstance(option, Together) else {self.name: option}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Unit":
        """Invert `to_dict`."""
        levels = tuple(Level(**{**level, "option": read_option(level["option"])}) for level in data["levels"])
        return cls(**{**data, "layers": tuple(data["layers"]), "levels": levels})


class Levels(Protocol):
    """The units and their levels to choose among."""

    @property
    def units(self) -> Sequence[Unit]: ...  # in the order of the model
    def trial(self, unit: str, level: int, device: torch.device, dtype: torch.dtype) -> Trial: ...


class LevelDB:
    """A database of levels on disk.

    Args:
        path: Path of the directory.
        fingerprint: Properties that must be equal for stored levels to be used.
        remedy: Advice for the user if they differ, or if another run is writing there.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, str], remedy: str = NAMED) -> None:
        self.journal, self.remedy = Journal(path, fingerprint), remedy

    @contextmanager
    def open(self) -> Iterator[None]:
        """Lock the database for writing while the context is open, and read the levels measured before.

        Raises:
            OutputError: another run is writing there, or the levels have another fingerprint.
        """
        where = self.journal.directory
        self.journal.lock(where, self.remedy)
        try:
            self.journal.resume(where, self.remedy)
            yield
        finally:
            self.journal.release()

    def reread(self) -> None:
        """Read the journal again, to see the levels that another process wrote."""
        self.journal.finished = {line["part"]: line for line in self.journal.lines()[1:]}

    @property
    def units(self) -> list[Unit]:
        """Measured units, in the order of the model."""
        return [unit for unit in self._measured() if unit.layers]

    @property
    def parts(self) -> list[Unit]:
        """Sub-layers that may be dropped, with dropping as their only level, in the order of the model."""
        return [unit for unit in self._measured() if not unit.layers]

    def _measured(self) -> list[Unit]:
        return [Unit.from_dict(line["unit"]) for line in self.journal.finished.values()]

    def add(self, unit: Unit, edits: Sequence[Edits]) -> None:
        """Write a unit to disk. `edits` are the weights of its levels, by layer inside the block."""
        tensors: dict[str, Tensor] = {}
        stored: list[dict[str, Any]] = []
        for number, edit in enumerate(edits):
            stored.append({})
            for layer, new in edit.items():
                stored[-1][layer] = [registry.describe(new.format), new.shape] if isinstance(new, QuantizedTensor) else None
                parts = new.parts if isinstance(new, QuantizedTensor) else {DENSE: new}
                tensors |= {f"{number}/{layer}.{part}": tensor for part, tensor in parts.items()}
        self.journal.add(unit.name, tensors, unit=unit.to_dict(), stored=stored)

    def edits(self, unit: str, level: int) -> dict[str, Stored]:
        """Return a level's weights by layer inside the block, on the CPU."""
        found: dict[str, Stored] = {}
        with sound(self.journal.part(unit)), safe_open(self.journal.part(unit), framework="pt") as opened:
            names = list(opened.keys())
            for layer, known in self.journal.finished[unit]["stored"][level].items():
                start = f"{level}/{layer}."
                if known is None:
                    found[layer] = opened.get_tensor(f"{start}{DENSE}")
                    continue
                spec, (rows, columns) = known
                parts = {name.removeprefix(start): opened.get_tensor(name) for name in names if name.startswith(start)}
                found[layer] = QuantizedTensor(registry.build("format", spec), (rows, columns), parts)
        return found

    def trial(self, unit: str, level: int, device: torch.device, dtype: torch.dtype) -> Trial:
        """Return a level's weights as a trial, dequantized on a device."""
        return Trial.of(self.edits(unit, level), device, dtype)
