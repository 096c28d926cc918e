"""NVFP4: E2M1 numbers, an E4M3 scale per 16 input channels, and one fp32 number for the whole weight.

Bytes, for a weight [O, I]:

    weight_packed        uint8 [O, I / 2]    two codes to a byte, the even column in the low bits
    weight_scale         e4m3  [O, I / 16]
    weight_global_scale  fp32  [1]           a divisor
    input_global_scale   fp32  [1]           divisor of the activations, with `activations: nvfp4`
    (compressor/formats/numerics/activations.py)

    w[o, i] = e2m1(code[o, i]) * scale[o, i // 16] / global_scale

This is `nvfp4-pack-quantized` of compressed-tensors, byte for byte. The divisor that we choose is a power of two. It leaves
room above the scale of the largest group, so that this scale can be searched too. Layers that engines fuse share one divisor,
because vLLM and SGLang take the largest of them for all.

Shape suffixes: O out_features, I in_features.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import floor, log2
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from compressor.errors import SourceError
from compressor.formats.base import PartSpec, QuantizedTensor
from compressor.formats.numerics.activations import INPUT_DIVISOR, SCHEMES, Seen
from compressor.formats.numerics.codes import Codes, FloatCodes
from compressor.formats.numerics.float_grid import FloatFit, FloatFormat, FloatGrid, bytes_of, pairs, unpaired
from compressor.formats.numerics.int_grid import groups
from compressor.formats.numerics.minifloat import E2M1, E4M3Scale
from compressor.recipe.registry import node

GROUP = 16
POWERS = 120  # largest exponent of a divisor 2^n: beyond it, products with scales do not fit fp32
ROOM = 256.0  # largest scale of a group: E4M3 also holds 3/2 of it, which would put the group's largest weight on 4


@node
class NVFP4(FloatFormat):
    """4-bit floating-point numbers with an 8-bit scale per 16 input channels, which Blackwell GPUs multiply natively.

    Args:
        activations: Rounding of the layer's input: nvfp4 as for weights, fp8 to 8 bits with a scale per token; null for none.
    """

    part_names: ClassVar[tuple[str, ...]] = ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale")

    activations: Literal["nvfp4", "fp8"] | None = None

    @property
    def label(self) -> str:
        return "nvfp4" if self.activations is None else f"nvfp4-{self.activations}"

    def checkpoint_parts(self, shape: tuple[int, int]) -> Mapping[str, PartSpec]:
        rows, count = shape[0], groups(shape[1], GROUP)
        return {
            "weight_packed": (torch.uint8, (rows, shape[1] // 2)),
            "weight_scale": (torch.float8_e4m3fn, (rows, count)),
            "weight_global_scale": (torch.float32, (1,)),
            **self.input_parts(),
        }

    def compressed_tensors(self) -> dict[str, Any] | None:
        weights = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": GROUP}
        weights |= {"dynamic": False, "scale_dtype": "torch.float8_e4m3fn"}
        scheme = {"format": "nvfp4-pack-quantized", "weights": weights}
        return scheme if self.activations is None else scheme | {"input_activations": dict(SCHEMES[self.activations])}

    def fit(self, w_OI: Tensor, importance_I: Tensor | None = None, *, search: bool = True) -> FloatGrid:
        return self._fit(float(w_OI.abs().max()), None, w_OI, importance_I, search)

    def within(self, largest: float, seen: Seen | None) -> "NVFP4":
        divisor = _divisor(seen.peak()) if seen is not None and self.static_inputs else None
        return Within(activations=self.activations, largest=largest, divisor=divisor)

    def _fit(
        self, largest: float, inputs: float | None, w_OI: Tensor, importance_I: Tensor | None, search: bool
    ) -> FloatGrid:
        plain, factor = NVFP4(activations=self.activations), 1 / _divisor(largest)
        fit = FloatFit(E2M1, E4M3Scale(), GROUP, factor=factor, inputs=inputs)
        return fit.grid(plain, w_OI, importance_I, search)

    def codes(self, packed: QuantizedTensor) -> FloatCodes:
        scale, divisor, inputs = (
            packed.parts["weight_scale"],
            float(packed.parts["weight_global_scale"]),
            self.input_number(packed),
        )
        bytes_of(scale, torch.float8_e4m3fn, "nvfp4: weight_scale")
        for name, number in (("weight_global_scale", divisor), (INPUT_DIVISOR, 1.0 if inputs is None else inputs)):
            if not 0 < number < float("inf"):
                raise SourceError(f"nvfp4: {name} is {number:g}, by which nothing can be divided; get a sound copy")
        return FloatCodes(E2M1, unpaired(packed.parts["weight_packed"]), scale, 1 / divisor, inputs=inputs)

    def stored(self, codes: Codes, shape: tuple[int, int]) -> QuantizedTensor:
        assert isinstance(codes, FloatCodes)
        divisor = torch.tensor([1 / codes.factor], device=codes.codes_OI.device)
        parts = {"weight_packed": pairs(codes.codes_OI), "weight_scale": codes.scale, "weight_global_scale": divisor}
        return QuantizedTensor(self, shape, parts | self.stored_inputs(codes))


@dataclass(frozen=True, kw_only=True)
class Within(NVFP4):
    """`NVFP4` for layers that share their divisor and whose input is known; it is stored as plain `NVFP4`."""

    largest: float  # largest magnitude among the weights of all these layers
    divisor: float | None  # divisor of the activations

    def fit(self, w_OI: Tensor, importance_I: Tensor | None = None, *, search: bool = True) -> FloatGrid:
        return self._fit(self.largest, self.divisor, w_OI, importance_I, search)


def _divisor(largest: float) -> float:
    """Return the power of two that gives the group with the largest number a scale in (ROOM / 2, ROOM]."""
    power = floor(log2(ROOM) + log2(E2M1.largest) - log2(largest or 1.0))
    return float(2.0 ** max(-POWERS, min(power, POWERS)))


EXPORT = NVFP4
