"""Multiplication in plain torch: unpack the weight, call `F.linear`. The definition of what the kernels compute, and slow."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from compressor.formats.numerics.codes import IntCodes, values
from compressor.runtime.kernels.layouts import Layout


def obstacle(layout: Layout, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why it cannot: never."""
    return None


def linear(x_MK: Tensor, parts: Sequence[Tensor], layout: Layout, rows: int, bias: Tensor | None) -> Tensor:
    """x W^T + bias, [M, N], in the dtype of x."""
    return dense_linear(x_MK, dequantize(parts, layout, rows, x_MK.shape[1], x_MK.dtype), bias)


def dequantize(parts: Sequence[Tensor], layout: Layout, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """The weight [N, K], its columns in the order in which they are stored."""
    codes = layout.restore(dict(zip(layout.parts, parts, strict=True)), (rows, columns))
    if isinstance(codes, IntCodes) and codes.order_I is not None:
        codes = replace(codes, order_I=None)
    return values(codes).to(dtype)
