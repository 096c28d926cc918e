"""LLM-FP4: floating-point numbers of 3 to 8 bits, any split into exponent and mantissa, with a real scale per group.

Bytes, for a weight [O, I] with G = I / group_size groups in a row:

    weight_packed  int32 [O, ceil(I * bits / 32)]   codes, LSB-first bit stream along the input channels
    weight_scale   bf16  [O, G]
    input_scale    fp32  [1]    scale of the activations, with activations `…-tensor`

    w[o, i] = number(code[o, i]) * scale[o, i // group_size]

The logarithm of a scale is what LLM-FP4 calls a real-valued exponent bias. Only our own layout holds this format. The GPU
kernels support groups of whole rows, 16, 32 or multiples of 64 channels (from 5 bits on: 8, 16 or multiples of 32).

Source: Liu et al., "LLM-FP4: 4-Bit Floating-Point Quantized Transformers", EMNLP 2023.

Shape suffixes: O out_features, I in_features, G groups in a row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from compressor.formats.base import PartSpec, QuantizedTensor
from compressor.formats.numerics import bitpack
from compressor.formats.numerics.activations import TENSOR, TOKEN, Seen
from compressor.formats.numerics.codes import Codes, FloatCodes
from compressor.formats.numerics.float_grid import FloatFit, FloatFormat, FloatGrid
from compressor.formats.numerics.int_grid import groups
from compressor.formats.numerics.minifloat import Minifloat, RealScale
from compressor.recipe.registry import node

SEARCHED = {
    "fp4": tuple(Minifloat.parse(name) for name in ("e2m1", "e1m2", "e3m0")),
    "fp8": tuple(Minifloat.parse(name) for name in ("e4m3", "e3m4", "e2m5", "e5m2")),
}  # the element types that are tried for activations


@node
class FloatGroup(FloatFormat):
    """Floating-point numbers with a bf16 scale per group of adjacent input channels.

    Args:
        exponent: Bits of the exponent, 1 to 7.
        mantissa: Bits of the mantissa; 3 to 8 together with sign and exponent.
        group_size: Number of adjacent input channels that share a scale; -1 for the whole row.
        activations: Element type that the layer's input is rounded to, such as e2m1 or e4m3, followed by -token (one scale
            per token) or -tensor (one scale for all, from calibration, searched for the least error). fp4-tensor and
            fp8-tensor search the element type too. null does not round the input.
    """

    part_names: ClassVar[tuple[str, ...]] = ("weight_packed", "weight_scale", "input_scale")

    exponent: int = 2
    mantissa: int = 1
    group_size: int = -1
    activations: str | None = None

    def __post_init__(self) -> None:
        _ = self.element
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(f"group_size: {self.group_size} is neither -1 (the whole row) nor a positive number")
        if self.activations is not None:
            name = self.activations.removesuffix(TENSOR).removesuffix(TOKEN)
            if name == self.activations:
                raise ValueError(f"activations: {name} says not by which scale; add {TOKEN} or {TENSOR}")
            if not (name in SEARCHED and self.activations.endswith(TENSOR)):
                Minifloat.parse(name)

    @property
    def element(self) -> Minifloat:
        """Element type of the weights. Raises ValueError if there is no such type."""
        return Minifloat.parse(f"e{self.exponent}m{self.mantissa}")

    @property
    def input_elements(self) -> tuple[Minifloat, ...]:
        """Element types that activations may be rounded to."""
        name = (self.activations or "").removesuffix(TENSOR).removesuffix(TOKEN)
        return SEARCHED[name] if name in SEARCHED else (Minifloat.parse(name),) if name else ()

    @property
    def label(self) -> str:
        group = "" if self.group_size == -1 else f"g{self.group_size}"
        return f"{self.element.name}{group}" + ("" if self.activations is None else f"-{self.activations}")

    def checkpoint_parts(self, shape: tuple[int, int]) -> Mapping[str, PartSpec]:
        rows, columns = shape
        packed: PartSpec = (torch.int32, (rows, bitpack.words(columns, self.element.bits)))
        scale: PartSpec = (torch.bfloat16, (rows, groups(columns, self.group_size)))
        return {"weight_packed": packed, "weight_scale": scale, **self.input_parts()}

    def compressed_tensors(self) -> dict[str, Any] | None:
        return None

    def fit(self, w_OI: Tensor, importance_I: Tensor | None = None, *, search: bool = True) -> FloatGrid:
        return FloatFit(self.element, RealScale(), self.group_size).grid(self, w_OI, importance_I, search)

    def within(self, largest: float, seen: Seen | None) -> "FloatGroup":
        if not self.static_inputs or seen is None:
            return self
        element, scale = seen.best(self.input_elements)
        return Within(
            exponent=self.exponent,
            mantissa=self.mantissa,
            group_size=self.group_size,
            activations=f"{element.name}{TENSOR}",
            inputs_scale=scale,
        )

    def _plain(self) -> "FloatGroup":
        return FloatGroup(
            exponent=self.exponent, mantissa=self.mantissa, group_size=self.group_size, activations=self.activations
        )

    def codes(self, packed: QuantizedTensor) -> FloatCodes:
        codes = bitpack.unpack(packed.parts["weight_packed"], self.element.bits, packed.shape[1])
        return FloatCodes(self.element, codes, packed.parts["weight_scale"], inputs=self.input_number(packed))

    def stored(self, codes: Codes, shape: tuple[int, int]) -> QuantizedTensor:
        assert isinstance(codes, FloatCodes)
        parts = {"weight_packed": bitpack.pack(codes.codes_OI, self.element.bits), "weight_scale": codes.scale}
        return QuantizedTensor(self, shape, parts | self.stored_inputs(codes))


@dataclass(frozen=True, kw_only=True)
class Within(FloatGroup):
    """`FloatGroup` for layers whose input scale is known from calibration; it is stored as plain `FloatGroup`."""

    inputs_scale: float

    def fit(self, w_OI: Tensor, importance_I: Tensor | None = None, *, search: bool = True) -> FloatGrid:
        fit = FloatFit(self.element, RealScale(), self.group_size, inputs=self.inputs_scale)
        return fit.grid(self._plain(), w_OI, importance_I, search)


EXPORT = FloatGroup
