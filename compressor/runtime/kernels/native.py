"""Multiplication of 8-bit floating-point numbers by the tensor cores as they are, without decoding, through torch.

Weights have one scale per output channel, activations are rounded token by token: both scales come on the sums.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from compressor.formats.numerics.activations import FloatTokens, InputRounding, in_product
from compressor.formats.numerics.codes import Codes, FloatCodes
from compressor.formats.numerics.minifloat import E4M3
from compressor.runtime.kernels import reference
from compressor.runtime.kernels.layouts import Layout
from compressor.runtime.kernels.layouts.fp8_rows import Fp8Rows

OLDEST = (8, 9)  # compute capability of tensor cores that multiply E4M3
WAY = "fp8"  # of rounding activations


def obstacle(layout: Layout, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why it cannot multiply, or None if it can."""
    if not isinstance(layout, Fp8Rows):
        return f"it multiplies FP8 with {WAY} activations only"
    if dtype != torch.bfloat16:
        return f"the activations are {dtype}; load the model with dtype=torch.bfloat16"
    return lacking(device)


def lacking(device: torch.device) -> str | None:
    """Return what a device lacks for it, or None."""
    if device.type != "cuda":
        return f"the activations are on {device}"
    if torch.version.cuda is None:
        return "this torch is not built for NVIDIA's GPUs"
    if not hasattr(functional, "scaled_mm"):
        return "this torch has no `scaled_mm`; install a newer one"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return f"compute capability {capability[0]}.{capability[1]} is below {OLDEST[0]}.{OLDEST[1]}"
    return None


def layout(codes: Codes, rounding: InputRounding | None, device: torch.device) -> Fp8Rows | None:
    """How a weight has to lie to be multiplied natively on a device by activations rounded in a way; None if it cannot."""
    if in_product(rounding) != WAY or not isinstance(codes, FloatCodes) or lacking(device):
        return None
    return Fp8Rows.of(codes)


def about(device: torch.device) -> str:
    """Describe the kernel in a few words."""
    return f"{torch.cuda.get_device_name(device)}, FP8 tensor cores"


def product(x_MK: Tensor, parts: Sequence[Tensor], layout: Layout, rows: int, bias: Tensor | None) -> Tensor:
    """x W^T + bias, [M, N], for x rounded token by token to E4M3.

    Args:
        x_MK: bf16, its columns padded to the layout's.
        parts: Tensors of the layout.
        layout: An `Fp8Rows`.
        rows: N.
        bias: [N], or None.
    """
    codes_NK, scale_N = parts[0].flatten(0, 1).view(torch.float8_e4m3fn), parts[1].flatten()
    codes_MK, scale_M1 = FloatTokens(E4M3).codes(x_MK)
    by_row = functional.ScalingType.RowWise
    y_MN = functional.scaled_mm(codes_MK, codes_NK.T, scale_M1, by_row, scale_N[None], by_row, output_dtype=x_MK.dtype)[
        :, :rows
    ]
    return y_MN.contiguous() if bias is None else y_MN + bias.to(x_MK.dtype)


linear, rounding = reference.linear, {WAY: product}
