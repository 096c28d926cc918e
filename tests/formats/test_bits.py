import pytest
import torch

from compressor.formats.numerics import bitpack


def bit_string(codes: list[int], bits: int) -> list[int]:
    """Independent packing: one Python integer per row, cut into 32-bit words."""
    whole = sum(code << (j * bits) for j, code in enumerate(codes))
    words = [(whole >> (32 * k)) & 0xFFFFFFFF for k in range(-(-len(codes) * bits // 32))]
    return [word - 2**32 if word >= 2**31 else word for word in words]


@pytest.mark.parametrize("n", [1, 7, 31, 32, 33, 100, 172])
@pytest.mark.parametrize("bits", (*range(1, 9), 11, 16, 23, 31))
def test_packing_is_one_little_endian_bit_string_per_row(bits, n):
    codes = torch.randint(2**bits, (3, n), dtype=torch.uint8 if bits <= 8 else torch.int32)
    packed = bitpack.pack(codes, bits)
    assert packed.tolist() == [bit_string(row, bits) for row in codes.tolist()]
    assert packed.shape[-1] == bitpack.words(n, bits)


@pytest.mark.parametrize("n", [1, 7, 31, 32, 33, 100, 172])
@pytest.mark.parametrize("bits", (*range(1, 9), 11, 16, 23, 31))
def test_unpacking_returns_what_was_packed(bits, n):
    codes = torch.randint(2**bits, (2, 3, n), dtype=torch.uint8 if bits <= 8 else torch.int32)
    assert torch.equal(bitpack.unpack(bitpack.pack(codes, bits), bits, n), codes)
