"""The layouts of the kernels: what is arranged comes back, and every code is at the bits that `tile_order` names."""

import dataclasses

import parity
import pytest
import torch
from torch import Tensor

from compressor.formats.numerics.codes import FloatCodes, IntCodes, values
from compressor.formats.numerics.minifloat import E2M1, E4M3, Minifloat
from compressor.runtime.kernels.layouts.floats import Floats
from compressor.runtime.kernels.layouts.input_groups import InputGroups
from compressor.runtime.kernels.layouts.int_groups import IntGroups

BITS = (2, 3, 4, 8)
INT_SHAPES = ((32, 256, 1, 128), (21, 200, 1, 200), (17, 384, 1, 64), (16, 192, 1, 96))  # N, K, a, b
INPUT_SHAPES = ((96, 200, 32, 1), (40, 130, 40, 1), (32, 64, 16, 1))


def code_at(parts: dict[str, Tensor], bits: int, row: int, column: int) -> int:
    """The code of an element, from the bits where it has to be; written from the docstring, apart from the packing."""
    chunk = {2: 128, 3: 128, 4: 64, 8: 32}[bits]
    half, g = divmod(row % 16, 8)
    t, rest = divmod(column % chunk, chunk // 4)
    s, j = divmod(rest, 4)
    i, e = half + 2 * (j // 2), j % 2

    def word(name: str, index: int) -> int:
        of_lane = parts[name][row // 16, column // chunk, 4 * g + t]
        return int.from_bytes(bytes(of_lane[4 * index : 4 * index + 4].tolist()), "little")

    if bits == 8:
        return word("codes", 2 * s + half) >> 8 * j & 255
    if bits == 4:
        return word("codes", s) >> 4 * (i + 4 * e) & 15
    low = word("codes", s // 2) >> 2 * (i + 4 * (s % 2) + 8 * e) & 3
    return low | (word("high", s // 4) >> i + 4 * (s % 4) + 16 * e & 1) << 2 if bits == 3 else low


def assert_in_place(parts: dict[str, Tensor], bits: int, codes_OI: Tensor) -> None:
    for place in torch.randint(codes_OI.numel(), (200,)).tolist():
        row, column = divmod(place, codes_OI.shape[1])
        assert code_at(parts, bits, row, column) == codes_OI[row, column], (row, column)


@pytest.mark.parametrize("bits", (*BITS, 5))
@pytest.mark.parametrize("shape", INT_SHAPES, ids=str)
def test_integers_come_back(bits: int, shape: tuple[int, int, int, int]) -> None:
    torch.manual_seed(bits)
    for dtype in (torch.bfloat16, torch.float16):
        codes = parity.int_codes(bits, *shape, dtype)
        layout = IntGroups.of(codes)
        assert layout is not None
        parts = layout.arrange(codes)
        assert tuple(parts) == layout.parts
        back = layout.restore(parts, shape[:2])
        assert torch.equal(back.codes_OI, codes.codes_OI)
        assert torch.equal(values(back), values(codes))
        assert_in_place(parts, layout.bits, codes.codes_OI)


@pytest.mark.parametrize("bits", (*BITS, 7))
@pytest.mark.parametrize("shape", INPUT_SHAPES, ids=str)
def test_integers_by_groups_of_rows_come_back(bits: int, shape: tuple[int, int, int, int]) -> None:
    torch.manual_seed(bits)
    codes = parity.int_codes(bits, *shape)
    layout = InputGroups.of(codes)
    assert layout is not None
    parts = layout.arrange(codes)
    assert tuple(parts) == layout.parts
    back = layout.restore(parts, shape[:2])
    assert torch.equal(back.codes_OI, codes.codes_OI)
    assert torch.equal(back.scale, codes.scale)
    assert torch.equal(back.zero, codes.zero)
    assert_in_place(parts, layout.bits, codes.codes_OI)


FLOATS = [
    *[(name, dtype, group, 1) for name, dtype, group in (
        ("e2m1", torch.float8_e4m3fn, 16), ("e2m1", torch.float8_e8m0fnu, 32), ("e2m1", torch.bfloat16, 160),
        ("e2m1", torch.bfloat16, 32), ("e1m1", torch.float16, 160), ("e4m3", torch.float8_e8m0fnu, 32),
        ("e4m3", torch.float32, 32), ("e3m2", torch.bfloat16, 16), ("e1m6", torch.bfloat16, 160))],
    ("e4m3", torch.float32, 32, 16), ("e4m3", torch.bfloat16, 160, 21), ("e2m1", torch.bfloat16, 160, 8),
]  # fmt: skip


@pytest.mark.parametrize(("name", "dtype", "group", "rows"), FLOATS)
def test_floating_point_numbers_come_back(name: str, dtype: torch.dtype, group: int, rows: int) -> None:
    torch.manual_seed(0)
    element = Minifloat.parse(name)
    scale = (0.5 + torch.rand(-(-21 // rows), 160 // group)).to(dtype)
    size = torch.randint(0, 2**element.bits, (21, 160), dtype=torch.uint8)
    codes = FloatCodes(element, size, scale, 0.25 if dtype == torch.float8_e4m3fn else 1.0, rows)
    layout = Floats.of(codes)
    assert layout is not None
    parts = layout.arrange(codes)
    assert tuple(parts) == layout.parts
    back = layout.restore(parts, (21, 160))
    assert torch.equal(back.codes_OI, codes.codes_OI)
    assert torch.equal(back.scale[::rows].float(), codes.scale.float())
    torch.testing.assert_close(values(back), values(codes), rtol=0, atol=0, equal_nan=True)
    assert (back.scale.dtype, back.element, back.factor) == (dtype, element, codes.factor)
    if element.bits in (4, 8):
        assert_in_place(parts, element.bits, codes.codes_OI)


@pytest.mark.parametrize(
    ("element", "dtype", "group"),
    [(E2M1, torch.float8_e4m3fn, 16), (E2M1, torch.float8_e8m0fnu, 32), (E4M3, torch.float8_e8m0fnu, 32)],
    ids=str,
)
def test_a_lane_finds_the_scales_of_its_run(element: Minifloat, dtype: torch.dtype, group: int) -> None:
    scale = torch.arange(32 * 128 // group).remainder(120).to(torch.uint8).view(32, -1)
    codes = FloatCodes(element, torch.zeros(32, 128, dtype=torch.uint8), scale.view(dtype))
    layout = Floats.of(codes)
    assert layout is not None
    scales, chunk = layout.arrange(codes)["scales"], {4: 64, 8: 32}[element.bits]
    run = chunk // 4
    for row, column in ((0, 0), (9, 70), (23, 40), (31, 127)):
        lane = 4 * (row % 8) + column % chunk // run
        assert scales[row // 16, column // chunk, lane // (group // run), row % 16 // 8] == scale[row, column // group]


def test_scale_and_zero_point_share_a_word() -> None:
    codes = parity.int_codes(4, 40, 256, 1, 128)
    layout = IntGroups.of(codes)
    assert layout is not None
    word = int(layout.arrange(codes)["scales"][2, 1, 7])
    stored = torch.tensor([word & 0xFFFF, word >> 16]).to(torch.int16).view(torch.bfloat16)
    assert stored[0] == codes.scale[39, 1]
    assert stored[1] == 128 + int(codes.zero[39, 1])


def test_rows_and_columns_beyond_the_weight_add_nothing() -> None:
    codes = parity.int_codes(4, 21, 100, 1, 100)
    layout = IntGroups.of(codes)
    assert layout is not None
    parts = layout.arrange(codes)
    whole = values(layout.restore(parts, (32, 128)))
    assert torch.equal(whole[:21, :100], values(codes))
    assert not whole[21:].any()


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("family", [IntGroups, InputGroups])
def test_the_order_of_columns_is_the_last_part(family: type[IntGroups | InputGroups], ordered: bool) -> None:
    codes = parity.int_codes(4, 32, 64, *((1, 64) if family is IntGroups else (32, 1)))
    codes = dataclasses.replace(codes, order_I=torch.randperm(64) if ordered else None)
    layout = family.of(codes)
    assert layout is not None
    assert layout.ordered == ordered
    parts = layout.arrange(codes)
    assert (layout.parts[-1] == "order") == ordered == ("order" in parts)
    assert torch.equal(values(layout.restore(parts, (32, 64))), values(codes))


@pytest.mark.parametrize(
    "layout",
    [
        IntGroups(4, 128, "bf16"),
        IntGroups(3, 0, "fp16", ordered=True),
        InputGroups(4, 128),
        InputGroups(8, 0, ordered=True),
        Floats(E2M1, "e4m3", 16),
        Floats(E4M3, "e8m0", 32),
        Floats(E4M3, "fp32", 128),
        Floats(Minifloat(3, 0), "bf16", 0),
    ],
)
def test_a_name_says_all_of_a_layout(layout: IntGroups | InputGroups | Floats) -> None:
    found = [family.parse(layout.name) for family in (IntGroups, InputGroups, Floats)]
    assert [one for one in found if one is not None] == [layout]


def test_codes_that_no_lane_could_read_are_refused() -> None:
    assert IntGroups.of(parity.int_codes(4, 32, 64, 1, 8)) is None  # a run of 16 columns in two groups
    assert IntGroups.of(parity.int_codes(4, 32, 64, 32, 1)) is None
    assert InputGroups.of(parity.int_codes(4, 32, 64, 8, 1)) is None  # a tile of 16 rows in two groups
    assert InputGroups.of(parity.int_codes(4, 32, 64, 16, 1, torch.float16)) is None
    assert InputGroups.of(parity.int_codes(4, 32, 64, 1, 64)) is None
    codes = torch.zeros(16, 64, dtype=torch.uint8)
    for element, groups, dtype in (
        (E2M1, 2, torch.float8_e4m3fn),
        (E4M3, 4, torch.float8_e4m3fn),
        (E2M1, 8, torch.bfloat16),
        (E2M1, 4, torch.float32),
        (Minifloat(3, 0), 2, torch.float8_e8m0fnu),
    ):
        assert Floats.of(FloatCodes(element, codes, torch.ones(16, groups).to(dtype))) is None, (element, groups, dtype)
    assert Floats.of(FloatCodes(E2M1, codes, torch.ones(16, 1).bfloat16(), factor=0.5)) is None


def test_nothing_given_is_changed() -> None:
    codes: IntCodes = parity.int_codes(3, 21, 256, 1, 128)
    before = [codes.codes_OI.clone(), codes.scale.clone(), codes.zero.clone()]
    layout = IntGroups.of(codes)
    assert layout is not None
    layout.arrange(codes)
    assert all(torch.equal(a, b) for a, b in zip(before, (codes.codes_OI, codes.scale, codes.zero), strict=True))
