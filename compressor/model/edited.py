"""A checkpoint as it would be after a change to the whole model, computed tensor by tensor as it is read.

Whatever reads such a checkpoint (blocks, the calibration stream, the writer, a check of the result) works on the changed
model and needs to know nothing of the change. Every tensor is rounded to the dtype it would be stored in, so what is seen
during a run is what will be read back.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from compressor.model.checkpoint import Checkpoint
from compressor.model.surgery.online_hadamard import Blocks

Progress = Callable[[int, int], None]  # done, total


def silent(done: int, total: int) -> None:
    """Tells nobody."""


@dataclass(frozen=True)
class Rewriting:
    """A change to a checkpoint.

    Args:
        tensors: By name on disk: the new values, fp32, from the old ones.
        copies: New name on disk -> the tensor that it starts from.
        config: Entries of config.json.
        hadamard: Layers whose activations are turned from now on (compressor/model/surgery/online_hadamard.py), by full name.
        shapes: By name on disk, where they are others.
        removed: Names that are no longer there.
        absent: Sub-layers that the model does without from now on (compressor/model/surgery/skip_sublayers.py), by full name.
        widths: All sub-layers that are narrower than the config says (compressor/model/surgery/resize.py), by full name;
            None: as before.
        blocks: Former number of each block; empty if all have kept theirs.
        files: Files to write next to the weights: place in the directory -> file to copy.
    """

    tensors: Mapping[str, Callable[[Tensor], Tensor]]
    copies: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    hadamard: Blocks = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    removed: Set[str] = frozenset()
    absent: Set[str] = frozenset()
    widths: Mapping[str, int] | None = None
    blocks: Sequence[int] = ()
    files: Mapping[str, Path] = field(default_factory=dict)

    def then(self, later: "Rewriting") -> "Rewriting":
        """This and another change in one, without rounding in between; the other one copies and removes nothing."""
        assert not later.copies
        assert not later.removed
        assert not later.blocks
        both = {
            name: partial(_in_turn, self.tensors[name], later.tensors[name]) for name in self.tensors if name in later.tensors
        }
        return replace(
            self,
            tensors={**self.tensors, **later.tensors, **both},
            config={**self.config, **later.config},
            hadamard={**self.hadamard, **later.hadamard},
            shapes={**self.shapes, **later.shapes},
            absent=self.absent | later.absent,
            widths=self.widths if later.widths is None else later.widths,
            files={**self.files, **later.files},
        )


def _in_turn(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor], old: Tensor) -> Tensor:
    return second(first(old))


class Rewritten(Checkpoint):
    """A checkpoint after a rewriting.

    Args:
        before: Checkpoint of a directory, or an edited one.
        rewriting: Change to make.
    """

    def __init__(self, before: Checkpoint, rewriting: Rewriting) -> None:
        self.before, self.rewriting = before, rewriting
        self.path, self.shard_of = before.path, before.shard_of
        origins = {**{name: name for name in before}, **rewriting.copies}
        headers = {name: before.headers[origin] for name, origin in origins.items() if name not in rewriting.removed}
        self.headers = {
            name: replace(header, shape=rewriting.shapes.get(name, header.shape)) for name, header in headers.items()
        }

    def read(self, name: str) -> Tensor:
        """One tensor, as it would be stored, on the CPU."""
        tensor = self.before.read(self.rewriting.copies.get(name, name))
        change = self.rewriting.tensors.get(name)
        return tensor if change is None else change(tensor.float()).to(tensor.dtype)
