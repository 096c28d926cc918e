"""The operator that multiplies by a packed weight, so that torch.compile, CUDA graphs and `generate` see one opaque call.

    compressor::packed_linear(Tensor x, Tensor[] parts, Tensor? bias, str layout, int rows, str kernel, str? rounding=None)
        -> Tensor

It is functional and knows no gradient. `parts` are what the layout's `arrange` made, in its order; `kernel` is "auto" or the
name of a backend (`dispatch`); `rounding` is how x is rounded first (`IN_PRODUCTS` of
compressor/formats/numerics/activations.py), by the kernel itself if it can. `torch.library.Library` is used because a call
costs 2.5 µs; `custom_op` takes 9.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from compressor.errors import KernelError
from compressor.formats.numerics.activations import IN_PRODUCTS
from compressor.runtime.kernels.dispatch import choose
from compressor.runtime.kernels.layouts import Layout, named
from compressor.runtime.kernels.layouts.around import Around

_LIBRARY = torch.library.Library("compressor", "DEF")
_LIBRARY.define(
    "packed_linear(Tensor x, Tensor[] parts, Tensor? bias, str layout, int rows, str kernel, str? rounding=None) -> Tensor"
)


def _packed_linear(
    x: Tensor, parts: Sequence[Tensor], bias: Tensor | None, layout: str, rows: int, kernel: str, rounding: str | None = None
) -> Tensor:
    arrangement: Layout = named(layout)
    x_MK, beside_MN = x.reshape(-1, x.shape[-1]), None
    if isinstance(arrangement, Around):
        given = dict(zip(arrangement.parts, parts, strict=True))
        x_MK, beside_MN = arrangement.entering(x_MK, given), arrangement.beside(x_MK, given)
        arrangement = arrangement.inner
        parts = [given[name] for name in arrangement.parts]
    elif getattr(arrangement, "ordered", False):
        x_MK = x_MK[:, parts[-1]]
    missing = -x_MK.shape[1] % arrangement.chunk
    x_MK = pad(x_MK, (0, missing)) if missing else x_MK.contiguous()
    chosen = choose(arrangement.name, x.device, x.dtype, kernel)
    if rounding is not None and rounding not in chosen.rounding:
        x_MK, rounding = IN_PRODUCTS[rounding](x_MK), None
    multiply = chosen.linear if rounding is None else chosen.rounding[rounding]
    y_MN = multiply(x_MK, parts, arrangement, rows, bias)
    if beside_MN is not None:
        y_MN = y_MN + beside_MN
    return y_MN.view(*x.shape[:-1], rows)


def _packed_linear_shape(
    x: Tensor, parts: Sequence[Tensor], bias: Tensor | None, layout: str, rows: int, kernel: str, rounding: str | None = None
) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


def _no_gradient(context: Any, gradient: Tensor) -> None:
    raise KernelError("packed layers know no gradient; load the model with dense=True to train it")


_LIBRARY.impl("packed_linear", _packed_linear, "CompositeExplicitAutograd")
torch.library.register_fake("compressor::packed_linear", _packed_linear_shape)
torch.library.register_autograd("compressor::packed_linear", _no_gradient)

packed_linear = torch.ops.compressor.packed_linear.default
