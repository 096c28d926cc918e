"""MXFP8: E4M3 numbers, and a power of two for every 32 input channels.

Bytes, for a weight [O, I]:

    weight        e4m3  [O, I]
    weight_scale  uint8 [O, I / 32]   E8M0: the power of two, plus 127

    w[o, i] = weight[o, i] * 2 ** (scale[o, i // 32] - 127)

This is `mxfp8-quantized` of compressed-tensors, byte for byte. Nothing is stored for rounded activations.

Shape suffixes: O out_features, I in_features.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from compressor.formats.base import PartSpec, QuantizedTensor
from compressor.formats.numerics.activations import SCHEMES
from compressor.formats.numerics.codes import Codes, FloatCodes
from compressor.formats.numerics.float_grid import FloatFit, FloatFormat, FloatGrid, bytes_of
from compressor.formats.numerics.int_grid import groups
from compressor.formats.numerics.minifloat import E4M3, E8M0Scale
from compressor.recipe.registry import node

GROUP = 32


@node
class MXFP8(FloatFormat):
    """8-bit floating-point numbers with a power of two per 32 input channels.

    Args:
        activations: Rounding of the layer's input: mxfp8 as for weights; null for none.
    """

    part_names: ClassVar[tuple[str, ...]] = ("weight", "weight_scale")

    activations: Literal["mxfp8"] | None = None

    @property
    def label(self) -> str:
        return "mxfp8" if self.activations is None else f"mxfp8-{self.activations}"

    def checkpoint_parts(self, shape: tuple[int, int]) -> Mapping[str, PartSpec]:
        return {
            "weight": (torch.float8_e4m3fn, shape),
            "weight_scale": (torch.uint8, (shape[0], groups(shape[1], GROUP))),
        }

    def compressed_tensors(self) -> dict[str, Any] | None:
        weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "group", "group_size": GROUP}
        scheme = {"format": "mxfp8-quantized", "weights": {**weights, "dynamic": False, "scale_dtype": "torch.uint8"}}
        return scheme if self.activations is None else scheme | {"input_activations": dict(SCHEMES[self.activations])}

    def fit(self, w_OI: Tensor, importance_I: Tensor | None = None, *, search: bool = True) -> FloatGrid:
        return FloatFit(E4M3, E8M0Scale(), GROUP).grid(self, w_OI, importance_I, search)

    def codes(self, packed: QuantizedTensor) -> FloatCodes:
        scale = packed.parts["weight_scale"].view(torch.float8_e8m0fnu)
        return FloatCodes(E4M3, bytes_of(packed.parts["weight"], torch.float8_e4m3fn, "mxfp8: weight"), scale)

    def stored(self, codes: Codes, shape: tuple[int, int]) -> QuantizedTensor:
        assert isinstance(codes, FloatCodes)
        parts = {"weight": codes.codes_OI.view(torch.float8_e4m3fn), "weight_scale": codes.scale.view(torch.uint8)}
        return QuantizedTensor(self, shape, parts)


EXPORT = MXFP8
