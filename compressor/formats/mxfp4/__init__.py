"""MXFP4: E2M1 numbers, and a power of two for every 32 input channels.

Bytes, for a weight [O, I]:

    weight_packed  uint8 [O, I / 2]    two codes to a byte, the even column in the low bits
    weight_scale   uint8 [O, I / 32]   E8M0: the power of two, plus 127

    w[o, i] = e2m1(code[o, i]) * 2 ** (scale[o, i // 32] - 127)

This is `mxfp4-pack-quantized` of compressed-tensors, byte for byte.

Shape suffixes: O out_features, I in_features.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from compressor.codes import Codes, Fp4Codes, values
from compressor.formats._fp4_grid import E8M0, Fp4Grid, fitted, pairs, unpaired
from compressor.formats._int_grid import groups
from compressor.registry import node
from compressor.types import PartSpec, QuantizedTensor

GROUP = 32


@node
class MXFP4:
    """4-bit floating-point numbers with a power of two per 32 input channels: the OCP Microscaling format."""

    part_names: ClassVar[tuple[str, ...]] = ("weight_packed", "weight_scale")

    @property
    def label(self) -> str:
        return "mxfp4"

    def checkpoint_parts(self, shape: tuple[int, int]) -> Mapping[str, PartSpec]:
        rows, count = shape[0], groups(shape[1], GROUP)
        return {"weight_packed": (torch.uint8, (rows, shape[1] // 2)), "weight_scale": (torch.uint8, (rows, count))}

    def stored_bits(self, shape: tuple[int, int]) -> int:
        return sum(8 * torch.Size(size).numel() for _, size in self.checkpoint_parts(shape).values())

    def compressed_tensors(self) -> dict[str, Any] | None:
        weights = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": GROUP}
        return {"format": "mxfp4-pack-quantized", "weights": {**weights, "dynamic": False, "scale_dtype": "torch.uint8"}}

    def fit(self, w_OI: Tensor, importance_I: Tensor | None = None, *, search: bool = True) -> Fp4Grid:
        return fitted(self, E8M0(), GROUP, 1.0, w_OI, importance_I, search)

    def codes(self, packed: QuantizedTensor) -> Fp4Codes:
        scale = packed.parts["weight_scale"].view(torch.float8_e8m0fnu)
        return Fp4Codes(unpaired(packed.parts["weight_packed"]), scale)

    def stored(self, codes: Codes, shape: tuple[int, int]) -> QuantizedTensor:
        assert isinstance(codes, Fp4Codes)
        scale = codes.scale_OG.view(torch.uint8)
        return QuantizedTensor(self, shape, {"weight_packed": pairs(codes.codes_OI), "weight_scale": scale})

    def dequantize(self, packed: QuantizedTensor) -> Tensor:
        return values(self.codes(packed))


EXPORT = MXFP4
