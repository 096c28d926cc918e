"""Rounding of activations before a layer, so that a kernel multiplies two small numbers.

    scheme        scale                                                                         rounded to
    int8          one per token, max |x| / 127.5                                                -128 … 127
    fp8           one per token, max |x| / 448                                                  E4M3
    fp8-block     one per 128 channels of a token, max |x| / 448                                E4M3
    fp8-static    one for all, found in calibration                                             E4M3
    nvfp4         E4M3, one per 16 channels of a token: max |x| / 6 times a calibrated divisor  E2M1
    mxfp4, mxfp8  a power of two per 32 channels of a token                                     E2M1, E4M3
    E-token       one per token                                                                 E, such as e2m1 or e4m3
    E-tensor      one for all, found in calibration                                             E

The scale of a token is computed at run time. The first seven schemes are what compressed-tensors computes for the entries of
`SCHEMES`, bit for bit if x is fp32. All schemes compute in fp32.

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

HALF_RANGE = 127.5  # half the range of the 256 values of 8 bits
LEAST, MOST = -128, 127
EPSILON = torch.finfo(torch.float32).eps  # scale of a token of zeros
EIGHTHS = 8  # number of scales that are searched per power of two
INPUT_SCALE, INPUT_DIVISOR = "input_scale", "input_global_scale"  # tensors stored next to a weight


class InputRounding(Protocol):
    """A function that rounds activations with any leading dimensions, and returns them in the same dtype."""

    def __call__(self, x_TI: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Seen:
    """Input statistics of layers that read the same activations, and how much an error in each channel costs."""

    magnitudes: Magnitudes
    energy_I: Tensor  # sum of squares of the weights of each input channel

    def peak(self) -> float:
        """Return an upper bound of the magnitudes of activations; 1 if none was seen."""
        return float(self.magnitudes.largest.max()) or 1.0

    @staticmethod
    def nothing() -> "Seen":
        """Return empty statistics, for when only the type of the resulting format matters."""
        return Seen(Magnitudes(torch.zeros(1, BINS, dtype=torch.int64)), torch.zeros(1))

    def best(self, elements: Sequence[Minifloat]) -> tuple[Minifloat, float]:
        """Return the element type, and the scale for all channels, with the least error of the layers' output."""
        ladders = [(element, scales(element, self.peak())) for element in elements]
        found = [(c, e, scale) for e, of in ladders for c, scale in zip(self.costs(e, of), of, strict=True)]
        _, element, scale = min(found, key=lambda tried: tried[0])
        return element, scale

    def costs(self, element: Minifloat, scales: Sequence[float]) -> list[float]:
        """Estimate the mean squared error of the layers' output for each scale, as if channels' errors were uncorrelated."""
        found: list[float] = (self.magnitudes.missed(element, scales) @ self.energy_I.double()).tolist()
        return found


def scales(element: Minifloat, peak: float, below: int = 0) -> list[float]:
    """List scales to try for numbers up to a peak, in steps of an eighth of a power of two.

    From twice the scale that just holds the peak down to a 64th of it, and `below` more steps.
    """
    return [peak / element.largest * 2 ** (-eighths / EIGHTHS) for eighths in range(-EIGHTHS, 6 * EIGHTHS + 1 + below)]


@dataclass(frozen=True)
class IntTokens:
    """The scheme int8."""

    def __call__(self, x_TI: Tensor) -> Tensor:
        x, scale = x_TI.float(), token_scales(x_TI)
        return ((x / scale).round_().clamp_(LEAST, MOST) * scale).to(x_TI.dtype)


round_tokens = IntTokens()


@dataclass(frozen=True)
class FloatTokens:
    """One scale per token, or per group of its channels, that maps the largest magnitude to the largest number."""

    element: Minifloat
    group: int | None = None

    def __call__(self, x_TI: Tensor) -> Tensor:
        x, scale = self._scaled(x_TI)
        return self.element.round(x).mul_(scale).view(x_TI.shape).to(x_TI.dtype)

    def codes(self, x_TI: Tensor) -> tuple[Tensor, Tensor]:
        """Return E4M3 codes, float8_e4m3fn, and the scales of the tokens, fp32 [T, 1]."""
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
    """A power of two as the scale of each 32 channels of a token: mxfp4 and mxfp8."""

    element: Minifloat
    group: int = 32

    def __call__(self, x_TI: Tensor) -> Tensor:
        x, kind = x_TI.float().unflatten(-1, (-1, self.group)), E8M0Scale()
        scale = kind.at(kind.ceiling(x.abs().amax(-1, keepdim=True), self.element))
        return self.element.round(x / scale).mul_(scale).view(x_TI.shape).to(x_TI.dtype)


@dataclass(frozen=True)
class TwoLevelGroups:
    """The scheme nvfp4. Groups whose scale times the divisor is too small for E4M3 become zeros."""

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
    """One scale for all activations."""

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
"""Schemes that a kernel may compute itself, to multiply codes by codes."""

_DYNAMIC: Mapping[str, InputRounding] = {
    **IN_PRODUCTS,
    "fp8-block": FloatTokens(E4M3, 128),
    "mxfp4": PowerGroups(E2M1),
    "mxfp8": PowerGroups(E4M3),
}
TOKEN, TENSOR = "-token", "-tensor"
STATIC = {"fp8-static": INPUT_SCALE, "nvfp4": INPUT_DIVISOR}  # tensor stored with the weight; every -tensor has one too


def static_part(name: str) -> str | None:
    """Return the name of the tensor, [1], that is stored with a weight for an activation scheme; None if there is none."""
    return INPUT_SCALE if name.endswith(TENSOR) else STATIC.get(name)


def rounding(name: str, part: Callable[[str], Tensor]) -> InputRounding:
    """Return the rounding of an activation scheme.

    Args:
        name: Name of the scheme, see the module docstring.
        part: Function that returns the tensor that is stored with the weight under a name.
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
    """Return the scheme of a rounding that a kernel may compute itself; None for all others."""
    return next((name for name, known in IN_PRODUCTS.items() if known == how), None)


def bits(name: str) -> int:
    """Return the number of bits that a scheme rounds activations to."""
    if name in SCHEMES:
        return int(SCHEMES[name]["num_bits"])
    return Minifloat.parse(name.removesuffix(TENSOR).removesuffix(TOKEN)).bits


def way(fmt: Any) -> str | None:
    """Return the activation scheme of a format; None if its layers do not round their input."""
    name: str | None = getattr(fmt, "activations", None)
    return name


def input_rounding(fmt: Any, part: Callable[[str], Tensor]) -> InputRounding | None:
    """Return the activation rounding of a format, or None; `part` is that of `rounding`."""
    name = way(fmt)
    return None if name is None else rounding(name, part)


def token_scales(x_TI: Tensor) -> Tensor:
    """Return the scale of each token for int8, fp32 [T, 1]."""
    scale = x_TI.abs().amax(-1, keepdim=True).float() / HALF_RANGE
    return scale.masked_fill_(scale == 0, EPSILON)


def round_inputs(module: nn.Module, layers: Mapping[str, InputRounding]) -> list[RemovableHandle]:
    """Make the named layers inside a module round their input, until the handles are removed."""
    return [module.get_submodule(name).register_forward_pre_hook(partial(_rounded, how)) for name, how in layers.items()]


@contextmanager
def rounded_inputs(module: nn.Module, layers: Mapping[str, InputRounding]) -> Iterator[None]:
    """Make the named layers inside a module round their input while the context is open."""
    handles = round_inputs(module, layers)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rounded(how: InputRounding, module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x = given[0]
    if x.requires_grad:  # straight-through estimator: the gradient ignores the rounding
        return (how(x.detach()) + (x - x.detach()), *given[1:])
    return (how(x), *given[1:])
