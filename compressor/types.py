"""The types that cross module boundaries.

Shape suffixes: O out_features, I in_features, T tokens, B samples of a batch, S sequence, D hidden, C adjacent columns.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from compressor.codes import Codes
from compressor.errors import SourceError


class Option(Protocol):
    """One way to compress a unit: a weight format, `keep half of the channels`, `drop the block`."""

    @property
    def label(self) -> str: ...  # file-name safe, unique within a recipe


class Grid(Protocol):
    """A format fitted to one weight: the values that every column may take."""

    @property
    def step(self) -> int: ...  # columns that one code covers: 1, or the length of a codebook's vectors
    def round(self, w_OC: Tensor, column: int) -> Tensor: ...  # codes [O, C / step] of columns column … column + C
    def decode(self, codes: Tensor, column: int) -> Tensor: ...  # their values, fp32 [O, C]
    def pack(self, codes: Tensor) -> "QuantizedTensor": ...  # all codes of the weight, [O, I / step]


PartSpec = tuple[torch.dtype, tuple[int, ...]]  # dtype and shape of a tensor on disk


@runtime_checkable
class Format(Option, Protocol):
    """Byte layout, exact size and CPU reference of one weight format; `dequantize` is the ground truth."""

    part_names: ClassVar[tuple[str, ...]]  # of all tensors that a layer may have on disk; two of them tell that it is packed

    def stored_bits(self, shape: tuple[int, int]) -> int:
        """Exact size of a weight of this shape, scales and padding included. Raises ValueError if it cannot be held."""

    def fit(self, w_OI: Tensor, importance_I: Tensor | None = None, *, search: bool = True) -> Grid:
        """Choose scales for a weight, by search for the least error (weighted by column) or from its range alone."""

    def codes(self, packed: "QuantizedTensor") -> Codes:
        """What a packed weight holds, unpacked: its integers, scales and zero points, these in the dtype they are stored in.

        Raises:
            SourceError: the parts contradict each other.
        """

    def stored(self, codes: Codes, shape: tuple[int, int]) -> "QuantizedTensor":
        """Inverse of `codes`, bit for bit, for a weight of shape (O, I)."""

    def dequantize(self, packed: "QuantizedTensor") -> Tensor: ...  # `values` of the codes, fp32 [O, I]

    def checkpoint_parts(self, shape: tuple[int, int]) -> Mapping[str, PartSpec]:
        """Name, dtype and shape of every tensor on disk: what `codes` reads and a loader must expect.

        Others may have stored scales in another floating-point dtype.
        """

    def compressed_tensors(self) -> dict[str, Any] | None:
        """`format` and `weights` of a compressed-tensors scheme, or None if that layout cannot hold the format."""


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A weight as it lies on disk: named parts, and the format that can decode them."""

    format: Format
    shape: tuple[int, int]  # (O, I) of the dense weight
    parts: Mapping[str, Tensor]  # saved as "<layer>.<part>"

    def dequantize(self) -> Tensor:
        """The values the parts stand for, fp32 [O, I]."""
        return self.format.dequantize(self)


Stored = Tensor | QuantizedTensor
Edits = Mapping[str, Stored]  # new weights [O, I] by layer name inside the block


def dense(new: Stored) -> Tensor:
    """The values of a stored weight, [O, I]."""
    return new.dequantize() if isinstance(new, QuantizedTensor) else new


def stored_bits(new: Stored) -> int:
    """Bits that a stored weight takes on disk."""
    parts = new.parts.values() if isinstance(new, QuantizedTensor) else [new]
    return sum(8 * part.nbytes for part in parts)


class LinearLike(Protocol):
    """How to read and write the weight of one kind of linear module as [out_features, in_features]."""

    def weight(self, module: nn.Module) -> Tensor: ...
    def parameter(self, w_OI: Tensor) -> Tensor: ...  # as the module keeps it
    def set_weight(self, module: nn.Module, w_OI: Tensor) -> None: ...


Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]  # what a block is called with besides the hidden states


@dataclass(slots=True)
class Block:
    """One resident decoder block. Its weights change only through `install`."""

    index: int
    prefix: str  # "model.layers.3"
    module: nn.Module
    layers: Mapping[str, LinearLike]  # its linear layers, by name inside the block
    arguments: Callable[[tuple[int, int]], Arguments]  # by the (B, S) of the hidden states
    installed: dict[str, Stored] = field(default_factory=dict)

    def weight(self, name: str) -> Tensor:
        """The current weight [O, I] of a layer; a view, not to be written to."""
        return self.layers[name].weight(self.module.get_submodule(name))

    def shape(self, name: str) -> tuple[int, int]:
        """(out_features, in_features) of a layer."""
        rows, columns = self.weight(name).shape
        return rows, columns

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        """The block's output [B, S, D] on full sequences without padding, positions from 0.

        Raises:
            SourceError: the architecture's blocks return more than hidden states.
        """
        args, kwargs = self.arguments((hidden_BSD.shape[0], hidden_BSD.shape[1]))
        result = self.module(hidden_BSD, *args, **kwargs)
        if not isinstance(result, Tensor):
            raise SourceError(
                f"{self.prefix}: its blocks return a {type(result).__name__} where hidden states are needed; "
                "this architecture cannot be streamed block by block yet, only `rtn` without evaluation can compress it"
            )
        return result

    def install(self, edits: Edits) -> None:
        """Adopt new weights: their dense values for later forwards, what is stored for the writer."""
        for name, new in edits.items():
            self._set(name, dense(new))
            self.installed[name] = new

    def _set(self, name: str, w_OI: Tensor) -> None:
        self.layers[name].set_weight(self.module.get_submodule(name), w_OI)


class Accumulator(Protocol):
    """A statistic of a layer's input, summed over calibration tokens and over ranks."""

    def __init__(self, in_features: int, device: torch.device) -> None: ...
    def update(self, x_TI: Tensor) -> None: ...
    def tensors(self) -> Sequence[Tensor]: ...  # summed over ranks in place


class Stats(Protocol):
    """What the calibration stream collected on one block."""

    def __getitem__(self, key: tuple[str, type[Any]]) -> Any: ...  # stats[layer, Hessian]
    def taps(self, layers: Iterable[str]) -> Sequence[tuple[str, ...]]: ...  # layers that read the same tensor


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a pass did to (a part of) a block."""

    edits: Edits
    errors: Mapping[str, float]  # by layer: error relative to the layer's output (or to its weight, without data)
    warnings: tuple[str, ...] = ()


OptionT = TypeVar("OptionT", bound=Option)
Plan = Mapping[str, Option]  # by full unit name, "model.layers.3.mlp.down_proj"


class Pass(Protocol):
    """One algorithm, one file: a frozen dataclass whose fields are its recipe keys. Holds no state."""

    needs: ClassVar[tuple[type[Accumulator], ...]]

    @property
    def options(self) -> tuple[Any, ...]: ...  # one entry means there is nothing to allocate
    def units(self, block: Block) -> Mapping[str, tuple[str, ...]]: ...  # unit -> the layers it rewrites
    def apply(self, block: Block, stats: Stats, choice: Mapping[str, Any]) -> Outcome: ...  # pure
