"""Integers of 2 to 8 bits in groups of output channels within one input channel, with scales and optional zero points.

An input channel with large weights then does not add to the error of others: input channels share no scales.

Bytes, for a weight [O, I] with G = O / group_size groups in a column:

    weight_packed      int32 [O, ceil(I * bits / 32)]   codes, LSB-first bit stream along the input channels
    weight_scale       bf16  [G, I]                     may be negative: see compressor/formats/numerics/int_grid.py
    weight_shape       int64 [2]                        (O, I)
    weight_zero_point  int32 [G, ceil(I * bits / 32)]   asymmetric only: zero points, packed along the input channels

    w[o, i] = (code[o, i] - zero[o // group_size, i]) * scale[o // group_size, i],  zero = 2**(bits - 1) if symmetric

The layout is our own: no other program groups weights this way.

Source: Heo et al., "Rethinking Channel Dimensions to Isolate Outliers for Low-bit Weight Quantization of Large Language
Models" (AdaDim), ICLR 2024, section 4. Differences: scales are searched (compressor/formats/numerics/int_grid.py), and zero
points are optional. As in the paper, error feedback fits a column just before rounding it, to its updated values.

Shape suffixes: O out_features, I in_features, G groups in a column, C adjacent columns.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from compressor.formats.base import PartSpec, QuantizedTensor
from compressor.formats.numerics import bitpack
from compressor.formats.numerics.codes import Codes, IntCodes, values
from compressor.formats.numerics.int_grid import IntFit, IntGrid, groups, rescaled
from compressor.recipe.registry import node

SCALE_DTYPE = torch.bfloat16


@node
class IntInputGroup:
    """Integers with a scale per group of adjacent output channels in each input channel.

    Args:
        bits: Width of a code, 2 to 8.
        group_size: Number of adjacent output channels that share a scale; -1 for all of them.
        symmetric: False stores a zero point per group.
    """

    part_names: ClassVar[tuple[str, ...]] = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits: {self.bits} is not in 2 … 8")
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(f"group_size: {self.group_size} is neither -1 (the whole column) nor a positive number")

    @property
    def label(self) -> str:
        group = "" if self.group_size == -1 else f"g{self.group_size}"
        return f"int{self.bits}{'' if self.symmetric else 'a'}{group}-ic"

    def checkpoint_parts(self, shape: tuple[int, int]) -> Mapping[str, PartSpec]:
        rows, columns, count = *shape, groups(shape[0], self.group_size, "out_features")
        words = bitpack.words(columns, self.bits)
        parts: dict[str, PartSpec] = {
            "weight_packed": (torch.int32, (rows, words)),
            "weight_scale": (SCALE_DTYPE, (count, columns)),
            "weight_shape": (torch.int64, (2,)),
        }
        return parts if self.symmetric else parts | {"weight_zero_point": (torch.int32, (count, words))}

    def stored_bits(self, shape: tuple[int, int]) -> int:
        parts = self.checkpoint_parts(shape).values()
        return sum(8 * dtype.itemsize * torch.Size(size).numel() for dtype, size in parts)

    def compressed_tensors(self) -> dict[str, Any] | None:
        return None

    def fit(self, w_OI: Tensor, importance_I: Tensor | None = None, *, search: bool = True) -> "InputGroupGrid":
        """Fit scales as in `Format.fit`. Importance has no effect: a group lies within one input channel."""
        groups(w_OI.shape[0], self.group_size, "out_features")
        fit = IntFit(self.bits, self.group_size, self.symmetric, SCALE_DTYPE)
        return InputGroupGrid(self, fit.grid(self, w_OI.T.contiguous(), None, search))

    def codes(self, packed: QuantizedTensor) -> IntCodes:
        parts, columns = packed.parts, packed.shape[1]
        codes, scale = bitpack.unpack(parts["weight_packed"], self.bits, columns), parts["weight_scale"]
        if self.symmetric:
            zero = torch.full(scale.shape, 2 ** (self.bits - 1), dtype=torch.uint8, device=scale.device)
        else:
            zero = bitpack.unpack(parts["weight_zero_point"], self.bits, columns)
        return IntCodes(self.bits, codes, scale, zero)

    def stored(self, codes: Codes, shape: tuple[int, int]) -> QuantizedTensor:
        assert isinstance(codes, IntCodes)
        assert codes.order_I is None
        parts = {"weight_packed": bitpack.pack(codes.codes_OI, self.bits), "weight_scale": codes.scale}
        parts["weight_shape"] = torch.tensor(shape)
        if not self.symmetric:
            parts["weight_zero_point"] = bitpack.pack(codes.zero, self.bits)
        return QuantizedTensor(self, shape, parts)

    def dequantize(self, packed: QuantizedTensor) -> Tensor:
        return values(self.codes(packed))


@dataclass(frozen=True)
class InputGroupGrid:
    """The grid of the transposed weight, whose rows are the input channels."""

    format: IntInputGroup
    turned: IntGrid
    step: int = 1

    def round(self, w_OC: Tensor, column: int) -> Tensor:
        return self._rows(column, w_OC.shape[1]).round(w_OC.T, 0).T

    def decode(self, codes: Tensor, column: int) -> Tensor:
        return self._rows(column, codes.shape[1]).decode(codes.T, 0).T

    def refit(self, w_OC: Tensor, column: int, importance_C: Tensor, *, search: bool) -> "InputGroupGrid":
        now, whole = slice(column, column + w_OC.shape[1]), self.turned
        fitted = self.format.fit(w_OC, search=search).turned
        scale_IG, zero_IG = whole.scale_OG.clone(), whole.zero_OG.clone()
        scale_IG[now], zero_IG[now] = fitted.scale_OG, fitted.zero_OG
        return replace(self, turned=replace(whole, scale_OG=scale_IG, zero_OG=zero_IG))

    @property
    def width(self) -> int:
        return 1

    def rescaled(self, column: int, slope_O: Tensor, curvature_O: Tensor) -> "InputGroupGrid":
        scale_IG = self.turned.scale_OG.clone()
        slope_G, curvature_G = (part.view(scale_IG.shape[1], -1).sum(1) for part in (slope_O, curvature_O))
        scale_IG[column] = rescaled(scale_IG[column], slope_G, curvature_G, SCALE_DTYPE)
        return replace(self, turned=replace(self.turned, scale_OG=scale_IG))

    def pack(self, codes: Tensor) -> QuantizedTensor:
        scale_GI, zero_GI = self.turned.scale_OG.T.contiguous(), self.turned.zero_OG.T.contiguous()
        shape = (codes.shape[0], codes.shape[1])
        return self.format.stored(IntCodes(self.format.bits, codes, scale_GI.to(SCALE_DTYPE), zero_GI.to(torch.uint8)), shape)

    def _rows(self, column: int, count: int) -> IntGrid:
        """Return the rows of the transposed grid for some adjacent input channels."""
        now = slice(column, column + count)
        return replace(self.turned, scale_OG=self.turned.scale_OG[now], zero_OG=self.turned.zero_OG[now])


EXPORT = IntInputGroup
