"""Contracts of formats: an option, a format, a grid fitted to one weight, a packed weight.

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
    """One way to compress a unit: a weight format, "keep half of the channels", "drop the block"."""

    @property
    def label(self) -> str: ...  # file-name safe, unique within a recipe


@dataclass(frozen=True, slots=True)
class Kept:
    """Option to keep `keep` of `of` channels, head groups or weights; a sub-layer is dropped (0 of 1) or kept (1 of 1)."""

    keep: int
    of: int

    @property
    def label(self) -> str:
        """Name of the option, file-name safe."""
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
        """Return the grid with new scales for columns column … column + width, chosen as by `Format.fit`.

        For columns that changed since the first fit.
        """

    def pack(self, codes: Tensor) -> "QuantizedTensor": ...  # from all codes of the weight, [O, I / step]


@runtime_checkable
class Rescalable(Grid, Protocol):
    """A grid whose scales can be changed without changing the codes."""

    def rescaled(self, column: int, slope_O: Tensor, curvature_O: Tensor) -> "Rescalable":
        """Multiply the scales of columns column … column + width by the best factor, and round them as they are stored.

        Rows that share a scale get one factor: 1 + sum of their slopes / sum of their curvatures. It is at least 0, and 1
        where the curvature is 0.

        Args:
            column: First column.
            slope_O: Minus half the first derivative of the loss with respect to the factor.
            curvature_O: Half the second derivative.
        """


PartSpec = tuple[torch.dtype, tuple[int, ...]]  # dtype and shape of a tensor on disk


@runtime_checkable
class Format(Option, Protocol):
    """Byte layout, exact size and CPU reference of one weight format; `dequantize` is the ground truth."""

    part_names: ClassVar[tuple[str, ...]]  # all tensors that a layer may have on disk; any two show that it is packed

    def stored_bits(self, shape: tuple[int, int]) -> int:
        """Return the exact size in bits of a weight, scales and padding included. Raises ValueError for unfit shapes."""

    def fit(self, w_OI: Tensor, importance_I: Tensor | None = None, *, search: bool = True) -> Grid:
        """Choose scales for a weight: by search for the least error (weighted by column), or from its range alone."""

    def codes(self, packed: "QuantizedTensor") -> Codes:
        """Unpack a weight into integers, scales and zero points; scales keep the dtype they are stored in.

        Raises:
            SourceError: the parts contradict each other.
        """

    def stored(self, codes: Codes, shape: tuple[int, int]) -> "QuantizedTensor":
        """Pack the codes of a weight of shape (O, I): the inverse of `codes`, bit for bit."""

    def dequantize(self, packed: "QuantizedTensor") -> Tensor: ...  # the values of the codes, fp32 [O, I]

    def checkpoint_parts(self, shape: tuple[int, int]) -> Mapping[str, PartSpec]:
        """Return name, dtype and shape of every tensor on disk: what `codes` reads and a loader must expect.

        Other programs may have stored scales in another floating-point dtype.
        """

    def compressed_tensors(self) -> dict[str, Any] | None:
        """Return the entries of a compressed-tensors scheme for the format; None if that layout cannot hold it."""


@runtime_checkable
class Contextual(Format, Protocol):
    """A format with a per-tensor number that depends on fused layers or on calibration (e.g. NVFP4's global scale)."""

    @property
    def static_inputs(self) -> bool: ...  # whether it rounds activations by a number found in calibration
    def within(self, largest: float, seen: Seen | None) -> Format:
        """Return the format for layers that engines fuse, and that therefore must share the per-tensor numbers.

        Args:
            largest: Largest magnitude among the weights of all these layers.
            seen: Statistics of their input; needed if `static_inputs`.
        """


@runtime_checkable
class Borrowing(Format, Protocol):
    """A format that can use tensors stored by another layer, the lender (e.g. a shared codebook)."""

    @property
    def lender(self) -> str: ...  # full name of that layer; empty: the layer stores all parts itself
    def borrowed_parts(self, shape: tuple[int, int]) -> Mapping[str, PartSpec]:
        """Return the parts that `codes` reads besides `checkpoint_parts`; their shapes don't depend on the weight's."""

    def borrowing(self, lender: str) -> Format: ...  # the same format with another lender
    @property
    def inner(self) -> Format: ...  # the format that kernels decode


def borrowed(fmt: Format, shape: tuple[int, int]) -> tuple[str, Mapping[str, PartSpec]]:
    """Return the layer that lends parts to a weight of a shape, and these parts; both empty if nothing is borrowed."""
    return (fmt.lender, fmt.borrowed_parts(shape)) if isinstance(fmt, Borrowing) and fmt.lender else ("", {})


@dataclass(frozen=True, slots=True)
class OneOf:
    """Formats of which a pass chooses one, from data or from the weights; each can hold every layer of the unit."""

    formats: tuple[Format, ...]

    @property
    def label(self) -> str:
        return "-or-".join(fmt.label for fmt in self.formats)

    def largest(self, shape: tuple[int, int]) -> Format:
        """Return the format that takes the most space on disk, header entries included; used to predict sizes."""
        return max(self.formats, key=lambda fmt: (fmt.stored_bits(shape), len(str(fmt.checkpoint_parts(shape)))))


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A weight as it is stored on disk: named parts, and the format that decodes them."""

    format: Format
    shape: tuple[int, int]  # (O, I) of the dense weight
    parts: Mapping[str, Tensor]  # saved as "<layer>.<part>", a borrowed part under its lender's name

    @property
    def own(self) -> dict[str, Tensor]:
        """The parts that are not borrowed from another layer."""
        others = borrowed(self.format, self.shape)[1]
        return {name: part for name, part in self.parts.items() if name not in others}

    def dequantize(self) -> Tensor:
        """Return the values the parts stand for, fp32 [O, I]."""
        return self.format.dequantize(self)


Stored = Tensor | QuantizedTensor
Edits = Mapping[str, Stored]  # by name inside the block: weights [O, I] of layers, and any other parameter (dense)


def dense(new: Stored) -> Tensor:
    """Return the values of a stored weight, [O, I]."""
    return new.dequantize() if isinstance(new, QuantizedTensor) else new


def stored_bits(new: Stored) -> int:
    """Return the number of bits that a stored weight takes on disk."""
    parts = new.own.values() if isinstance(new, QuantizedTensor) else [new]
    return sum(8 * part.nbytes for part in parts)
