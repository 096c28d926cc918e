"""Other libraries' products by packed weights, where they are installed: what ours are timed beside.

Each function makes `count` weights [rows, columns], random, and returns a product by each. What it raises is written down in
place of its figures.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Product = Callable[[Tensor], object]
GROUP = 128


def tinygemm(rows: int, columns: int, count: int) -> Sequence[Product]:
    """torch's own, int4 in groups of 128."""
    device = torch.device("cuda")
    packed = torch._convert_weight_to_int4pack(
        torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device=device), 8
    )
    scales = torch.rand(columns // GROUP, rows, 2, device=device).bfloat16()
    weights = [(packed.clone(), scales.clone()) for _ in range(count)]
    return [functools.partial(_tinygemm, *weight) for weight in weights]


def _tinygemm(packed: Tensor, scales: Tensor, x_MK: Tensor) -> Tensor:
    return torch._weight_int4pack_mm(x_MK, packed, GROUP, scales)


def gemlite(rows: int, columns: int, count: int) -> Sequence[Product]:
    """int4 in groups of 128, Triton."""
    from gemlite.core import DType, GemLiteLinear  # type: ignore[import-not-found]

    def layer() -> Any:
        made = GemLiteLinear(
            4, group_size=GROUP, in_features=columns, out_features=rows, input_dtype=DType.BF16, output_dtype=DType.BF16
        )
        codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, device="cuda")
        scales = torch.rand(rows * columns // GROUP, 1, device="cuda").bfloat16() / 100
        made.pack(codes, scales, torch.full_like(scales, 8), None)
        return made

    return [layer() for _ in range(count)]


def humming(rows: int, columns: int, count: int) -> Sequence[Product]:
    """uint4 in groups of 128, bf16 activations."""
    from humming.layer import HummingLayer  # type: ignore[import-not-found]
    from humming.utils.test import random_fill_tensor  # type: ignore[import-not-found]

    def layer() -> Any:
        weight = {"dtype": "uint4", "group_size": GROUP, "scale_dtype": "bfloat16", "has_zero_point": False}
        made = HummingLayer(
            shape_n=rows,
            shape_k=columns,
            weight_config=weight,
            input_config={"dtype": "bfloat16", "group_size": 0},
            torch_dtype=torch.bfloat16,
        ).to("cuda")
        for tensor in made.parameters():
            random_fill_tensor(tensor)
        made.transform()
        made.prepare_default_kernel_configs()
        return made

    return [functools.partial(_humming, layer()) for _ in range(count)]


def _humming(layer: Any, x_MK: Tensor) -> object:
    return layer(inputs=x_MK)


def bitsandbytes(rows: int, columns: int, count: int) -> Sequence[Product]:
    """NF4 in blocks of 64."""
    import bitsandbytes as library  # type: ignore[import-not-found]

    first = library.nn.Linear4bit(columns, rows, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").cuda()
    return [first, *(copy.deepcopy(first) for _ in range(count - 1))]


def marlin(rows: int, columns: int, count: int) -> Sequence[Product]:
    """int4 in groups of 128, of IST-DASLab's package; it takes fp16 activations."""
    import marlin as library  # type: ignore[import-not-found]

    def layer() -> Any:
        made = library.Layer(columns, rows, groupsize=GROUP).cuda()
        made.B.random_(-(2**31), 2**31 - 1)
        made.s.uniform_(0, 0.01)
        return made

    return [functools.partial(_marlin, layer()) for _ in range(count)]


def _marlin(layer: nn.Module, x_MK: Tensor) -> object:
    return layer(x_MK if x_MK.dtype == torch.float16 else x_MK.view(torch.float16))  # time does not depend on the numbers


RIVALS: dict[str, Callable[[int, int, int], Sequence[Product]]] = {
    "tinygemm": tinygemm,
    "gemlite": gemlite,
    "humming": humming,
    "bitsandbytes": bitsandbytes,
    "marlin": marlin,
}
