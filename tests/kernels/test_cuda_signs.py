"""The CUDA kernels for planes of signs, run on the CPU: products and dequantised weights against the codes' definition."""

from pathlib import Path

import parity
import pytest
import simt
import torch
from simt import Launch
from tolerance import TOLERANCE, error

from compressor.formats.numerics.codes import SignCodes, values
from compressor.runtime.kernels.layouts.signs import Signs

pytestmark = simt.needs_gxx

ONE, TWO, FOUR = Launch(1, 1, 8, 2), Launch(2, 2, 4, 2), Launch(4, 1, 2, 1)
TOKENS = ((1, ONE), (7, ONE), (8, ONE), (16, TWO), (33, FOUR), (64, FOUR), (65, TWO))
PLANES = (1, 2, 4)
SHAPES = ((21, 300, 300), (40, 320, 64), (33, 768, 384), (16, 1024, 512), (8, 256, 128))  # rows, columns, group


@pytest.fixture(scope="module")
def library(libraries: Path) -> simt.Library:
    return simt.build(libraries, ["signs"], [f"Signs<{planes}>" for planes in PLANES], [ONE, TWO, FOUR])


def laid_out(planes: int, rows: int, columns: int, group: int) -> tuple[SignCodes, Signs, list[torch.Tensor]]:
    negative = torch.randint(0, 2, (planes, rows, columns), dtype=torch.uint8)
    codes = SignCodes(negative, torch.randn(planes, rows, columns // group).bfloat16())
    layout = Signs.of(codes)
    assert layout is not None
    return codes, layout, list(layout.arrange(codes).values())


@pytest.mark.parametrize("planes", PLANES)
def test_a_product_is_the_exact_one_rounded(library: simt.Library, planes: int) -> None:
    torch.manual_seed(0)
    for rows, columns, group in SHAPES:
        codes, layout, parts = laid_out(planes, rows, columns, group)
        for tokens, launch in TOKENS:
            x_MK, bias_N = parity.activations(tokens, columns), torch.randn(rows).bfloat16()
            stored = parity.in_stored_order(x_MK, codes, layout.chunk)
            found = library.linear(
                f"Signs<{planes}>", launch, stored, parts, rows, group=layout.group, bias_N=bias_N, seed=tokens
            )
            assert error(found, parity.product(x_MK, codes, bias_N)) < TOLERANCE, (rows, columns, group, tokens)


@pytest.mark.parametrize("planes", PLANES)
def test_a_dequantised_weight_is_the_definition_rounded(library: simt.Library, planes: int) -> None:
    """Bit for bit: planes are added in fp32 in their order, in both."""
    torch.manual_seed(0)
    for rows, columns, group in SHAPES:
        codes, layout, parts = laid_out(planes, rows, columns, group)
        padded = columns + -columns % layout.chunk
        found = library.dequantize(f"Signs<{planes}>", parts, (rows, columns), padded, group=layout.group)
        assert torch.equal(found, values(codes).bfloat16()), (rows, columns, group)


def test_every_place_of_a_tile_is_decoded(library: simt.Library) -> None:
    """Twelve tiles, of which each holds one bit of its places' numbers: the signs that come out spell each number."""
    places = torch.arange(4096).view(16, 256)
    negative = torch.cat([places >> bit & 1 for bit in range(12)]).to(torch.uint8)[None]
    parts = list(Signs(1, 0).arrange(SignCodes(negative, torch.ones(1, 192, 1).bfloat16())).values())
    found = library.dequantize("Signs<1>", parts, (192, 256), 256).view(12, 16, 256)
    assert torch.equal(sum((found[bit] < 0).long() << bit for bit in range(12)), places)
