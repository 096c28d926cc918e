"""The CUDA kernels for codebook vectors, run on the CPU: products and dequantised weights against the codes' definition."""

from pathlib import Path

import parity
import pytest
import simt
import torch
from simt import Launch
from tolerance import TOLERANCE, error

from compressor.formats.numerics.codes import VectorCodes, values
from compressor.runtime.kernels.layouts.vectors import Vectors

pytestmark = simt.needs_gxx

ONE, TWO, FOUR = Launch(1, 1, 8, 4), Launch(2, 2, 4, 2), Launch(4, 1, 2, 1)
TOKENS = ((1, ONE), (7, ONE), (8, ONE), (16, TWO), (33, FOUR), (64, FOUR), (65, TWO))
CODEBOOKS = ((12, 0), (8, 8), (12, 4), (3, 0))  # bits of the index and of the residual's
SHAPES = ((24, 200), (40, 1024), (16, 128))


def decoder(layout: Vectors) -> str:
    return f"Vectors<{layout.bits}, {layout.residual_bits}>"


@pytest.fixture(scope="module")
def library(libraries: Path) -> simt.Library:
    return simt.build(libraries, ["vectors"], [decoder(Vectors(*bits)) for bits in CODEBOOKS], [ONE, TWO, FOUR])


def laid_out(bits: int, residual_bits: int, rows: int, columns: int) -> tuple[VectorCodes, Vectors, list[torch.Tensor]]:
    def indices(below: int) -> torch.Tensor:
        return torch.randint(0, below, (rows // 8, columns), dtype=torch.int32)

    codes = VectorCodes(indices(2**bits), (0.02 * torch.randn(2**bits, 8)).bfloat16())
    if residual_bits:
        residual = (0.005 * torch.randn(2**residual_bits, 8)).bfloat16()
        codes = VectorCodes(codes.index_VI, codes.codebook, indices(2**residual_bits), residual)
    layout = Vectors.of(codes)
    assert layout == Vectors(bits, residual_bits)
    return codes, layout, list(layout.arrange(codes).values())


@pytest.mark.parametrize("bits", CODEBOOKS)
def test_a_product_is_the_exact_one_rounded(library: simt.Library, bits: tuple[int, int]) -> None:
    torch.manual_seed(0)
    for rows, columns in SHAPES:
        codes, layout, parts = laid_out(*bits, rows, columns)
        for tokens, launch in TOKENS:
            x_MK, bias_N = parity.activations(tokens, columns), torch.randn(rows).bfloat16()
            stored = parity.in_stored_order(x_MK, codes, layout.chunk)
            found = library.linear(
                decoder(layout), launch, stored, parts, rows, bias_N=bias_N, shared=layout.shared_bytes, seed=tokens
            )
            assert error(found, parity.product(x_MK, codes, bias_N)) < TOLERANCE, (rows, columns, tokens)


@pytest.mark.parametrize("bits", CODEBOOKS)
def test_a_dequantised_weight_is_the_definition_rounded(library: simt.Library, bits: tuple[int, int]) -> None:
    """Bit for bit: the residual is added in fp32, in both."""
    torch.manual_seed(0)
    for rows, columns in SHAPES:
        codes, layout, parts = laid_out(*bits, rows, columns)
        padded = columns + -columns % layout.chunk
        found = library.dequantize(decoder(layout), parts, (rows, columns), padded, shared=layout.shared_bytes)
        assert torch.equal(found, values(codes).bfloat16()), (rows, columns)


def test_every_entry_is_looked_up_in_every_lane(library: simt.Library) -> None:
    """4096 entries over 32 lanes and 8 steps, moved on by one lane with each row of tiles."""
    layout = Vectors(12)
    codebook = torch.randn(4096, 8).bfloat16()
    index = torch.stack([torch.arange(4096).roll(64 * vector + vector % 7) for vector in range(6)]).int()
    codes = VectorCodes(index, codebook)
    parts = list(layout.arrange(codes).values())
    found = library.dequantize("Vectors<12, 0>", parts, (48, 4096), 4096, shared=layout.shared_bytes)
    assert torch.equal(found, values(codes).bfloat16())


def test_a_codebook_that_is_not_in_shared_memory_is_noticed(library: simt.Library) -> None:
    _, layout, parts = laid_out(8, 8, 16, 128)
    x_MK = parity.activations(1, 128)
    with pytest.raises(simt.EmulatorError, match="ldmatrix"):
        library.linear(decoder(layout), ONE, x_MK, parts, 16, shared=layout.shared_bytes // 2)


def test_the_barrier_after_the_copy_is_needed(libraries: Path) -> None:
    """Without it some warps look up what is not there yet: NaN, in one order of the warps or another."""

    def unguarded(text: str) -> str:
        assert text.count("    __syncthreads();\n  }\n\n  DEVICE void load") == 1
        return text.replace("    __syncthreads();\n  }\n\n  DEVICE void load", "  }\n\n  DEVICE void load")

    torch.manual_seed(0)
    _, layout, parts = laid_out(12, 0, 16, 1024)
    mutant = simt.build(libraries, ["vectors"], ["Vectors<12, 0>"], [ONE], unguarded)
    x_MK = parity.activations(1, 1024)
    found = mutant.linear("Vectors<12, 0>", ONE, x_MK, parts, 16, shared=layout.shared_bytes)
    assert found.isnan().any()
