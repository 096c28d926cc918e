"""Kernels for the CPU: C, compiled with the package into a plain library, which ctypes calls.

Weights are multiplied as they lie for CUDA. Activations are rounded to 8 bits, symmetrically and to the nearest, per token
and 32 columns (fewer where a group is smaller): a relative error of 0.5 % where they are Gaussian, below 1 % where they have
outliers. The products are then exact integers, which are scaled and summed in fp32. There is no number of tokens from which
on a dense weight would be faster: with AVX-512 VNNI, and up to 2048 tokens, this outruns `F.linear` in bf16.

Shape suffixes: M tokens, N out_features, K in_features, padded to whole chunks.
"""

import ctypes
import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.errors import KernelError
from compressor.formats.numerics.activations import token_scales
from compressor.runtime.kernels.layouts import Layout
from compressor.runtime.kernels.layouts.int_groups import IntGroups

ISAS = ("portable", "avx2", "avx_vnni", "avx512_vnni", "amx")  # from slow to fast, numbered as in linear.c
AMX_TOKENS = 8  # below, AMX would multiply mostly by tokens that are not there
_INT: Any = ctypes.c_int
_POINTER: Any = ctypes.c_void_p


@dataclass(frozen=True)
class Library:
    """The compiled kernels.

    Args:
        functions: `compressor_linear` and `compressor_dequantize` of linear.c.
        isas: The instruction sets that this machine has, from slow to fast.
    """

    functions: ctypes.CDLL
    isas: tuple[str, ...]

    @staticmethod
    def open(path: Path) -> "Library":
        """The library in a file."""
        functions = ctypes.CDLL(str(path))
        weight: list[Any] = [_INT] * 6 + [_POINTER] * 3
        functions.compressor_linear.argtypes = weight + [_POINTER] * 4 + [_INT] * 3
        functions.compressor_dequantize.argtypes = weight + [_POINTER] + [_INT] * 3
        functions.compressor_dequantize.restype = None
        bits = functions.compressor_isas()
        return Library(functions, tuple(name for number, name in enumerate(ISAS) if bits >> number & 1))

    def number(self, isa: str | None, few: bool) -> int:
        """Return the number of an instruction set, or of the fastest: for few tokens that is not AMX.

        Raises:
            KernelError: the machine does not have it.
        """
        if isa is None:
            isa = self.isas[-2 if few and self.isas[-1] == "amx" else -1]
        if isa not in self.isas:
            raise KernelError(f"kernels: this machine has no instruction set `{isa}`; it has {', '.join(self.isas)}")
        return ISAS.index(isa)


@functools.cache
def library() -> Library | None:
    """The library that the package was built with, if it was."""
    found = importlib.util.find_spec(f"{__name__}._kernels")
    return Library.open(Path(found.origin)) if found and found.origin else None


def obstacle(layout: Layout, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot multiply by a layout, or None if they can."""
    if not isinstance(layout, IntGroups):
        return "no kernel for this layout"
    if dtype not in (torch.bfloat16, torch.float32, torch.float16):
        return f"the activations are {dtype}, not of 16 or 32 bits"
    if library() is None:
        return "the package was built without a C compiler; install one, and the package again"
    return None


def about(device: torch.device) -> str:
    """Describe the kernel in a few words."""
    return f"{_built().isas[-1]}, activations rounded to 8 bits"


def linear(
    x_MK: Tensor,
    parts: Sequence[Tensor],
    layout: Layout,
    rows: int,
    bias: Tensor | None,
    isa: str | None = None,
    scale_M1: Tensor | None = None,
) -> Tensor:
    """x W^T + bias, [M, N], in the dtype of x.

    Args:
        x_MK: Activations, bf16, fp32, or fp16, for which fp32 stands in.
        parts: Tensors of the layout.
        layout: An `IntGroups`.
        rows: N.
        bias: [N], or None.
        isa: The instruction set, one of `ISAS`; None for the fastest.
        scale_M1: fp32, what each token is rounded to multiples of; None rounds by 32 columns as above.
    """
    if x_MK.dtype == torch.float16:
        return linear(x_MK.float(), parts, layout, rows, bias, isa, scale_M1).half()
    tokens, columns = x_MK.shape
    x_MK, kernels = x_MK.contiguous(), _built()
    bias = None if bias is None else bias.to(x_MK.dtype)
    y_MN = x_MK.new_empty(tokens, rows)
    failed = kernels.functions.compressor_linear(
        kernels.number(isa, tokens < AMX_TOKENS),
        *_weight(parts, layout, rows, columns),
        x_MK.data_ptr(),
        None if scale_M1 is None else scale_M1.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y_MN.data_ptr(),
        tokens,
        x_MK.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"no memory for {tokens} x {columns} activations")
    return y_MN


def product_of_tokens(x_MK: Tensor, parts: Sequence[Tensor], layout: Layout, rows: int, bias: Tensor | None) -> Tensor:
    """The same for x rounded token by token: its codes are multiplied as they are, and nothing is rounded twice."""
    return linear(x_MK, parts, layout, rows, bias, scale_M1=token_scales(x_MK))


rounding = {"int8": product_of_tokens}


def dequantize(
    parts: Sequence[Tensor], layout: Layout, rows: int, columns: int, dtype: torch.dtype, isa: str | None = None
) -> Tensor:
    """The weight [N, K], its columns in the order in which they are stored."""
    kernels = _built()
    made = dtype if dtype in (torch.bfloat16, torch.float32) else torch.float32
    w_NK = torch.empty(rows, columns, dtype=made)
    kernels.functions.compressor_dequantize(
        kernels.number(isa, True),
        *_weight(parts, layout, rows, -(-columns // layout.chunk) * layout.chunk),
        w_NK.data_ptr(),
        columns,
        made == torch.bfloat16,
        torch.get_num_threads(),
    )
    return w_NK.to(dtype)


def _built() -> Library:
    found = library()
    if found is None:
        raise KernelError("kernels: the package was built without a C compiler; install one, and the package again")
    return found


def _weight(parts: Sequence[Tensor], layout: Layout, rows: int, columns: int) -> tuple[int | None, ...]:
    """Return the description of a weight that the C functions take."""
    assert isinstance(layout, IntGroups)
    has_high = layout.bits == 3
    return (
        layout.bits,
        layout.group,
        layout.scale == "fp16",
        rows,
        columns,
        parts[0].data_ptr(),
        parts[1].data_ptr() if has_high else None,
        parts[1 + has_high].data_ptr(),
    )
