"""Integers of 2 to 8 bits with one scale per group of input channels, and one zero point if asymmetric.

Bytes, for a weight [O, I] with G = I / group_size groups in a row:

    weight_packed      int32 [O, ceil(I * bits / 32)]   codes, LSB-first bit stream along the input channels
    weight_scale       bf16  [O, G]                     may be negative: see compressor/formats/numerics/int_grid.py
    weight_shape       int64 [2]                        (O, I)
    weight_zero_point  int32 [ceil(O * bits / 32), G]   asymmetric only: zero points, packed along the output channels

    w[o, i] = (code[o, i] - zero[o, i // group_size]) * scale[o, i // group_size],  zero = 2**(bits - 1) if symmetric

Without packing, each code takes a byte; 2**(bits - 1) is subtracted before it is stored:

    weight             int8  [O, I]
    weight_scale       bf16  [O, G]
    weight_zero_point  int8  [O, G]                     asymmetric only

With `activations: int8` a layer also rounds its input (compressor/formats/numerics/activations.py). Nothing is stored for
that.

These are the layouts `pack-quantized` (of 0.18 and later) and `int-quantized` of compressed-tensors, byte for byte. Stock
transformers loads them, except packed zero points. vLLM loads the packed layout. Scales in fp16 and fp32 can be read too.

Shape suffixes: O out_features, I in_features, G groups in a row.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from compressor.formats.base import PartSpec, QuantizedTensor
from compressor.formats.numerics import bitpack
from compressor.formats.numerics.activations import SCHEMES
from compressor.formats.numerics.codes import Codes, IntCodes, values
from compressor.formats.numerics.int_grid import IntFit, IntGrid, groups
from compressor.recipe.registry import node

SCALE_DTYPE = torch.bfloat16  # its values are exact in float32, and in float16 above 2e-5


@node
class IntGroup:
    """Integers with a scale per group of adjacent input channels.

    Args:
        bits: Width of a code, 2 to 8.
        group_size: Number of adjacent input channels that share a scale; -1 for the whole row.
        symmetric: False stores a zero point per group, which stock transformers loads only without packing.
        packed: False stores each code as a byte; with `activations`, engines run this as W8A8.
        activations: int8 rounds the layer's input with one scale per token; null does not round it.
    """

    part_names: ClassVar[tuple[str, ...]] = ("weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape")

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    packed: bool = True
    activations: Literal["int8"] | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits: {self.bits} is not in 2 … 8")
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(f"group_size: {self.group_size} is neither -1 (the whole row) nor a positive number")

    @property
    def label(self) -> str:
        group = "" if self.group_size == -1 else f"g{self.group_size}"
        rounded = "" if self.activations is None else "-a8"
        return f"int{self.bits}{'' if self.symmetric else 'a'}{group}{'' if self.packed else '-bytes'}{rounded}"

    def checkpoint_parts(self, shape: tuple[int, int]) -> Mapping[str, PartSpec]:
        rows, columns, count = *shape, groups(shape[1], self.group_size)
        scale: dict[str, PartSpec] = {"weight_scale": (SCALE_DTYPE, (rows, count))}
        if not self.packed:
            zero: dict[str, PartSpec] = {} if self.symmetric else {"weight_zero_point": (torch.int8, (rows, count))}
            return {"weight": (torch.int8, (rows, columns))} | scale | zero
        zero = {} if self.symmetric else {"weight_zero_point": (torch.int32, (bitpack.words(rows, self.bits), count))}
        codes: dict[str, PartSpec] = {"weight_packed": (torch.int32, (rows, bitpack.words(columns, self.bits)))}
        return codes | scale | {"weight_shape": (torch.int64, (2,))} | zero

    def stored_bits(self, shape: tuple[int, int]) -> int:
        parts = self.checkpoint_parts(shape).values()
        return sum(8 * dtype.itemsize * torch.Size(size).numel() for dtype, size in parts)

    def compressed_tensors(self) -> dict[str, Any] | None:
        if self.packed and not self.symmetric:
            return None  # packed zero points do not reload in transformers
        strategy: dict[str, Any] = {"strategy": "channel", "group_size": None}
        if self.group_size != -1:
            strategy = {"strategy": "group", "group_size": self.group_size}
        weights = {"num_bits": self.bits, "type": "int", "symmetric": self.symmetric, **strategy, "dynamic": False}
        scheme = {"format": "pack-quantized" if self.packed else "int-quantized", "weights": weights}
        return scheme if self.activations is None else scheme | {"input_activations": dict(SCHEMES[self.activations])}

    def fit(self, w_OI: Tensor, importance_I: Tensor | None = None, *, search: bool = True) -> IntGrid:
        return IntFit(self.bits, self.group_size, self.symmetric, SCALE_DTYPE).grid(self, w_OI, importance_I, search)

    def codes(self, packed: QuantizedTensor) -> IntCodes:
        parts, (rows, columns) = packed.parts, packed.shape
        scale = parts["weight_scale"]
        if self.packed:
            codes = bitpack.unpack(parts["weight_packed"], self.bits, columns)
        else:
            codes = parts["weight"].view(torch.uint8) + self._half
        if self.symmetric:
            zero = torch.full(scale.shape, self._half, dtype=torch.uint8, device=scale.device)
        elif self.packed:
            zero = bitpack.unpack(parts["weight_zero_point"].T, self.bits, rows).T.contiguous()
        else:
            zero = parts["weight_zero_point"].view(torch.uint8) + self._half
        return IntCodes(self.bits, codes, scale, zero)

    def stored(self, codes: Codes, shape: tuple[int, int]) -> QuantizedTensor:
        assert isinstance(codes, IntCodes)
        assert codes.order_I is None
        if self.packed:
            parts = {"weight_packed": bitpack.pack(codes.codes_OI, self.bits), "weight_scale": codes.scale}
            parts["weight_shape"] = torch.tensor(shape)
            zero = bitpack.pack(codes.zero.T, self.bits).T.contiguous()
        else:
            parts = {"weight": (codes.codes_OI - self._half).view(torch.int8), "weight_scale": codes.scale}
            zero = (codes.zero - self._half).view(torch.int8)
        return QuantizedTensor(self, shape, parts if self.symmetric else parts | {"weight_zero_point": zero})

    def dequantize(self, packed: QuantizedTensor) -> Tensor:
        return values(self.codes(packed))

    @property
    def _half(self) -> int:
        """The zero point of the symmetric kind."""
        return int(2 ** (self.bits - 1))


EXPORT = IntGroup
