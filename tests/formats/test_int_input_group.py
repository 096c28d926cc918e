"""Groups of output channels within one input channel: bytes, sizes, and what they do to outliers."""

import pytest
import torch
from torch import Tensor

from compressor.formats.base import Format
from compressor.formats.int_group import IntGroup
from compressor.formats.int_input_group import IntInputGroup
from compressor.runtime.kernels.layouts import layout_for

SEARCH = pytest.mark.parametrize("search", [True, False])
SYMMETRIC = pytest.mark.parametrize("symmetric", [True, False])


def some_weight(rows: int = 96, columns: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def rounded(fmt: Format, w_OI: Tensor, *, search: bool = True) -> Tensor:
    grid = fmt.fit(w_OI, search=search)
    return grid.pack(grid.round(w_OI, 0)).dequantize()


def bit_stream(codes_I: list[int], bits: int) -> list[int]:
    """Little-endian signed words, by way of one large integer."""
    number = sum(code << (bits * i) for i, code in enumerate(codes_I))
    count = -(-len(codes_I) * bits // 32)
    return [int.from_bytes((number >> 32 * k & 0xFFFFFFFF).to_bytes(4), signed=True) for k in range(count)]


@SYMMETRIC
@pytest.mark.parametrize("bits", range(2, 9))
def test_bytes_are_the_documented_ones(bits: int, symmetric: bool) -> None:
    fmt = IntInputGroup(bits=bits, group_size=4, symmetric=symmetric)
    w_OI = some_weight(8, 37)
    grid = fmt.fit(w_OI)
    codes = grid.round(w_OI, 0)
    packed = grid.pack(codes)
    parts, found = packed.parts, fmt.codes(packed)
    assert parts["weight_packed"].tolist() == [bit_stream(row, bits) for row in codes.tolist()]
    assert (parts["weight_scale"].shape, parts["weight_scale"].dtype) == ((2, 37), torch.bfloat16)
    assert parts["weight_shape"].tolist() == [8, 37]
    if symmetric:
        assert (found.zero == 2 ** (bits - 1)).all()
        assert "weight_zero_point" not in parts
    else:
        assert parts["weight_zero_point"].tolist() == [bit_stream(row, bits) for row in found.zero.tolist()]
    by_hand = torch.tensor(
        [
            [(int(codes[o, i]) - int(found.zero[o // 4, i])) * float(parts["weight_scale"][o // 4, i]) for i in range(37)]
            for o in range(8)
        ]
    )
    assert torch.equal(packed.dequantize(), by_hand)


@SEARCH
@SYMMETRIC
@pytest.mark.parametrize("group_size", [32, 96, -1])
def test_it_is_the_other_grouping_of_the_transpose(group_size: int, symmetric: bool, search: bool) -> None:
    w_OI = some_weight()
    ours = rounded(IntInputGroup(bits=3, group_size=group_size, symmetric=symmetric), w_OI, search=search)
    theirs = rounded(IntGroup(bits=3, group_size=group_size, symmetric=symmetric), w_OI.T.contiguous(), search=search)
    assert torch.equal(ours, theirs.T)


@SEARCH
@SYMMETRIC
def test_an_outlier_channel_leaves_the_others_alone(symmetric: bool, search: bool) -> None:
    """Groups of input channels spoil the outlier's whole group; these change nowhere but in its column."""
    w_OI = some_weight()
    planted = w_OI.clone()
    planted[:, 5] *= 32
    others = torch.arange(64) != 5
    error = {}
    for fmt in (
        IntInputGroup(bits=3, group_size=32, symmetric=symmetric),
        IntGroup(bits=3, group_size=32, symmetric=symmetric),
    ):
        plain, spoilt = (rounded(fmt, w, search=search)[:, others] for w in (w_OI, planted))
        error[type(fmt)] = [float((found - w_OI[:, others]).square().sum()) for found in (plain, spoilt)]
    assert error[IntInputGroup][1] == error[IntInputGroup][0]
    assert error[IntGroup][1] > 4 * error[IntGroup][0]


@SYMMETRIC
def test_it_takes_the_same_space_as_groups_of_input_channels(symmetric: bool) -> None:
    for shape in ((256, 768), (768, 256), (4096, 11008)):
        sizes = [cls(bits=3, group_size=128, symmetric=symmetric).stored_bits(shape) for cls in (IntGroup, IntInputGroup)]
        assert sizes[0] == sizes[1]


def test_the_importance_of_an_input_channel_changes_nothing() -> None:
    w_OI, fmt = some_weight(), IntInputGroup(bits=3, group_size=32)
    codes = [fmt.fit(w_OI, importance).round(w_OI, 0) for importance in (None, torch.rand(64))]
    assert torch.equal(codes[0], codes[1])


@SYMMETRIC
def test_a_column_is_fitted_anew_alone(symmetric: bool) -> None:
    fmt = IntInputGroup(bits=3, group_size=32, symmetric=symmetric)
    w_OI, changed = some_weight(), some_weight()
    changed[:, 7] = 10 * some_weight(96, 1, seed=1)[:, 0]
    grid = fmt.fit(w_OI)
    again = grid.refit(changed[:, 7:8], 7, torch.ones(1), search=True)
    assert torch.equal(again.pack(again.round(changed, 0)).dequantize(), rounded(fmt, changed))
    assert torch.equal(grid.pack(grid.round(w_OI, 0)).dequantize(), rounded(fmt, w_OI))  # is as it was


@pytest.mark.parametrize("group_size", [16, 48, -1])
def test_the_kernels_take_it(group_size: int) -> None:
    fmt, w_OI = IntInputGroup(bits=4, group_size=group_size), some_weight()
    grid = fmt.fit(w_OI)
    codes = fmt.codes(grid.pack(grid.round(w_OI, 0)))
    layout = layout_for(codes)
    assert layout is not None
    assert layout.name == f"int4-rows{0 if group_size == -1 else group_size}-bf16"
    again = layout.restore(layout.arrange(codes), (96, 64))
    assert torch.equal(fmt.stored(again, (96, 64)).dequantize(), rounded(fmt, w_OI))


def test_a_group_size_that_does_not_divide_names_the_numbers_and_a_remedy() -> None:
    with pytest.raises(
        ValueError, match=r"out_features 172 is not a multiple of group_size 128.*divisor such as 86, or -1 .*column"
    ):
        IntInputGroup(group_size=128).stored_bits((172, 16))


@pytest.mark.parametrize("options", [{"bits": 1}, {"bits": 9}, {"group_size": 0}, {"group_size": -2}])
def test_impossible_options_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        IntInputGroup(**options)
