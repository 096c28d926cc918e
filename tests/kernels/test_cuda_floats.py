"""The CUDA kernels for floating-point numbers, run on the CPU: products and weights against the codes' definition."""

import ctypes
from pathlib import Path
from typing import NamedTuple

import parity
import pytest
import simt
import torch
from simt import Launch
from tolerance import TOLERANCE, error

from compressor.formats.numerics.codes import FloatCodes, values
from compressor.formats.numerics.minifloat import E2M1, E4M3, Minifloat
from compressor.runtime.kernels.cuda import instances
from compressor.runtime.kernels.layouts.floats import Floats

pytestmark = simt.needs_gxx

ONE, TWO, FOUR = Launch(1, 1, 8, 4), Launch(2, 2, 4, 2), Launch(4, 1, 2, 1)
TOKENS = ((1, ONE), (7, ONE), (8, ONE), (16, TWO), (33, FOUR), (64, FOUR), (65, TWO))
SHAPES = ((21, 992), (40, 1024), (16, 96))


class Kind(NamedTuple):
    """Of numbers, and how they share scales: by `group` columns (0: all) and `rows` rows."""

    element: Minifloat
    scale: torch.dtype
    group: int
    rows: int = 1
    factor: float = 1.0

    def codes(self, rows: int, columns: int) -> FloatCodes:
        size = torch.randint(0, len(self.element.magnitudes), (rows, columns), dtype=torch.uint8)
        codes = size + torch.randint(0, 2, size.shape, dtype=torch.uint8) * self.element.sign
        shape = (-(-rows // self.rows), columns // self.group if self.group else 1)
        if self.scale == torch.float8_e4m3fn:
            scale = torch.randint(0, 0x7F, shape, dtype=torch.uint8).view(self.scale)
        elif self.scale == torch.float8_e8m0fnu:
            scale = torch.randint(110, 125, shape, dtype=torch.uint8).view(self.scale)
        else:
            scale = torch.rand(shape).to(self.scale)
        return FloatCodes(self.element, codes, scale, self.factor, self.rows)


E4M3_BYTES, E8M0_BYTES = torch.float8_e4m3fn, torch.float8_e8m0fnu
BYTES = {
    "nvfp4": Kind(E2M1, E4M3_BYTES, 16, 1, 0.0137),
    "mxfp4": Kind(E2M1, E8M0_BYTES, 32),
    "mxfp8": Kind(E4M3, E8M0_BYTES, 32),
}
KINDS = BYTES | {
    "e2m1 rows": Kind(E2M1, torch.bfloat16, 0),
    "e3m0 rows in fp16": Kind(Minifloat(3, 0), torch.float16, 0),
    "e1m2 in groups of 32": Kind(Minifloat(1, 2), torch.bfloat16, 32),
    "e1m1 in groups of 16": Kind(Minifloat(1, 1), torch.bfloat16, 16),
    "e4m3 in blocks": Kind(E4M3, torch.float32, 32, 8),
    "e5m2 rows": Kind(Minifloat.parse("e5m2"), torch.bfloat16, 0),
    "e2m3 in groups of 16": Kind(Minifloat(2, 3), torch.bfloat16, 16),
}
EVERY = [Minifloat(e, m) for e in range(1, 8) for m in range(8 - e) if e + m >= 2]


def laid_out(codes: FloatCodes) -> tuple[Floats, list[torch.Tensor]]:
    layout = Floats.of(codes)
    assert layout is not None
    return layout, list(layout.arrange(codes).values())


def decoder(kind: Kind) -> str:
    return instances.decoder(laid_out(kind.codes(32, 96))[0])


@pytest.fixture(scope="module")
def library(libraries: Path) -> simt.Library:
    return simt.build(libraries, ["floats"], [decoder(kind) for kind in KINDS.values()], [ONE, TWO, FOUR])


@pytest.mark.parametrize("name", KINDS)
def test_a_product_is_the_exact_one_rounded(library: simt.Library, name: str) -> None:
    torch.manual_seed(0)
    for rows, columns in SHAPES:
        codes = KINDS[name].codes(rows, columns)
        layout, parts = laid_out(codes)
        for tokens, launch in TOKENS:
            x_MK, bias_N = parity.activations(tokens, columns), torch.randn(rows).bfloat16()
            stored = parity.in_stored_order(x_MK, codes, layout.chunk)
            found = library.linear(
                decoder(KINDS[name]), launch, stored, parts, rows, group=layout.group, bias_N=bias_N, seed=tokens
            )
            assert error(found, parity.product(x_MK, codes, bias_N)) < TOLERANCE, (rows, columns, tokens)


@pytest.mark.parametrize("name", KINDS)
def test_a_dequantised_weight_is_the_definition_rounded(library: simt.Library, name: str) -> None:
    """One step apart at most with a factor, which may round scale times factor and factor times number apart."""
    torch.manual_seed(0)
    for rows, columns in SHAPES:
        codes = KINDS[name].codes(rows, columns)
        layout, parts = laid_out(codes)
        padded = columns + -columns % layout.chunk
        found = library.dequantize(decoder(KINDS[name]), parts, (rows, columns), padded, group=layout.group)
        assert parity.steps_apart(found, values(codes).bfloat16()) <= int(codes.factor != 1), (rows, columns)


@pytest.mark.parametrize("name", BYTES)
def test_every_number_meets_every_scale(library: simt.Library, name: str) -> None:
    """All numbers with all scales that the layout takes, in all places of a tile; below 2^-110 bf16 has no room."""
    kind = BYTES[name]
    of_byte = torch.arange(256, dtype=torch.uint8).view(kind.scale)
    largest = 2.0**9 if kind.element.bits == 4 else 2.0**118
    scales = of_byte[(of_byte.float().abs() <= largest) & (of_byte.float().abs() >= 2.0**-110)]
    rows = len(scales)
    numbers = torch.tensor([code for code in range(2**kind.element.bits) if code % kind.element.sign != 127])
    columns = 128 if kind.element.bits == 4 else 512
    codes_OI = numbers[(torch.arange(columns) + torch.arange(rows)[:, None]) % len(numbers)].to(torch.uint8)
    bytes_OG = scales.view(torch.uint8)[(torch.arange(rows)[:, None] + 3 * torch.arange(columns // kind.group)) % rows]
    codes = FloatCodes(kind.element, codes_OI, bytes_OG.view(scales.dtype))
    _, parts = laid_out(codes)
    found = library.dequantize(decoder(kind), parts, (rows, columns), columns)
    assert parity.steps_apart(found, values(codes).bfloat16()) == 0


def test_every_bit_pattern_decodes_to_the_number_at_its_place(libraries: Path) -> None:
    """All 2^16 halfwords in both halves of a word, for all kinds of number; of narrow ones bits between are left out."""
    entries = "".join(
        f"""
extern "C" void {element.name}(u32* out) {{
  for (u32 half = 0; half < 65536; half++) {{
    const u32 word = half | half * 40503u << 16;
    const Words4 codes = {{{{word, word, 0, 0}}}};
    for (int i = 0; i < 4; i++) *out++ = Small<{element.exponent}, {element.mantissa}>::pair(codes, 0, i);
  }}
}}"""
        for element in EVERY
    )
    library = ctypes.CDLL(str(simt.compiled(libraries, simt.source(["floats"]) + entries)))
    half = torch.arange(65536)
    low, high = half, half * 40503 & 0xFFFF
    for element in EVERY:
        out = torch.empty(65536, 4, dtype=torch.int32)
        library[element.name](ctypes.c_void_p(out.data_ptr()))
        found = out.view(torch.bfloat16).view(65536, 4, 2).double() * 2.0 ** (127 - element.bias)
        for i in range(4):
            four = (low >> 4 * i & 15, high >> 4 * i & 15)
            eight = ((low, high)[i // 2] & 255, (low, high)[i // 2] >> 8)
            top, codes = (8, four) if element.bits <= 4 else (128, eight)
            for column, code in enumerate(codes):
                signed = (code & element.sign - 1) + (code & top) // top * element.sign
                expected = element.decode(signed.to(torch.uint8)).double()
                known = ~expected.isnan()
                assert torch.equal(found[known, i, column], expected[known]), (element.name, i, column)


def test_scales_without_room_are_refused() -> None:
    codes = torch.zeros(16, 32, dtype=torch.uint8)
    for byte, four, eight in ((136, True, True), (137, False, True), (255, False, False)):  # 2^9, 2^10, not a number
        scale = torch.full((16, 1), byte, dtype=torch.uint8).view(torch.float8_e8m0fnu)
        assert (Floats.of(FloatCodes(E2M1, codes, scale)) is not None) == four
        assert (Floats.of(FloatCodes(E4M3, codes, scale)) is not None) == eight
