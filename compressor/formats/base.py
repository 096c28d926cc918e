"""The contracts of formats: an option, a format, a grid fitted to one weight, a packed weight.

Shape suffixes: O out_features, I in_features, C adjacent columns.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from compressor.formats.numerics.activations import Seen
from compressor.formats.numerics.codes import Codes


class Option(Protocol):
    """One way to compress a unit: a weight format, `keep half of the channels`, `drop the block`."""

    @property
    def label(self) -> str: ...  # file-name safe, unique within a recipe


@dataclass(frozen=True, slots=True)
class Kept:
    """So many units of a part stay: channels, groups of heads; of a sub-layer that goes or stays as a whole, 0 or 1."""

    keep: int
    of: int

    @property
    def label(self) -> str:
        """File-name safe."""
        return f"keep{self.keep}of{self.of}"


GONE = Kept(0, 1)


class Grid(Protocol):
    """A format fitted to one weight: the values that every column may take."""

    @property
    def step(self) -> int: ...  # columns that one code covers: 1, or the length of a codebook's vectors
    def round(self, w_OC: Tensor, column: int) -> Tensor: ...  # codes [O, C / step] of columns column … column + C
    def decode(self, codes: Tensor, column: int) -> Tensor: ...  # their values, fp32 [O, C]
    @property
    def width(self) -> int: ...  # adjacent columns that share scales
    def refit(self, w_OC: Tensor, column: int, importance_C: Tensor, *, search: bool) -> "Grid":
        """With the scales of columns column … column + width chosen anew, as by `Format.fit`, for columns that changed."""

    def pack(self, codes: Tensor) -> "QuantizedTensor": ...  # all codes of the weight, [O, I / step]


@runtime_checkable
class Rescalable(Grid, Protocol):
    """A grid whose scales can be changed while the codes stay."""

    def rescaled(self, column: int, slope_O: Tensor, curvature_O: Tensor) -> "Rescalable":
        """The scales of columns column … column + width multiplied by what is best, as they are stored.

        Rows that share a scale get one factor, 1 + the sum of their slopes / that of their curvatures, of the loss by the
        factor; it is not negative, and 1 where there is no curvature.
        """


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
        """Unpack a weight: its integers, scales and zero points, in the dtypes that are stored.

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
        """The entries of a compressed-tensors scheme that describe the format; None if that layout cannot hold it."""


@runtime_checkable
class Contextual(Format, Protocol):
    """A format with something that is stored once for a weight and hangs on more than the weight."""

    @property
    def static_inputs(self) -> bool: ...  # it rounds activations by a number found in calibration
    def within(self, largest: float, seen: Seen | None) -> Format:
        """The same, for layers that engines fuse, and want equal in what is stored once.

        Args:
            largest: The largest weight of all of them, in magnitude.
            seen: Activations that the layers read, where `static_inputs` asks for them.
        """


@runtime_checkable
class Borrowing(Format, Protocol):
    """A format some of whose parts another layer may have on disk, which both then use."""

    @property
    def lender(self) -> str: ...  # full name of that layer; empty: all parts are its own
    def borrowed_parts(self, shape: tuple[int, int]) -> Mapping[str, PartSpec]:
        """Return the tensors that `codes` reads besides `checkpoint_parts`. A weight of any shape lends them."""

    def borrowing(self, lender: str) -> Format: ...  # the same with another lender
    @property
    def inner(self) -> Format: ...  # what kernels decode of it


def borrowed(fmt: Format, shape: tuple[int, int]) -> tuple[str, Mapping[str, PartSpec]]:
    """The layer that lends parts to a weight of a shape, and these; empty if all are its own."""
    return (fmt.lender, fmt.borrowed_parts(shape)) if isinstance(fmt, Borrowing) and fmt.lender else ("", {})


@dataclass(frozen=True, slots=True)
class OneOf:
    """Formats that a pass chooses among by itself, from data or from the weights; each can hold every layer of the unit."""

    formats: tuple[Format, ...]

    @property
    def label(self) -> str:
        return "-or-".join(fmt.label for fmt in self.formats)

    def largest(self, shape: tuple[int, int]) -> Format:
        """The one that takes the most space on disk, its entries in the file's header included: what a forecast says."""
        return max(self.formats, key=lambda fmt: (fmt.stored_bits(shape), len(str(fmt.checkpoint_parts(shape)))))


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A weight as it lies on disk: named parts, and the format that can decode them."""

    format: Format
    shape: tuple[int, int]  # (O, I) of the dense weight
    parts: Mapping[str, Tensor]  # saved as "<layer>.<part>", each by the layer whose own it is

    @property
    def own(self) -> dict[str, Tensor]:
        """The parts that no other layer lends."""
        others = borrowed(self.format, self.shape)[1]
        return {name: part for name, part in self.parts.items() if name not in others}

    def dequantize(self) -> Tensor:
        """The values the parts stand for, fp32 [O, I]."""
        return self.format.dequantize(self)


Stored = Tensor | QuantizedTensor
Edits = Mapping[str, Stored]  # by name inside the block: weights [O, I] of layers, and any other parameter, dense


def dense(new: Stored) -> Tensor:
    """The values of a stored weight, [O, I]."""
    return new.dequantize() if isinstance(new, QuantizedTensor) else new


def stored_bits(new: Stored) -> int:
    """Bits that a stored weight takes on disk."""
    parts = new.own.values() if isinstance(new, QuantizedTensor) else [new]
    return sum(8 * part.nbytes for part in parts)
