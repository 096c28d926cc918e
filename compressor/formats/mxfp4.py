"""MXFP4: E2M1 numbers, and a power of two for every 32 input channels.

Bytes, for a weight [O, I]:

    weight_packed  uint8 [O, I / 2]    two codes to a byte, the even column in the low bits
    weight_scale   uint8 [O, I / 32]   E8M0: the power of two, plus 127

    w[o, i] = e2m1(code[o, i]) * 2 ** (scale[o, i // 32] - 127)

This is `mxfp4-pack-quantized` of compressed-tensors, byte for byte. Nothing is stored for rounded activations.

Shape suffixes: O out_features, I in_features.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from compressor.formats.base import PartSpec, QuantizedTensor
from compressor.formats.numerics.activations import SCHEMES
from compressor.formats.numerics.codes import Codes, FloatCodes
from compressor.formats.numerics.float_grid import FloatFit, FloatFormat, FloatGrid, pairs, unpaired
from compressor.formats.numerics.int_grid import groups
from compressor.formats.numerics.minifloat import E2M1, E8M0Scale
from compressor.recipe.registry import node

GROUP = 32


@node
class MXFP4(FloatFormat):
    """4-bit floating-point numbers with a power of two per 32 input channels: the OCP Microscaling format.

    Args:
        activations: Rounding of the layer's input: mxfp4 as for weights, mxfp8 to 8 bits; null for none.
    """

    part_names: ClassVar[tuple[str, ...]] = ("weight_packed", "weight_scale")

    activations: Literal["mxfp4", "mxfp8"] | None = None

    @property
    def label(self) -> str:
        return "mxfp4" if self.activations is None else f"mxfp4-{self.activations}"

    def checkpoint_parts(self, shape: tuple[int, int]) -> Mapping[str, PartSpec]:
        rows, count = shape[0], groups(shape[1], GROUP)
        return {"weight_packed": (torch.uint8, (rows, shape[1] // 2)), "weight_scale": (torch.uint8, (rows, count))}

    def compressed_tensors(self) -> dict[str, Any] | None:
        weights = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": GROUP}
        scheme = {"format": "mxfp4-pack-quantized", "weights": {**weights, "dynamic": False, "scale_dtype": "torch.uint8"}}
        return scheme if self.activations is None else scheme | {"input_activations": dict(SCHEMES[self.activations])}

    def fit(self, w_OI: Tensor, importance_I: Tensor | None = None, *, search: bool = True) -> FloatGrid:
        return FloatFit(E2M1, E8M0Scale(), GROUP).grid(self, w_OI, importance_I, search)

    def codes(self, packed: QuantizedTensor) -> FloatCodes:
        scale = packed.parts["weight_scale"].view(torch.float8_e8m0fnu)
        return FloatCodes(E2M1, unpaired(packed.parts["weight_packed"]), scale)

    def stored(self, codes: Codes, shape: tuple[int, int]) -> QuantizedTensor:
        assert isinstance(codes, FloatCodes)
        scale = codes.scale.view(torch.uint8)
        return QuantizedTensor(self, shape, {"weight_packed": pairs(codes.codes_OI), "weight_scale": scale})


EXPORT = MXFP4
