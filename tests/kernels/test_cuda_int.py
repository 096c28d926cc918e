"""The CUDA kernels for integers, run on the CPU: products and dequantised weights against the definition of the codes."""

import ctypes
import itertools
from pathlib import Path

import parity
import pytest
import simt
import torch
from simt import Launch
from tolerance import TOLERANCE, error

from compressor.formats.numerics.codes import IntCodes, values
from compressor.runtime.kernels.layouts.input_groups import InputGroups
from compressor.runtime.kernels.layouts.int_groups import IntGroups

pytestmark = simt.needs_gxx

BITS = (2, 3, 4, 8)
RUN = {2: 32, 3: 32, 4: 16, 8: 8}  # columns of a lane
ONE, TWO, FOUR = Launch(1, 1, 8, 4), Launch(2, 2, 4, 2), Launch(4, 1, 2, 1)
TOKENS = ((1, ONE), (7, ONE), (8, ONE), (16, TWO), (33, FOUR), (64, FOUR), (65, TWO))
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = (  # out_features, in_features, columns of a group
    (21, 1000, 1000),  # one group a row, and no whole chunk at the end
    (40, 1024, 256),  # more chunks than warps take at once
    (40, 384, 128),
    (48, 320, 64),  # below the chunk of 2 and 3 bits
    (17, 192, 32),  # below that of 4 bits
    (17, 192, 96),  # neither a multiple of a chunk nor a divisor
    (32, 160, 16),  # below that of 8 bits
)
ROWS = ((40, 1000, 40), (96, 320, 32), (64, 384, 16))  # out_features, in_features, rows of a group


@pytest.fixture(scope="module")
def groups(libraries: Path) -> simt.Library:
    decoders = [f"IntGroups<{bits}, {half}, {inner}>" for bits in BITS for half in (0, 1) for inner in (0, 1)]
    return simt.build(libraries, ["int_groups"], decoders, [ONE, TWO, FOUR])


@pytest.fixture(scope="module")
def input_groups(libraries: Path) -> simt.Library:
    decoders = [f"InputGroups<{bits}>" for bits in BITS]
    return simt.build(libraries, ["int_groups", "input_groups"], decoders, [ONE, TWO, FOUR])


def laid_out(codes: IntCodes) -> tuple[IntGroups, str, list[torch.Tensor]]:
    layout = IntGroups.of(codes)
    assert layout is not None
    inner = int(0 < layout.group < layout.chunk)
    tensors = layout.arrange(codes)
    parts = [tensors[name] for name in layout.parts if name != "order"]
    return layout, f"IntGroups<{layout.bits}, {int(layout.scale == 'fp16')}, {inner}>", parts


def cases(bits: int) -> list[tuple[int, int, int]]:
    """The shapes but for those where a lane's run, of a fourth of a chunk, would lie in several groups."""
    return [shape for shape in SHAPES if shape[2] >= RUN[bits]]


@pytest.mark.parametrize("scale", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_a_product_is_the_exact_one_rounded(groups: simt.Library, bits: int, scale: str) -> None:
    torch.manual_seed(bits)
    for rows, columns, group in cases(bits):
        codes = parity.int_codes(bits, rows, columns, 1, group, DTYPES[scale])
        layout, decoder, parts = laid_out(codes)
        for tokens, launch in TOKENS:
            x_MK = parity.activations(tokens, columns)
            stored = parity.in_stored_order(x_MK, codes, layout.chunk)
            found = groups.linear(decoder, launch, stored, parts, rows, group=layout.group, seed=tokens)
            assert error(found, parity.product(x_MK, codes)) < TOLERANCE, (layout.name, rows, columns, tokens)


@pytest.mark.parametrize("bits", BITS)
def test_the_bias_is_added_before_rounding(groups: simt.Library, bits: int) -> None:
    torch.manual_seed(bits)
    codes = parity.int_codes(bits, 21, 256, 1, 128)
    layout, decoder, parts = laid_out(codes)
    x_MK, bias_N = parity.activations(7, 256), 100 * torch.randn(21).bfloat16()
    found = groups.linear(decoder, ONE, x_MK, parts, 21, group=layout.group, bias_N=bias_N)
    exact = parity.product(x_MK, codes, bias_N)
    assert (found.double() - exact).abs().max() <= 2**-8 * exact.abs().max()
    assert parity.steps_apart(found, exact.bfloat16()) <= 1


def test_columns_in_another_order_meet_their_own_activations(groups: simt.Library) -> None:
    torch.manual_seed(0)
    codes = parity.int_codes(4, 32, 200, 1, 200)
    codes = IntCodes(4, codes.codes_OI, codes.scale, codes.zero, torch.randperm(200))
    layout, decoder, parts = laid_out(codes)
    x_MK = parity.activations(3, 200)
    found = groups.linear(decoder, ONE, parity.in_stored_order(x_MK, codes, layout.chunk), parts, 32)
    assert error(found, parity.product(x_MK, codes)) < TOLERANCE


@pytest.mark.parametrize("launch", [ONE, TWO, FOUR], ids=str)
def test_the_order_in_which_threads_run_changes_nothing(groups: simt.Library, launch: Launch) -> None:
    torch.manual_seed(0)
    codes = parity.int_codes(4, 40, 640, 1, 128)
    layout, decoder, parts = laid_out(codes)
    x_MK = parity.activations(9, 640)
    found = [groups.linear(decoder, launch, x_MK, parts, 40, group=layout.group, seed=seed) for seed in range(5)]
    assert all(torch.equal(one, found[0]) for one in found[1:])


@pytest.mark.parametrize("bits", BITS)
def test_every_bit_pattern_decodes_to_the_code_at_its_place(libraries: Path, bits: int) -> None:
    """All 2^16 halfwords in all places of a lane's bytes, against the places that `tile_order` names and a subtraction."""
    steps = RUN[bits] // 4
    entry = f"""
extern "C" void fragments(u32 zero, u32* out) {{
  for (u32 half = 0; half < 65536; half++) {{
    IntGroups<{bits}, 0, 0> tile;
    for (u32 i = 0; i < 4; i++) tile.codes.word[i] = half | (half * 40503u + i) << 16;
    for (u32 i = 0; i < 2; i++) tile.high.word[i] = ((half * 25173u + i) & 0xffffu) | half << 16;
    for (u32 i = 0; i < 2; i++) tile.scale_zero[i] = zero << 16;
    for (int step = 0; step < {steps}; step++, out += 4) tile.fragment(step, *(u32(*)[4])out);
  }}
}}"""
    library = ctypes.CDLL(str(simt.compiled(libraries, simt.source(["int_groups"]) + entry)))
    half, place = torch.arange(65536)[:, None], torch.arange(4)
    codes = half | (half * 40503 + place & 0xFFFF) << 16
    high = half * 25173 + place[:2] & 0xFFFF | half << 16
    for zero in (0, 1, 2**bits - 1):
        out = torch.full((65536, steps, 4), -1, dtype=torch.int32)
        stored = torch.tensor([zero + (0 if bits == 8 else 128.0)]).bfloat16().view(torch.int16).item()
        library.fragments(ctypes.c_uint(stored), ctypes.c_void_p(out.data_ptr()))
        found = out.view(torch.bfloat16).view(65536, steps, 4, 2).float()
        for step, i, e in itertools.product(range(steps), range(4), range(2)):
            expected = _code_at(bits, codes, high, step, i, e) - zero
            assert torch.equal(found[:, step, i, e], expected.float()), (zero, step, i, e)


def _code_at(bits: int, codes: torch.Tensor, high: torch.Tensor, step: int, i: int, e: int) -> torch.Tensor:
    if bits == 8:
        return codes[:, 2 * step + i % 2] >> 8 * (i // 2 * 2 + e) & 255
    if bits == 4:
        return codes[:, step] >> 4 * (i + 4 * e) & 15
    low = codes[:, step // 2] >> 2 * (i + 4 * (step % 2) + 8 * e) & 3
    return low | (high[:, step // 4] >> i + 4 * (step % 4) + 16 * e & 1) << 2 if bits == 3 else low


@pytest.mark.parametrize("scale", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_a_dequantised_weight_is_the_definition_rounded_once(groups: simt.Library, bits: int, scale: str) -> None:
    """But for groups below a chunk with an fp16 scale, which is rounded to bf16 before the product is: one step more."""
    torch.manual_seed(bits)
    for rows, columns, group in (*cases(bits), (16, 1001, 1001)):
        codes = parity.int_codes(bits, rows, columns, 1, group, DTYPES[scale])
        layout, decoder, parts = laid_out(codes)
        padded = columns + -columns % layout.chunk
        found = groups.dequantize(decoder, parts, (rows, columns), padded, group=layout.group)
        allowed = int(scale == "fp16" and 0 < layout.group < layout.chunk)
        assert parity.steps_apart(found, values(codes).bfloat16()) <= allowed, (layout.name, rows, columns)


@pytest.mark.parametrize("bits", BITS)
def test_a_product_by_groups_of_rows_is_the_exact_one_rounded(input_groups: simt.Library, bits: int) -> None:
    torch.manual_seed(bits)
    for rows, columns, a in ROWS:
        codes = parity.int_codes(bits, rows, columns, a, 1)
        layout = InputGroups.of(codes)
        assert layout is not None
        parts = list(layout.arrange(codes).values())
        for tokens, launch in TOKENS:
            x_MK = parity.activations(tokens, columns)
            stored = parity.in_stored_order(x_MK, codes, layout.chunk)
            found = input_groups.linear(f"InputGroups<{bits}>", launch, stored, parts, rows, group=layout.group, seed=tokens)
            assert error(found, parity.product(x_MK, codes)) < TOLERANCE, (layout.name, rows, columns, tokens)
        found = input_groups.dequantize(f"InputGroups<{bits}>", parts, (rows, columns), stored.shape[1], group=layout.group)
        assert parity.steps_apart(found, values(codes).bfloat16()) == 0, (layout.name, rows, columns)
