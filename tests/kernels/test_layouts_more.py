"""Layouts of signs, codebook vectors and lossless weights: they give back what they were given, and lie as they say."""

import pytest
import torch
from torch import Tensor

from compressor.formats.numerics.codes import DenseCodes, SignCodes, VectorCodes, values
from compressor.runtime.kernels.layouts.lossless import Lossless
from compressor.runtime.kernels.layouts.signs import Signs
from compressor.runtime.kernels.layouts.vectors import Vectors

SIGNS = {  # rows, columns, columns of a group, planes
    "signs1-g0": (16, 256, 256, 1),
    "signs2-g64": (40, 320, 64, 2),
    "signs3-g128": (33, 384, 128, 3),
    "signs4-g512": (21, 1024, 512, 4),
    "signs2-g0": (33, 300, 300, 2),
}
VECTORS = {  # rows, columns, entries, entries of the residual
    "vectors12": (16, 128, 4096, 0),
    "vectors8+8": (48, 256, 256, 256),
    "vectors9+4": (40, 200, 300, 16),
    "vectors1": (8, 7, 1, 0),
}


def sign_codes(rows: int, columns: int, group: int, planes: int) -> SignCodes:
    negative = torch.randint(0, 2, (planes, rows, columns), dtype=torch.uint8)
    return SignCodes(negative, torch.randn(planes, rows, columns // group).bfloat16())


def vector_codes(rows: int, columns: int, entries: int, residual: int) -> VectorCodes:
    def indices(below: int) -> Tensor:
        return torch.randint(0, below, (rows // 8, columns), dtype=torch.int32)

    codebook = torch.randn(entries, 8).bfloat16()
    if not residual:
        return VectorCodes(indices(entries), codebook)
    return VectorCodes(indices(entries), codebook, indices(residual), torch.randn(residual, 8).bfloat16())


def every_bf16(shape: tuple[int, int]) -> Tensor:
    """All 2^16 patterns in a random order, again from the first where there is room."""
    places = torch.arange(shape[0] * shape[1]).remainder(2**16)
    return torch.randperm(2**16)[places].to(torch.int16).view(torch.bfloat16).view(shape)


def bits(w: Tensor) -> Tensor:
    return w.contiguous().view(torch.int16)


@pytest.mark.parametrize("name", SIGNS)
def test_signs_come_back(name: str) -> None:
    torch.manual_seed(0)
    codes = sign_codes(*SIGNS[name])
    layout = Signs.of(codes)
    assert layout is not None and layout.name == name and Signs.parse(name) == layout
    parts = layout.arrange(codes)
    restored = layout.restore(parts, codes.negative_POI.shape[1:])
    assert tuple(parts) == layout.parts and all(part.is_contiguous() for part in parts.values())
    assert torch.equal(restored.negative_POI, codes.negative_POI) and torch.equal(restored.scale_POG, codes.scale_POG)


def test_groups_of_signs_that_cut_a_chunk_are_divided() -> None:
    torch.manual_seed(0)
    codes = sign_codes(16, 768, 384, 2)
    layout = Signs.of(codes)
    assert layout == Signs(2, 128)
    assert torch.equal(values(layout.restore(layout.arrange(codes), (16, 768))), values(codes))


@pytest.mark.parametrize(("group", "planes"), [(32, 1), (96, 1), (256, 5)])
def test_signs_that_no_kernel_takes(group: int, planes: int) -> None:
    assert Signs.of(sign_codes(16, 768, group, planes)) is None


def test_a_sign_lies_where_the_file_says() -> None:
    """Bit i + 4 (s % 4) + 16 e of word s // 4, from the position in the weight."""
    torch.manual_seed(0)
    codes = sign_codes(32, 512, 256, 2)
    parts = Signs(2, 256).arrange(codes)
    words = parts["negative"].view(torch.int32)
    draws = torch.stack([torch.randint(0, size, (200,)) for size in (32, 512, 2)], 1)
    for row, column, plane in draws.tolist():
        t, within = column % 256 // 64, column % 64
        step, j, half, g = within // 4, within % 4, row % 16 // 8, row % 8
        word = words[row // 16, column // 256, plane, 4 * g + t, step // 4].item()
        bit = word >> half + 2 * (j // 2) + 4 * (step % 4) + 16 * (j % 2) & 1
        assert bit == codes.negative_POI[plane, row, column]
        scale = parts["scales"][row // 16, column // 256, plane, g].item() >> 16 * half & 0xFFFF
        assert scale == bits(codes.scale_POG)[plane, row, column // 256].item() & 0xFFFF


def test_signs_of_two_weights_join_by_rows_and_padded_rows_are_zero() -> None:
    torch.manual_seed(0)
    a, b = sign_codes(32, 320, 64, 2), sign_codes(13, 320, 64, 2)
    layout = Signs(2, 64)
    joined = {name: torch.cat([layout.arrange(a)[name], layout.arrange(b)[name]]) for name in layout.parts}
    found = values(layout.restore(joined, (48, 512)))
    assert torch.equal(found[:45, :320], torch.cat([values(a), values(b)]))
    assert not found[45:].any() and not found[:, 320:].any()


@pytest.mark.parametrize("name", VECTORS)
def test_vectors_come_back(name: str) -> None:
    torch.manual_seed(0)
    rows, columns, entries, _ = VECTORS[name]
    codes = vector_codes(*VECTORS[name])
    layout = Vectors.of(codes)
    assert layout is not None and layout.name == name and Vectors.parse(name) == layout
    parts = layout.arrange(codes)
    restored = layout.restore(parts, (rows, columns))
    assert tuple(parts) == layout.parts and all(part.is_contiguous() for part in parts.values())
    assert layout.shared_bytes == sum(parts[name].nbytes for name in layout.parts[1:])
    assert torch.equal(restored.index_VI, codes.index_VI) and torch.equal(restored.codebook[:entries], codes.codebook)
    assert torch.equal(values(restored), values(codes))


def test_codebooks_beyond_shared_memory_and_words_beyond_16_bits_have_no_layout() -> None:
    assert Vectors.of(vector_codes(8, 8, 4097, 0)) is None
    assert Vectors.of(vector_codes(8, 8, 4096, 17)) is None
    assert Vectors.of(vector_codes(8, 8, 2, 4097)) is None
    assert Vectors.of(vector_codes(8, 8, 4096, 16)) == Vectors(12, 4)


def test_an_index_lies_with_the_lane_that_gives_its_address() -> None:
    torch.manual_seed(0)
    codes = vector_codes(32, 256, 256, 16)
    index = Vectors(8, 4).arrange(codes)["index"]
    assert codes.residual_index_VI is not None
    for vector in range(4):
        for column in range(256):
            t, step, j = column % 128 // 32, column % 32 // 4, column % 4
            word = index[vector // 2, column // 128, 16 * (j // 2) + 8 * (vector % 2) + 2 * t + j % 2, step].item()
            assert word == codes.index_VI[vector, column] + 256 * codes.residual_index_VI[vector, column]


@pytest.mark.parametrize("shape", [(16, 4096), (4096, 16), (331, 198)])
def test_every_bf16_comes_back_bit_for_bit(shape: tuple[int, int]) -> None:
    """NaN, infinities, zeros of both signs and subnormals too, though nearly all of these are escapes."""
    torch.manual_seed(0)
    w_NK = every_bf16(shape)
    layout = Lossless()
    parts = layout.arrange(DenseCodes(w_NK))
    assert tuple(parts) == layout.parts and all(part.is_contiguous() for part in parts.values())
    assert torch.equal(bits(layout.restore(parts, shape).w_OI), bits(w_NK))


def test_the_base_of_a_row_is_that_of_its_most_frequent_exponents() -> None:
    """Of rows of 16 exponents, each base + d twice, and one escape: no escape but that one, which the list names."""
    bases = torch.arange(1, 240)
    exponents = (bases[:, None] + torch.arange(16).repeat(2)) << 7
    stray = torch.where(bases < 120, 255, 0)[:, None] << 7
    w_NK = torch.cat([exponents, stray], 1).to(torch.int16).view(torch.bfloat16)
    parts = Lossless().arrange(DenseCodes(w_NK))
    assert torch.equal(parts["bases"].transpose(1, 2).flatten()[:239].long(), bases)
    assert parts["starts"].tolist() == [*range(239), 239, 239]
    assert parts["escapes"].tolist() == [[32, (255 << 7) if base < 120 else 0] for base in bases.tolist()]


def test_weights_with_many_escapes_have_no_lossless_layout() -> None:
    torch.manual_seed(0)
    w_NK = torch.randn(64, 1000).bfloat16()
    assert Lossless.of(DenseCodes(w_NK)) == Lossless() == Lossless.parse("lossless12")
    w_NK[:, :9] = 0
    assert Lossless.of(DenseCodes(w_NK)) == Lossless()
    w_NK[:, :11] = 0
    assert Lossless.of(DenseCodes(w_NK)) is None


def test_rows_of_any_number_are_counted_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    codes = DenseCodes(torch.randn(37, 100).mul(torch.logspace(-30, 30, 37)[:, None]).bfloat16())
    whole = Lossless().arrange(codes)
    monkeypatch.setattr("compressor.runtime.kernels.layouts.lossless._BLOCK", 250)
    assert all(torch.equal(part, whole[name]) for name, part in Lossless().arrange(codes).items())


def test_a_name_of_another_family_is_none_of_these() -> None:
    assert not any(family.parse("int4-g128-bf16") for family in (Signs, Vectors, Lossless))
