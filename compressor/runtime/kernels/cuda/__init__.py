"""Multiplication by packed weights on NVIDIA GPUs of compute capability 8.0 and later, with bf16 activations.

Kernels are compiled on first use for the device that is there, in a second or two for each layout, and kept on disk.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from compressor.errors import KernelError
from compressor.runtime.kernels.cuda import instances, nvrtc, sources
from compressor.runtime.kernels.cuda.program import Program, load
from compressor.runtime.kernels.layouts import Layout

FUSED_ROWS = 64  # tokens up to which decoding inside the product is expected to win; scripts/gpu/bench measures the switch
OLDEST = (8, 0)  # compute capability: bf16 on the tensor cores


def obstacle(layout: Layout, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot multiply, or None if they can."""
    if device.type != "cuda":
        return f"the activations are on {device}"
    if torch.version.cuda is None:
        return "this torch is not built for NVIDIA's GPUs"
    if dtype != torch.bfloat16:
        return f"the activations are {dtype}; load the model with dtype=torch.bfloat16"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return f"compute capability {capability[0]}.{capability[1]} is below {OLDEST[0]}.{OLDEST[1]}"
    try:
        nvrtc.library()
    except KernelError as error:
        return str(error)
    return None


def about(device: torch.device) -> str:
    """Describe the kernel in a few words."""
    return torch.cuda.get_device_name(device)


def prepare(layout: Layout, device: torch.device, directory: Path = sources.HERE) -> None:
    """Compiles and loads what products by a layout need, as has to be done before a CUDA graph is captured.

    Waits for what the GPU is doing, too: the first product may read weights before the kernel that arranged them has ended.
    """
    _program(layout, device, directory)
    torch.cuda.synchronize(device)


def linear(
    x_MK: Tensor,
    parts: Sequence[Tensor],
    layout: Layout,
    rows: int,
    bias: Tensor | None,
    directory: Path = sources.HERE,
) -> Tensor:
    """x W^T + bias, [M, N].

    Args:
        x_MK: bf16, contiguous, its columns those of whole chunks, in the order in which they are stored.
        parts: As the layout's `arrange` made them. Must have been written before the kernel that runs before this one began.
        layout: Layout of the parts.
        rows: N.
        bias: [N], or None.
        directory: Directory of the CUDA sources.
    """
    tokens, columns = x_MK.shape
    if tokens > FUSED_ROWS:
        w_NK = dequantize(parts, layout, rows, columns, x_MK.dtype, directory)
        return dense_linear(x_MK, w_NK, bias if bias is None else bias.to(x_MK.dtype))
    y_MN = x_MK.new_empty(tokens, rows)
    if y_MN.numel():
        with torch.cuda.device(x_MK.device):
            own = _program(layout, x_MK.device, directory)
            tile = instances.choose(layout, tokens, rows, own.multiprocessors)
            own.linear(x_MK, parts, y_MN, bias if bias is None else bias.to(x_MK.dtype), tile)
    return y_MN


def dequantize(
    parts: Sequence[Tensor],
    layout: Layout,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    directory: Path = sources.HERE,
) -> Tensor:
    """The weight [N, K], rounded to bf16, its columns in the order in which they are stored."""
    device = parts[0].device
    w_NK = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
    if w_NK.numel():
        with torch.cuda.device(device):
            _program(layout, device, directory).dequantize(parts, w_NK)
    return w_NK.to(dtype)


def _program(layout: Layout, device: torch.device, directory: Path) -> Program:
    return load(layout.name, torch.cuda.current_device() if device.index is None else device.index, directory=directory)
