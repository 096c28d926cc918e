"""The level database: every option of every unit, computed once, so that a search has only to choose.

A directory with a journal (compressor/model/journal.py) whose fingerprint says for which model, data, passes and arithmetic
it is good, and a file for each unit, with the packed parts of all its levels, named `<level>/<layer>.<part>`. Files are
mapped into memory as they are read: a database may be larger than that.
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
DENSE = "dense"  # the only part of a weight that is not packed
Choice = tuple[int, ...]  # a level of each unit, in the order of the units


@dataclass(frozen=True, slots=True)
class Together:
    """Options of several units that are chosen as one."""

    options: tuple[tuple[str, Option], ...]  # by the name of the unit

    @property
    def alike(self) -> Option | None:
        """The option, if all have the same."""
        found = {option for _, option in self.options}
        return found.pop() if len(found) == 1 else None

    @property
    def label(self) -> str:
        """For people."""
        return self.alike.label if self.alike is not None else "+".join(option.label for _, option in self.options)


@dataclass(frozen=True, slots=True)
class Level:
    """The result of an option on a unit."""

    option: Format | Kept | Together
    bits: int  # stored, counted from its tensors
    error: float  # of the block's output with the rest of the block as it is: squared, relative to that output
    distance: float  # of its weights from the dense ones, squared


@dataclass(frozen=True, slots=True)
class Unit:
    """Layers that are stored alike, and their levels: from the fewest bits to the most."""

    name: str  # full
    block: int
    layers: tuple[str, ...]  # inside the block
    weights: int
    shift: float  # how far the block turns its input: 1 - the mean cosine of what enters and what leaves it
    outliers: float  # share of weights more than a standard deviation above their mean
    trace: float  # mean of the diagonal of the Hessian of what the layers read
    levels: tuple[Level, ...]
    salience: float = 0.0  # share of weights far above the mean in what they do to their outputs (OWL)
    seconds: float = field(default=0.0, compare=False)  # that its levels took, and its part of what the block takes besides

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the journal."""
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
        """Inverse of `to_dict`."""
        levels = tuple(Level(**{**level, "option": read_option(level["option"])}) for level in data["levels"])
        return cls(**{**data, "layers": tuple(data["layers"]), "levels": levels})


class Levels(Protocol):
    """The units and their levels, among which a choice is made."""

    @property
    def units(self) -> Sequence[Unit]: ...  # in the order of the model
    def trial(self, unit: str, level: int, device: torch.device, dtype: torch.dtype) -> Trial: ...


class LevelDB:
    """Levels on disk.

    Args:
        path: Path of the directory.
        fingerprint: Properties that must be equal for stored levels to be used.
        remedy: Advice if they are not, or if another run is writing there.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, str], remedy: str = NAMED) -> None:
        self.journal, self.remedy = Journal(path, fingerprint), remedy

    @contextmanager
    def open(self) -> Iterator[None]:
        """Be the one that writes while the context is open; what was measured before, is there.

        Raises:
            OutputError: another run is writing there, or what is there is of another model or other data.
        """
        where = self.journal.directory
        self.journal.lock(where, self.remedy)
        try:
            self.journal.resume(where, self.remedy)
            yield
        finally:
            self.journal.release()

    def reread(self) -> None:
        """Learn of what another process wrote."""
        self.journal.finished = {line["part"]: line for line in self.journal.lines()[1:]}

    @property
    def units(self) -> list[Unit]:
        """In the order of the model."""
        return [unit for unit in self._measured() if unit.layers]

    @property
    def parts(self) -> list[Unit]:
        """Sub-layers that may go, with that as their only level; in the order of the model."""
        return [unit for unit in self._measured() if not unit.layers]

    def _measured(self) -> list[Unit]:
        return [Unit.from_dict(line["unit"]) for line in self.journal.finished.values()]

    def add(self, unit: Unit, edits: Sequence[Edits]) -> None:
        """Put a unit on disk; `edits` are its levels' weights, by layer inside the block."""
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
        """A level's weights by layer inside the block, on the CPU."""
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
        """The same as it is tried."""
        return Trial.of(self.edits(unit, level), device, dtype)
