"""NVFP4: E2M1 numbers, an E4M3 scale per 16 input channels, and one fp32 number for the whole weight.

Bytes, for a weight [O, I]:

    weight_packed        uint8 [O, I / 2]    two codes to a byte, the even column in the low bits
    weight_scale         e4m3  [O, I / 16]
    weight_global_scale  fp32  [1]           a divisor

    w[o, i] = e2m1(code[o, i]) * scale[o, i // 16] / global_scale

This is `nvfp4-pack-quantized` of compressed-tensors, byte for byte. The divisor that we choose is a power of two, and leaves
room above the scale of the largest group, so that this one too can be searched. Layers that engines fuse get the same: vLLM
and SGLang take the largest of them for all.

Shape suffixes: O out_features, I in_features.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import floor, log2
from typing import Any, ClassVar

import torch
from torch import Tensor

from compressor.codes import Codes, Fp4Codes, values
from compressor.errors import SourceError
from compressor.formats._fp4_grid import E4M3, LARGEST, Fp4Grid, fitted, pairs, unpaired
from compressor.formats._int_grid import groups
from compressor.registry import node
from compressor.types import PartSpec, QuantizedTensor

GROUP = 16
POWERS = 120  # of two: divisors beyond leave products with scales that fp32 does not hold
ROOM = 256.0  # scale of the largest group: three halves of it, which puts its largest weight on 4, is a number as well


@node
class NVFP4:
    """4-bit floating-point numbers with a scale of 8 bits per 16 input channels, as Blackwell GPUs multiply."""

    part_names: ClassVar[tuple[str, ...]] = ("weight_packed", "weight_scale", "weight_global_scale")

    @property
    def label(self) -> str:
        return "nvfp4"

    def checkpoint_parts(self, shape: tuple[int, int]) -> Mapping[str, PartSpec]:
        rows, count = shape[0], groups(shape[1], GROUP)
        return {
            "weight_packed": (torch.uint8, (rows, shape[1] // 2)),
            "weight_scale": (torch.float8_e4m3fn, (rows, count)),
            "weight_global_scale": (torch.float32, (1,)),
        }

    def stored_bits(self, shape: tuple[int, int]) -> int:
        parts = self.checkpoint_parts(shape).values()
        return sum(8 * dtype.itemsize * torch.Size(size).numel() for dtype, size in parts)

    def compressed_tensors(self) -> dict[str, Any] | None:
        weights = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": GROUP}
        return {
            "format": "nvfp4-pack-quantized",
            "weights": {**weights, "dynamic": False, "scale_dtype": "torch.float8_e4m3fn"},
        }

    def fit(self, w_OI: Tensor, importance_I: Tensor | None = None, *, search: bool = True) -> Fp4Grid:
        return self._fit(float(w_OI.abs().max()), w_OI, importance_I, search)

    def beside(self, largest: float) -> "NVFP4":
        return Beside(largest=largest)

    def _fit(self, largest: float, w_OI: Tensor, importance_I: Tensor | None, search: bool) -> Fp4Grid:
        power = floor(log2(ROOM) + log2(LARGEST) - log2(largest or 1.0))
        factor = 2.0 ** -max(-POWERS, min(power, POWERS))
        return fitted(NVFP4(), E4M3(), GROUP, factor, w_OI, importance_I, search)

    def codes(self, packed: QuantizedTensor) -> Fp4Codes:
        scale, divisor = packed.parts["weight_scale"], float(packed.parts["weight_global_scale"])
        if scale.dtype != torch.float8_e4m3fn:
            raise SourceError(f"nvfp4: weight_scale is stored as {scale.dtype} where E4M3 is needed; get a sound copy")
        if not 0 < divisor < float("inf"):
            raise SourceError(f"nvfp4: weight_global_scale is {divisor:g}, by which nothing can be divided; get a sound copy")
        return Fp4Codes(unpaired(packed.parts["weight_packed"]), scale, 1 / divisor)

    def stored(self, codes: Codes, shape: tuple[int, int]) -> QuantizedTensor:
        assert isinstance(codes, Fp4Codes)
        divisor = torch.tensor([1 / codes.factor], device=codes.codes_OI.device)
        parts = {"weight_packed": pairs(codes.codes_OI), "weight_scale": codes.scale_OG, "weight_global_scale": divisor}
        return QuantizedTensor(self, shape, parts)

    def dequantize(self, packed: QuantizedTensor) -> Tensor:
        return values(self.codes(packed))


@dataclass(frozen=True, kw_only=True)
class Beside(NVFP4):
    """NVFP4 for layers that share their divisor; what is stored is plain NVFP4."""

    largest: float  # weight of all of them

    def fit(self, w_OI: Tensor, importance_I: Tensor | None = None, *, search: bool = True) -> Fp4Grid:
        return self._fit(self.largest, w_OI, importance_I, search)


EXPORT = NVFP4
