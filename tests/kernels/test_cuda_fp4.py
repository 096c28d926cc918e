"""The CUDA kernels for E2M1 numbers, run on the CPU: products and dequantised weights against the definition of the codes."""

import ctypes
from pathlib import Path

import parity
import pytest
import simt
import torch
from simt import Launch
from tolerance import TOLERANCE, error

from compressor.codes import FloatCodes, values
from compressor.floats import E2M1
from compressor.kernels.layouts.fp4 import Fp4

pytestmark = simt.needs_gxx

ONE, TWO, FOUR = Launch(1, 1, 8, 4), Launch(2, 2, 4, 2), Launch(4, 1, 2, 1)
TOKENS = ((1, ONE), (7, ONE), (8, ONE), (16, TWO), (33, FOUR), (64, FOUR), (65, TWO))
DECODERS = {"e4m3": "Fp4<E4M3>", "e8m0": "Fp4<E8M0>", "bf16": "Fp4<OF_ROW>"}
SHAPES = ((21, 992), (40, 1024), (16, 96))


@pytest.fixture(scope="module")
def library(libraries: Path) -> simt.Library:
    return simt.build(libraries, ["fp4"], list(DECODERS.values()), [ONE, TWO, FOUR])


def fp4_codes(scale: str, rows: int, columns: int, factor: float) -> FloatCodes:
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    match scale:
        case "e4m3":
            scales = torch.randint(0, 0x7F, (rows, columns // 16), dtype=torch.uint8).view(torch.float8_e4m3fn)
        case "e8m0":
            scales = torch.randint(110, 125, (rows, columns // 32), dtype=torch.uint8).view(torch.float8_e8m0fnu)
        case _:
            scales = torch.rand(rows, 1).bfloat16()
    return FloatCodes(E2M1, codes, scales, factor)


def laid_out(codes: FloatCodes) -> tuple[Fp4, list[torch.Tensor]]:
    layout = Fp4.of(codes)
    assert layout is not None
    return layout, list(layout.arrange(codes).values())


@pytest.mark.parametrize("scale", DECODERS)
def test_a_product_is_the_exact_one_rounded(library: simt.Library, scale: str) -> None:
    torch.manual_seed(0)
    for rows, columns in SHAPES:
        codes = fp4_codes(scale, rows, columns, 0.0137)
        layout, parts = laid_out(codes)
        for tokens, launch in TOKENS:
            x_MK, bias_N = parity.activations(tokens, columns), torch.randn(rows).bfloat16()
            stored = parity.in_stored_order(x_MK, codes, layout.chunk)
            found = library.linear(DECODERS[scale], launch, stored, parts, rows, bias_N=bias_N, seed=tokens)
            assert error(found, parity.product(x_MK, codes, bias_N)) < TOLERANCE, (rows, columns, tokens)


@pytest.mark.parametrize("scale", DECODERS)
@pytest.mark.parametrize("factor", [1.0, 0.0137])
def test_a_dequantised_weight_is_the_definition_rounded(library: simt.Library, scale: str, factor: float) -> None:
    """One step apart at most where the factor is no power of two: scale times factor and factor times number round apart."""
    torch.manual_seed(0)
    for rows, columns in SHAPES:
        codes = fp4_codes(scale, rows, columns, factor)
        layout, parts = laid_out(codes)
        found = library.dequantize(DECODERS[scale], parts, (rows, columns), columns + -columns % layout.chunk)
        assert parity.steps_apart(found, values(codes).bfloat16()) <= int(factor != 1), (rows, columns)


@pytest.mark.parametrize("scale", ["e4m3", "e8m0"])
def test_every_number_meets_every_scale(library: simt.Library, scale: str) -> None:
    """All 16 numbers with all scales that the layout takes, in all places of a tile; below 2^-110 bf16 has no room."""
    group = 16 if scale == "e4m3" else 32
    every = torch.arange(256, dtype=torch.uint8)
    of_byte = every.view(torch.float8_e4m3fn if scale == "e4m3" else torch.float8_e8m0fnu)
    scales = of_byte[(of_byte.float().abs() <= 2**9) & (of_byte.float().abs() >= 2**-110)]
    rows = len(scales)
    codes_OI = (torch.arange(128) + torch.arange(rows)[:, None]).remainder(16).to(torch.uint8)
    bytes_OG = scales.view(torch.uint8)[(torch.arange(rows)[:, None] + 3 * torch.arange(128 // group)) % rows]
    codes = FloatCodes(E2M1, codes_OI, bytes_OG.view(scales.dtype))
    _, parts = laid_out(codes)
    found = library.dequantize(DECODERS[scale], parts, (rows, 128), 128)
    assert parity.steps_apart(found, values(codes).bfloat16()) == 0


def test_every_bit_pattern_decodes_to_the_number_at_its_place(libraries: Path) -> None:
    """All 2^16 halfwords in both halves of a word, as numbers times 2^-126."""
    entry = """
extern "C" void numbers(u32* out) {
  for (u32 half = 0; half < 65536; half++)
    for (int i = 0; i < 4; i++) *out++ = small_e2m1(half | (half * 40503u << 16), i);
}"""
    out = torch.empty(65536, 4, dtype=torch.int32)
    library = ctypes.CDLL(str(simt.compiled(libraries, simt.source(["fp4"]) + entry)))
    library.numbers(ctypes.c_void_p(out.data_ptr()))
    table, half = torch.tensor([*E2M1.magnitudes, *(-value for value in E2M1.magnitudes)]).double(), torch.arange(65536)
    found = out.view(torch.bfloat16).view(65536, 4, 2).double() * 2.0**126
    for i in range(4):
        assert torch.equal(found[:, i, 0], table[half >> 4 * i & 15]), i
        assert torch.equal(found[:, i, 1], table[half * 40503 >> 4 * i & 15]), i


def test_scales_without_room_are_refused() -> None:
    codes = torch.zeros(16, 32, dtype=torch.uint8)
    for byte, taken in ((136, True), (137, False), (255, False)):  # 2^9, 2^10, not a number
        scale = torch.full((16, 1), byte, dtype=torch.uint8).view(torch.float8_e8m0fnu)
        assert (Fp4.of(FloatCodes(E2M1, codes, scale)) is not None) == taken
