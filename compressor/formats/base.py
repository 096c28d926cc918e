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
    """A number of units to keep of a part: channels or groups of heads. A sub-layer is kept (1 of 1) or dropped (0 of 1)."""

    keep: int
    of: int

    @property
    def label(self) -> str:
        """Return a file-name safe label."""
        return f"keep{self.keep}of{self.of}"


GONE = Kept(0, 1)


class Grid(Protocol):
    """A format fitted to one weight: the values that every column may take."""

    @property
    def step(self) -> int: ...  # number of columns that one code covers: 1, or the length of a codebook's vectors
    def round(self, w_OC: Tensor, column: int) -> Tensor: ...  # codes [O, C / step] of columns column … column + C
    def decode(self, codes: Tensor, column: int) -> Tensor: ...  # values of codes, fp32 [O, C]
    @property
    def width(self) -> int: ...  # number of adjacent columns that share scales
    def refit(self, w_OC: Tensor, column: int, importance_C: Tensor, *, search: bool) -> "Grid":
        """Return the grid with the scales of columns column … column + width fitted again, as by `Format.fit`."""

    def pack(self, codes: Tensor) -> "QuantizedTensor": ...  # from all codes of the weight, [O, I / step]


@runtime_checkable
class Rescalable(Grid, Protocol):
    """A grid whose scales can be changed while the codes are kept."""

    def rescaled(self, column: int, slope_O: Tensor, curvature_O: Tensor) -> "Rescalable":
        """Return the grid with the scales of columns column … column + width multiplied by the best factors.

        Rows that share a scale get one factor: 1 + the sum of their slopes / the sum of their curvatures, both of the loss by
        the factor. It is not negative, and it is 1 where there is no curvature. Scales are rounded as they are stored.
        """


PartSpec = tuple[torch.dtype, tuple[int, ...]]  # dtype and shape of a tensor on disk


@runtime_checkable
class Format(Option, Protocol):
    """Byte layout, exact size and CPU reference of one weight format; `dequantize` is the ground truth."""

    part_names: ClassVar[
        tuple[str, ...]
    ]  # names of all tensors that a layer may have on disk; two of them show that it is packed

    def stored_bits(self, shape: tuple[int, int]) -> int:
        """Return the exact bits of a weight [O, I], scales and padding included. Raises ValueError if it does not fit."""

    def fit(self, w_OI: Tensor, importance_I: Tensor | None = None, *, search: bool = True) -> Grid:
        """Choose scales for a weight: by search for the least error, weighted by column, or from its range alone."""

    def codes(self, packed: "QuantizedTensor") -> Codes:
        """Unpack a weight: its integers, scales and zero points, in the dtypes that are stored.

        Raises:
            SourceError: the parts contradict each other.
        """

    def stored(self, codes: Codes, shape: tuple[int, int]) -> "QuantizedTensor":
        """Pack codes: the inverse of `codes`, bit for bit, for a weight of shape (O, I)."""

    def dequantize(self, packed: "QuantizedTensor") -> Tensor: ...  # the values of the codes, fp32 [O, I]

    def checkpoint_parts(self, shape: tuple[int, int]) -> Mapping[str, PartSpec]:
        """Return name, dtype and shape of every tensor on disk, which `codes` reads and a loader must expect.

        Other software may have stored scales in another floating-point dtype.
        """

    def compressed_tensors(self) -> dict[str, Any] | None:
        """Return the entries of a compressed-tensors scheme for the format; None if that layout cannot hold it."""


@runtime_checkable
class Contextual(Format, Protocol):
    """A format with a number per weight that depends on other layers or on calibration, for example NVFP4's global scale."""

    @property
    def static_inputs(self) -> bool: ...  # whether it rounds activations by a number from calibration
    def within(self, largest: float, seen: Seen | None) -> Format:
        """Return the format for layers that engines fuse, which must have the same number.

        Args:
            largest: Largest magnitude of a weight in any of the layers.
            seen: Activations that the layers read, where `static_inputs` asks for them.
        """


@runtime_checkable
class Borrowing(Format, Protocol):
    """A format some of whose tensors may be stored with another layer, the lender, and are used by both."""

    @property
    def lender(self) -> str: ...  # full name of the lender; empty if all tensors are the layer's own
    def borrowed_parts(self, shape: tuple[int, int]) -> Mapping[str, PartSpec]:
        """Return the tensors that `codes` reads besides `checkpoint_parts`. A weight of any shape lends them."""

    def borrowing(self, lender: str) -> Format: ...  # the format with another lender
    @property
    def inner(self) -> Format: ...  # the format that kernels decode


def borrowed(fmt: Format, shape: tuple[int, int]) -> tuple[str, Mapping[str, PartSpec]]:
    """Return the lender of a weight of a shape and the tensors that it lends; empty if all are the layer's own."""
    return (fmt.lender, fmt.borrowed_parts(shape)) if isinstance(fmt, Borrowing) and fmt.lender else ("", {})


@dataclass(frozen=True, slots=True)
class OneOf:
    """Formats among which a pass chooses, from data or from the weights. Each can hold every layer of the unit."""

    formats: tuple[Format, ...]

    @property
    def label(self) -> str:
        return "-or-".join(fmt.label for fmt in self.formats)

    def largest(self, shape: tuple[int, int]) -> Format:
        """Return the format that takes the most space on disk, entries in the file's header included, for forecasts."""
        return max(self.formats, key=lambda fmt: (fmt.stored_bits(shape), len(str(fmt.checkpoint_parts(shape)))))


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A weight as it lies on disk: named tensors, and the format that decodes them."""

    format: Format
    shape: tuple[int, int]  # (O, I) of the dense weight
    parts: Mapping[str, Tensor]  # saved as "<layer>.<part>", each with the layer that owns it

    @property
    def own(self) -> dict[str, Tensor]:
        """Return the tensors that are not borrowed."""
        others = borrowed(self.format, self.shape)[1]
        return {name: part for name, part in self.parts.items() if name not in others}

    def dequantize(self) -> Tensor:
        """Return the values of the weight, fp32 [O, I]."""
        return self.format.dequantize(self)


Stored = Tensor | QuantizedTensor
Edits = Mapping[str, Stored]  # by name inside the block: weights [O, I] of layers, and any other parameter, dense


def dense(new: Stored) -> Tensor:
    """Return the values of a stored weight, [O, I]."""
    return new.dequantize() if isinstance(new, QuantizedTensor) else new


def stored_bits(new: Stored) -> int:
    """Return the bits that a stored weight takes on disk."""
    parts = new.own.values() if isinstance(new, QuantizedTensor) else [new]
    return sum(8 * part.nbytes for part in parts)
