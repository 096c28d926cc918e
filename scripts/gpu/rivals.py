"""Other libraries' products by packed weights, where they are installed: what ours are timed beside.

Each function makes `count` weights [rows, columns], random, and gives a product by each. What it raises is written down in
place of its figures.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Product = Callable[[Tensor], object]
GROUP = 128


class Rival(NamedTuple):
    """Products by several weights, the bytes of one, and what the activations are."""

    products: Sequence[Product]
    nbytes: int
    dtype: torch.dtype = torch.bfloat16


def tinygemm(rows: int, columns: int, count: int) -> Rival:
    """torch's own, int4 in groups of 128."""
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device="cuda")
    packed = torch._convert_weight_to_int4pack(codes, 8)
    scales = torch.rand(columns // GROUP, rows, 2, device="cuda").bfloat16()
    weights = [(packed.clone(), scales.clone()) for _ in range(count)]
    return Rival([functools.partial(_tinygemm, *weight) for weight in weights], packed.nbytes + scales.nbytes)


def _tinygemm(packed: Tensor, scales: Tensor, x_MK: Tensor) -> Tensor:
    return torch._weight_int4pack_mm(x_MK, packed, GROUP, scales)


def gemlite(rows: int, columns: int, count: int) -> Rival:
    """int4 in groups of 128, Triton."""
    from gemlite.helper import A16W4_HQQ_INT  # type: ignore[import-not-found]

    def layer() -> Any:
        codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, device="cuda")
        scales = torch.rand(rows * columns // GROUP, 1, device="cuda").bfloat16() / 100
        return A16W4_HQQ_INT(device="cuda", dtype=torch.bfloat16).from_weights(codes, scales, torch.full_like(scales, 8))

    return _of_layers([layer() for _ in range(count)])


def humming(rows: int, columns: int, count: int) -> Rival:
    """int4 in groups of 128, bf16 activations."""
    from humming.layer import HummingLayer  # type: ignore[import-not-found]

    def layer() -> Any:
        weight = {"dtype": "int4", "group_size": GROUP, "scale_dtype": "bfloat16"}
        made = HummingLayer(shape_n=rows, shape_k=columns, weight_config=weight, torch_dtype=torch.bfloat16).cuda()
        made.load_from_unquantized(torch.randn(rows, columns, dtype=torch.bfloat16, device="cuda"))
        made.transform()
        return made

    return _of_layers([layer() for _ in range(count)])


def bitsandbytes(rows: int, columns: int, count: int) -> Rival:
    """NF4 in blocks of 64."""
    import bitsandbytes as library  # type: ignore[import-not-found]

    def product() -> tuple[Product, int]:
        w_NK = torch.randn(rows, columns, dtype=torch.bfloat16, device="cuda")
        packed, state = library.functional.quantize_4bit(w_NK, blocksize=64, quant_type="nf4")
        return functools.partial(library.matmul_4bit, B=packed.t(), quant_state=state), packed.nbytes + state.absmax.nbytes

    made = [product() for _ in range(count)]
    return Rival([one for one, _ in made], made[0][1])


def marlin(rows: int, columns: int, count: int) -> Rival:
    """int4 in groups of 128, of IST-DASLab's package, for fp16."""
    import marlin as library  # type: ignore[import-not-found]

    def layer() -> Any:
        made = library.Layer(columns, rows, groupsize=GROUP).cuda()
        made.B.copy_(torch.randint(-(2**31), 2**31 - 1, made.B.shape, device="cuda"))
        made.s.copy_(torch.rand(made.s.shape, device="cuda") / 100)
        return made

    return _of_layers([layer() for _ in range(count)], torch.float16)


def _of_layers(layers: Sequence[Any], dtype: torch.dtype = torch.bfloat16) -> Rival:
    """Modules as a rival, whose weight is all of their tensors."""
    tensors = (*layers[0].parameters(), *layers[0].buffers())
    return Rival(layers, sum(tensor.nbytes for tensor in tensors), dtype)


RIVALS: dict[str, Callable[[int, int, int], Rival]] = {
    "tinygemm": tinygemm,
    "humming": humming,
    "bitsandbytes": bitsandbytes,
    "marlin": marlin,
    "gemlite": gemlite,  # the last, as it is compiled for minutes
}
