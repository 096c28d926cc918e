"""FP8: E4M3 numbers with one scale for the weight, for each output channel, or for each block of 128 x 128.

Bytes, for a weight [O, I]:

    weight        e4m3  [O, I]
    weight_scale  bf16  [1], [O, 1], or [O / 128, I / 128]
    input_scale   fp32  [1]    scale of the activations, with `activations: fp8-static`

    w[o, i] = weight[o, i] * scale

This is `float-quantized` of compressed-tensors, byte for byte. Scales in fp16 and fp32 can be read too.

Shape suffixes: O out_features, I in_features.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from compressor.formats.base import PartSpec, QuantizedTensor
from compressor.formats.numerics.activations import SCHEMES, Seen
from compressor.formats.numerics.codes import Codes, FloatCodes
from compressor.formats.numerics.float_grid import FloatFit, FloatFormat, FloatGrid, bytes_of
from compressor.formats.numerics.int_grid import groups
from compressor.formats.numerics.minifloat import E4M3, RealScale
from compressor.recipe.registry import node

BLOCK = 128
STRATEGIES: Mapping[str, Mapping[str, Any]] = {
    "tensor": {"strategy": "tensor"},
    "channel": {"strategy": "channel"},
    "block": {"strategy": "block", "block_structure": [BLOCK, BLOCK]},
}


@node
class FP8(FloatFormat):
    """8-bit floating-point numbers, which GPUs since Hopper multiply natively.

    Args:
        scales: Number of scales: one for the tensor, for each output channel, or for each block of 128 x 128.
        activations: Rounding of the layer's input: fp8 has one scale per token, fp8-block one per 128 channels of a token,
            fp8-static one for all, from calibration. null does not round it.
    """

    part_names: ClassVar[tuple[str, ...]] = ("weight", "weight_scale", "input_scale")

    scales: Literal["tensor", "channel", "block"] = "channel"
    activations: Literal["fp8", "fp8-block", "fp8-static"] | None = None

    @property
    def label(self) -> str:
        return f"fp8-{self.scales}" if self.activations is None else f"fp8-{self.scales}-{self.activations}"

    def checkpoint_parts(self, shape: tuple[int, int]) -> Mapping[str, PartSpec]:
        scale: dict[str, tuple[int, ...]] = {"tensor": (1,), "channel": (shape[0], 1)}
        if self.scales == "block":
            scale["block"] = (-(-shape[0] // BLOCK), groups(shape[1], BLOCK))
        parts: dict[str, PartSpec] = {"weight": (torch.float8_e4m3fn, shape)}
        return parts | {"weight_scale": (torch.bfloat16, scale[self.scales])} | self.input_parts()

    def compressed_tensors(self) -> dict[str, Any] | None:
        weights = {"num_bits": 8, "type": "float", "symmetric": True, **STRATEGIES[self.scales], "dynamic": False}
        scheme = {"format": "float-quantized", "weights": weights}
        return scheme if self.activations is None else scheme | {"input_activations": dict(SCHEMES[self.activations])}

    def fit(self, w_OI: Tensor, importance_I: Tensor | None = None, *, search: bool = True) -> FloatGrid:
        return self._fit(None, w_OI, importance_I, search)

    def within(self, largest: float, seen: Seen | None) -> "FP8":
        inputs = seen.peak() / E4M3.largest if seen is not None and self.static_inputs else None
        return Within(scales=self.scales, activations=self.activations, inputs_scale=inputs)

    def _fit(self, inputs: float | None, w_OI: Tensor, importance_I: Tensor | None, search: bool) -> FloatGrid:
        plain, group, rows = FP8(scales=self.scales, activations=self.activations), -1, 1
        if self.scales == "block":
            group, rows = BLOCK, BLOCK
        if self.scales == "tensor":
            rows = -1
        fit = FloatFit(E4M3, RealScale(fine=16), group, rows, inputs=inputs)
        return fit.grid(plain, w_OI, importance_I, search)

    def codes(self, packed: QuantizedTensor) -> FloatCodes:
        scale, (rows, _) = packed.parts["weight_scale"], packed.shape
        shared = {"tensor": rows, "channel": 1, "block": BLOCK}[self.scales]
        codes = bytes_of(packed.parts["weight"], torch.float8_e4m3fn, "fp8: weight")
        return FloatCodes(E4M3, codes, scale.view(-1, 1) if scale.ndim < 2 else scale, 1.0, shared, self.input_number(packed))

    def stored(self, codes: Codes, shape: tuple[int, int]) -> QuantizedTensor:
        assert isinstance(codes, FloatCodes)
        scale = codes.scale.flatten() if self.scales == "tensor" else codes.scale
        parts = {"weight": codes.codes_OI.view(torch.float8_e4m3fn), "weight_scale": scale, **self.stored_inputs(codes)}
        return QuantizedTensor(self, shape, parts)


@dataclass(frozen=True, kw_only=True)
class Within(FP8):
    """`FP8` for layers whose input scale is known from calibration; it is stored as plain `FP8`."""

    inputs_scale: float | None

    def fit(self, w_OI: Tensor, importance_I: Tensor | None = None, *, search: bool = True) -> FloatGrid:
        return self._fit(self.inputs_scale, w_OI, importance_I, search)


EXPORT = FP8
