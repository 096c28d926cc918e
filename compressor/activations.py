"""Activations rounded to 8 bits in front of a layer: each token by a scale of its own, found when the token comes.

    scale = max |x| / 127.5,   x -> clamp(round(x / scale), -128, 127) * scale        ties to even, computed in fp32

It is what compressed-tensors computes for `input_activations` of 8 symmetric bits, `strategy: token`, `dynamic: true`, bit
for bit where x is fp32. Products with the weights' codes are then products of integers: what engines call W8A8 and W4A8.

Shape suffixes: T tokens, I in_features.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

HALF_RANGE = 127.5  # of the 256 values of 8 bits
LEAST, MOST = -128, 127
EPSILON = torch.finfo(torch.float32).eps  # the scale of a token of zeros


def round_tokens(x_TI: Tensor) -> Tensor:
    """x with every token rounded to 256 multiples of its scale; any leading dimensions, in the dtype of x."""
    x, scale = x_TI.float(), token_scales(x_TI)
    return ((x / scale).round_().clamp_(LEAST, MOST) * scale).to(x_TI.dtype)


def token_scales(x_TI: Tensor) -> Tensor:
    """The scale of each token, fp32 [T, 1]."""
    scale = x_TI.abs().amax(-1, keepdim=True).float() / HALF_RANGE
    return scale.masked_fill_(scale == 0, EPSILON)


def rounds_inputs(fmt: Any) -> bool:
    """Whether layers of a format multiply by rounded activations."""
    return getattr(fmt, "activations", None) is not None  # most formats know no such thing


def round_inputs(module: nn.Module, layers: Iterable[str]) -> list[RemovableHandle]:
    """Have the named layers inside a module round what they are given, until the handles are removed."""
    return [module.get_submodule(name).register_forward_pre_hook(_rounded) for name in layers]


@contextmanager
def rounded_inputs(module: nn.Module, layers: Iterable[str]) -> Iterator[None]:
    """The same while the context is open."""
    handles = round_inputs(module, layers)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rounded(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (round_tokens(given[0]), *given[1:])
