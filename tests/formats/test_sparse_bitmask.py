"""Sparse weights: how many stay, and the bytes."""

import numpy as np
import pytest
import torch
from torch import Tensor

from compressor.errors import SourceError
from compressor.formats.base import QuantizedTensor
from compressor.formats.numerics.codes import values
from compressor.formats.sparse_bitmask import SparseBitmask, lowest

SHAPES = [(6, 16), (5, 131), (16, 300)]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def drawn(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def packed(fmt: SparseBitmask, w_OI: Tensor) -> QuantizedTensor:
    grid = fmt.fit(w_OI)
    return grid.pack(grid.round(w_OI, 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparsity", [0, 0.3, 0.5, 0.8])
def test_what_stays_comes_back_bit_for_bit_and_takes_what_was_said(
    sparsity: float, shape: tuple[int, int], dtype: str
) -> None:
    w_OI = drawn(*shape).to(DTYPES[dtype])
    fmt = SparseBitmask(sparsity=sparsity, dtype=dtype)
    tensor = packed(fmt, w_OI.float())
    back = tensor.dequantize()
    assert torch.equal(back[back != 0], w_OI.float()[back != 0])
    assert int((back != 0).sum()) == shape[0] * (shape[1] - round(shape[1] * sparsity))
    assert sum(8 * part.nbytes for part in tensor.parts.values()) == fmt.stored_bits(shape)


@pytest.mark.parametrize(("stay", "of"), [(1, 2), (2, 4), (4, 8), (3, 20)])
def test_of_a_pattern_so_many_of_each_group_stay_the_largest(stay: int, of: int) -> None:
    w_OI = drawn(7, 40 * of)
    groups = packed(SparseBitmask(pattern=f"{stay}:{of}", dtype="float32"), w_OI).dequantize().unflatten(1, (-1, of))
    least = w_OI.abs().unflatten(1, (-1, of)).topk(stay).values[..., -1:]
    assert torch.equal(groups != 0, w_OI.abs().unflatten(1, (-1, of)) >= least)


def test_the_bytes_are_those_of_the_layout() -> None:
    """As numpy packs bits, and as compressed-tensors 0.12 says where rows begin."""
    w_OI = drawn(5, 131)
    tensor = packed(SparseBitmask(sparsity=0.6, dtype="float32"), w_OI)
    stays_OI = tensor.dequantize().numpy() != 0
    counts = stays_OI.sum(1)
    assert len(set(counts)) > 1
    assert np.array_equal(tensor.parts["bitmask"].numpy(), np.packbits(stays_OI, axis=1, bitorder="little"))
    assert np.array_equal(tensor.parts["row_offsets"].numpy(), np.cumsum(counts) - counts)
    assert np.array_equal(tensor.parts["compressed"].numpy(), w_OI.numpy()[stays_OI])
    assert tensor.parts["shape"].tolist() == [5, 131]


def test_a_number_that_stays_may_be_zero() -> None:
    fmt = SparseBitmask(pattern="2:4")
    tensor = packed(fmt, torch.zeros(3, 8))
    assert len(tensor.parts["compressed"]) == 12
    again = fmt.stored(fmt.codes(tensor), (3, 8))
    assert all(torch.equal(again.parts[name], part) for name, part in tensor.parts.items())


def test_of_equal_scores_the_first_go_and_no_more_than_asked_for() -> None:
    assert lowest(torch.zeros(2, 5), 3).tolist() == [[True, True, True, False, False]] * 2
    assert not lowest(torch.zeros(2, 5), 0).any()


def test_without_a_pattern_each_run_of_columns_loses_its_part_of_all_rows_together() -> None:
    w_OI = drawn(4, 300) * torch.tensor([[1.0], [2.0], [3.0], [30.0]])
    gone = packed(SparseBitmask(sparsity=0.37, dtype="float32"), w_OI).dequantize() == 0
    assert [int(part.sum()) for part in gone.split(128, dim=1)] == [189, 378 - 189, 444 - 378]  # 4 · 111 · c / 300
    assert int(gone[3].sum()) < int(gone[0].sum())


def test_a_damaged_file_is_told() -> None:
    fmt = SparseBitmask(sparsity=0.5)
    tensor = packed(fmt, drawn(4, 16))
    tensor.parts["bitmask"][0, 0] ^= 1
    with pytest.raises(SourceError, match="numbers, compressed 32; the file is damaged"):
        values(fmt.codes(tensor))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "sparsity: neither is given"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "sparsity: 0.5, and pattern 2:4, are given"),
        ({"sparsity": 1}, "sparsity: 1 is not from 0 up to, without, 1"),
        ({"sparsity": -0.1}, "sparsity: -0.1 is not from 0"),
        ({"sparsity": float("nan")}, "sparsity: nan is not from 0"),
        ({"pattern": "4:4"}, "pattern: 4:4 keeps 4 of 4"),
        ({"pattern": "0:4"}, "pattern: 0:4 keeps 0 of 4"),
        ({"pattern": 124}, "pattern: 124 is not two numbers such as '2:4', in quotes"),
        ({"pattern": "2/4"}, "pattern: 2/4 is not two numbers"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        SparseBitmask(**given)


def test_a_pattern_that_does_not_divide_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="in_features 30 is not a multiple of 4, as pattern 2:4 needs"):
        SparseBitmask(pattern="2:4").stored_bits((8, 30))


@pytest.mark.parametrize("columns", [8, 300])
def test_one_weight_of_a_row_stays_at_least(columns: int) -> None:
    fmt = SparseBitmask(sparsity=0.9999)
    with pytest.raises(ValueError, match=f"in_features {columns} are too few for sparsity 0.9999 to leave one"):
        fmt.stored_bits((4, columns))
    assert fmt.stored_bits((4, 10_000)) > 0
