"""Activations rounded in front of a layer: products with the weights' codes are then products of small numbers.

    int8          each token by a scale of its own, max |x| / 127.5, to -128 … 127 of them
    fp8           each token by max |x| / 448, to E4M3
    fp8-block     the same for every 128 channels of a token
    fp8-static    all by one scale that was found in calibration
    nvfp4         16 channels of a token by an E4M3 scale, max |x| / 6 times a divisor found in calibration, to E2M1
    mxfp4, mxfp8  32 channels of a token by a power of two, to E2M1 or E4M3
    E-token, E-tensor    with E such as e2m1 or e4m3: each token by a scale of its own, or all by one found in calibration

The scale of a token is found when the token comes. The first seven are what compressed-tensors computes for the entries of
`SCHEMES`, bit for bit where x is fp32; all are computed in fp32.

Shape suffixes: T tokens, I in_features.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compressor.formats.numerics.histogram import BINS, Magnitudes
from compressor.formats.numerics.minifloat import E2M1, E4M3, E8M0Scale, Minifloat

HALF_RANGE = 127.5  # of the 256 values of 8 bits
LEAST, MOST = -128, 127
EPSILON = torch.finfo(torch.float32).eps  # the scale of a token of zeros
EIGHTHS = 8  # of a power of two: how finely scales are searched
INPUT_SCALE, INPUT_DIVISOR = "input_scale", "input_global_scale"  # stored beside a weight


class InputRounding(Protocol):
    """Rounds activations with any leading dimensions, in their own dtype."""

    def __call__(self, x_TI: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Seen:
    """Activations that layers were given in calibration, and the cost of errors in them."""

    magnitudes: Magnitudes
    energy_I: Tensor  # sum of squares of the weights of each input channel

    def peak(self) -> float:
        """No activation was larger; 1 if none was seen."""
        return float(self.magnitudes.largest.max()) or 1.0

    @staticmethod
    def nothing() -> "Seen":
        """Return a stand-in for calibration where only the kind of the result matters."""
        return Seen(Magnitudes(torch.zeros(1, BINS, dtype=torch.int64)), torch.zeros(1))

    def best(self, elements: Sequence[Minifloat]) -> tuple[Minifloat, float]:
        """The numbers, and the scale for all channels, that leave the least error of the layers' output."""
        ladders = [(element, scales(element, self.peak())) for element in elements]
        found = [(c, e, scale) for e, of in ladders for c, scale in zip(self.costs(e, of), of, strict=True)]
        _, element, scale = min(found, key=lambda tried: tried[0])
        return element, scale

    def costs(self, element: Minifloat, scales: Sequence[float]) -> list[float]:
        """Mean squared error of the layers' output by scale, as if errors of channels did not know of each other."""
        found: list[float] = (self.magnitudes.missed(element, scales) @ self.energy_I.double()).tolist()
        return found


def scales(element: Minifloat, peak: float, below: int = 0) -> list[float]:
    """Return the scales to try for numbers up to a peak, in eighths of a power of two: from twice what holds it to a 64th
    and, by `below` steps, less.
    """
    return [peak / element.largest * 2 ** (-eighths / EIGHTHS) for eighths in range(-EIGHTHS, 6 * EIGHTHS + 1 + below)]


@dataclass(frozen=True)
class IntTokens:
    """int8."""

    def __call__(self, x_TI: Tensor) -> Tensor:
        x, scale = x_TI.float(), token_scales(x_TI)
        return ((x / scale).round_().clamp_(LEAST, MOST) * scale).to(x_TI.dtype)


round_tokens = IntTokens()


@dataclass(frozen=True)
class FloatTokens:
    """A scale for each token, or for each group of its channels: its largest magnitude becomes the largest number."""

    element: Minifloat
    group: int | None = None

    def __call__(self, x_TI: Tensor) -> Tensor:
        x, scale = self._scaled(x_TI)
        return self.element.round(x).mul_(scale).view(x_TI.shape).to(x_TI.dtype)

    def codes(self, x_TI: Tensor) -> tuple[Tensor, Tensor]:
        """The same as E4M3 codes, float8_e4m3fn, and the scales of tokens, fp32 [T, 1]."""
        assert self.element == E4M3 and self.group is None
        x, scale = self._scaled(x_TI)
        return x.clamp_(-E4M3.largest, E4M3.largest).to(torch.float8_e4m3fn), scale

    def _scaled(self, x_TI: Tensor) -> tuple[Tensor, Tensor]:
        x = x_TI.float() if self.group is None else x_TI.float().unflatten(-1, (-1, self.group))
        scale = x.abs().amax(-1, keepdim=True) / self.element.largest
        scale.masked_fill_(scale == 0, EPSILON)
        return x / scale, scale


@dataclass(frozen=True)
class PowerGroups:
    """A power of two for each 32 channels of a token."""

    element: Minifloat
    group: int = 32

    def __call__(self, x_TI: Tensor) -> Tensor:
        x, kind = x_TI.float().unflatten(-1, (-1, self.group)), E8M0Scale()
        scale = kind.at(kind.ceiling(x.abs().amax(-1, keepdim=True), self.element))
        return self.element.round(x / scale).mul_(scale).view(x_TI.shape).to(x_TI.dtype)


@dataclass(frozen=True)
class TwoLevelGroups:
    """nvfp4: groups whose scale, times the divisor, is too small for E4M3 become zeros."""

    divisor: float
    group: int = 16

    def __call__(self, x_TI: Tensor) -> Tensor:
        x = x_TI.float().unflatten(-1, (-1, self.group))
        wanted = x.abs().amax(-1, keepdim=True) / E2M1.largest * self.divisor
        scale = wanted.clamp_(max=E4M3.largest).to(torch.float8_e4m3fn).float() / self.divisor
        rounded = E2M1.round(x / scale.masked_fill(scale == 0, torch.inf)).mul_(scale)
        return rounded.view(x_TI.shape).to(x_TI.dtype)


@dataclass(frozen=True)
class FixedScale:
    """One scale for all."""

    element: Minifloat
    scale: float

    def __call__(self, x_TI: Tensor) -> Tensor:
        return self.element.round(x_TI.float() / self.scale).mul_(self.scale).to(x_TI.dtype)


_EIGHT: Mapping[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True}
_FOUR: Mapping[str, Any] = {**_EIGHT, "num_bits": 4}
_POWERS = {"strategy": "group", "group_size": 32, "dynamic": True, "scale_dtype": "torch.uint8"}
SCHEMES: Mapping[str, Mapping[str, Any]] = {
    "int8": {**_EIGHT, "type": "int", "strategy": "token", "dynamic": True},
    "fp8": {**_EIGHT, "strategy": "token", "dynamic": True},
    "fp8-block": {**_EIGHT, "strategy": "group", "group_size": 128, "dynamic": True},
    "fp8-static": {**_EIGHT, "strategy": "tensor", "dynamic": False},
    "nvfp4": {
        **_FOUR, "strategy": "tensor_group", "group_size": 16, "dynamic": "local", "scale_dtype": "torch.float8_e4m3fn"
    },
    "mxfp4": {**_FOUR, **_POWERS},
    "mxfp8": {**_EIGHT, **_POWERS},
}  # fmt: skip
"""`input_activations` of compressed-tensors."""

IN_PRODUCTS: Mapping[str, InputRounding] = {"int8": round_tokens, "fp8": FloatTokens(E4M3)}
"""What a kernel may compute by itself, to multiply by the codes."""

_DYNAMIC: Mapping[str, InputRounding] = {
    **IN_PRODUCTS,
    "fp8-block": FloatTokens(E4M3, 128),
    "mxfp4": PowerGroups(E2M1),
    "mxfp8": PowerGroups(E4M3),
}
TOKEN, TENSOR = "-token", "-tensor"
STATIC = {"fp8-static": INPUT_SCALE, "nvfp4": INPUT_DIVISOR}  # and every -tensor: what is stored beside the weight


def static_part(name: str) -> str | None:
    """Return the name of the tensor, [1], that is stored for a way of rounding activations; None if nothing is stored."""
    return INPUT_SCALE if name.endswith(TENSOR) else STATIC.get(name)


def rounding(name: str, part: Callable[[str], Tensor]) -> InputRounding:
    """The way of that name.

    Args:
        name: As above.
        part: Function from the name of a stored tensor to the tensor.
    """
    if name in _DYNAMIC:
        return _DYNAMIC[name]
    if name.endswith(TOKEN):
        return FloatTokens(Minifloat.parse(name.removesuffix(TOKEN)))
    stored = static_part(name)
    assert stored is not None
    number = float(part(stored))
    if name == "nvfp4":
        return TwoLevelGroups(number)
    return FixedScale(E4M3 if name == "fp8-static" else Minifloat.parse(name.removesuffix(TENSOR)), number)


def in_product(how: InputRounding | None) -> str | None:
    """The name of a way that may be left to the product; None for all others."""
    return next((name for name, known in IN_PRODUCTS.items() if known == how), None)


def bits(name: str) -> int:
    """Return the bits of the numbers that activations are rounded to."""
    if name in SCHEMES:
        return int(SCHEMES[name]["num_bits"])
    return Minifloat.parse(name.removesuffix(TENSOR).removesuffix(TOKEN)).bits


def way(fmt: Any) -> str | None:
    """How layers of a format round what they multiply by, if they do; most formats know no such thing."""
    name: str | None = getattr(fmt, "activations", None)
    return name


def input_rounding(fmt: Any, part: Callable[[str], Tensor]) -> InputRounding | None:
    """The same, ready to be used; `part` as of `rounding`."""
    name = way(fmt)
    return None if name is None else rounding(name, part)


def token_scales(x_TI: Tensor) -> Tensor:
    """The scale of each token for int8, fp32 [T, 1]."""
    scale = x_TI.abs().amax(-1, keepdim=True).float() / HALF_RANGE
    return scale.masked_fill_(scale == 0, EPSILON)


def round_inputs(module: nn.Module, layers: Mapping[str, InputRounding]) -> list[RemovableHandle]:
    """Have the named layers inside a module round what they are given, until the handles are removed."""
    return [module.get_submodule(name).register_forward_pre_hook(partial(_rounded, how)) for name, how in layers.items()]


@contextmanager
def rounded_inputs(module: nn.Module, layers: Mapping[str, InputRounding]) -> Iterator[None]:
    """The same while the context is open."""
    handles = round_inputs(module, layers)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rounded(how: InputRounding, module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x = given[0]
    if x.requires_grad:  # the gradient passes as if nothing had been rounded
        return (how(x.detach()) + (x - x.detach()), *given[1:])
    return (how(x), *given[1:])
