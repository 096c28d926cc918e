"""The CUDA kernels for lossless weights, run on the CPU: every weight is decoded bit for bit, escapes among them."""

from pathlib import Path

import parity
import pytest
import simt
import torch
from simt import Launch
from tolerance import TOLERANCE, error
from torch import Tensor

from compressor.formats.numerics.codes import DenseCodes
from compressor.runtime.kernels.layouts.lossless import Lossless

pytestmark = simt.needs_gxx

ONE, TWO, FOUR = Launch(1, 1, 8, 2), Launch(2, 2, 4, 2), Launch(4, 1, 2, 1)
TOKENS = ((1, ONE), (7, ONE), (8, ONE), (16, TWO), (33, FOUR), (64, FOUR), (65, TWO))
SHAPES = ((21, 300), (40, 1024), (16, 64))
LAYOUT = Lossless()


@pytest.fixture(scope="module")
def library(libraries: Path) -> simt.Library:
    return simt.build(libraries, ["lossless"], ["Lossless"], [ONE, TWO, FOUR])


def arranged(w_NK: Tensor) -> list[Tensor]:
    return list(LAYOUT.arrange(DenseCodes(w_NK)).values())


def dequantized(library: simt.Library, w_NK: Tensor) -> Tensor:
    rows, columns = w_NK.shape
    return library.dequantize("Lossless", arranged(w_NK), (rows, columns), columns + -columns % LAYOUT.chunk)


def multiplied(library: simt.Library, launch: Launch, x_MK: Tensor, w_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    stored = parity.in_stored_order(x_MK, DenseCodes(w_NK), LAYOUT.chunk)
    return library.linear("Lossless", launch, stored, arranged(w_NK), w_NK.shape[0], bias_N=bias_N, seed=len(x_MK))


def bits(w: Tensor) -> Tensor:
    return w.contiguous().view(torch.int16)


def with_escapes(w_NK: Tensor, share: float) -> Tensor:
    """Some of the weights 2^18 times as small, and as many 0, -0 and 16 times as large as the largest."""
    kind = torch.randint(0, round(1 / share), w_NK.shape)
    w_NK = torch.where(kind == 0, w_NK * 2.0**-18, w_NK)
    w_NK = torch.where(kind == 1, torch.zeros_like(w_NK), w_NK)
    w_NK = torch.where(kind == 2, -torch.zeros_like(w_NK), w_NK)
    return torch.where(kind == 3, 16 * w_NK, w_NK)


@pytest.mark.parametrize("share", [0.001, 0.05])
def test_a_product_is_the_exact_one_rounded(library: simt.Library, share: float) -> None:
    torch.manual_seed(0)
    for rows, columns in SHAPES:
        w_NK = with_escapes(torch.randn(rows, columns).bfloat16(), share)
        for tokens, launch in TOKENS:
            x_MK, bias_N = parity.activations(tokens, columns), torch.randn(rows).bfloat16()
            found = multiplied(library, launch, x_MK, w_NK, bias_N)
            assert error(found, parity.product(x_MK, DenseCodes(w_NK), bias_N)) < TOLERANCE, (rows, columns, tokens)


def test_an_escape_counts_as_much_as_any_weight(library: simt.Library) -> None:
    """A row that is nearly all escapes, and large ones, so that a missing patch is no small error."""
    torch.manual_seed(0)
    w_NK = torch.randn(24, 512).bfloat16()
    w_NK[:, ::3] *= 2.0**20
    w_NK[:, 1::3] *= 2.0**40
    x_MK = parity.activations(5, 512)
    assert LAYOUT.of(DenseCodes(w_NK)) is None
    assert error(multiplied(library, ONE, x_MK, w_NK), parity.product(x_MK, DenseCodes(w_NK))) < TOLERANCE


def test_a_single_activation_gives_the_weights_themselves(library: simt.Library) -> None:
    """Bit for bit, but for escapes far below the row's other weights: in fp32, adding what is held instead rounds them."""
    torch.manual_seed(0)
    w_NK = with_escapes(torch.randn(37, 64).bfloat16(), 0.02)
    found = multiplied(library, FOUR, torch.eye(64).bfloat16(), w_NK).T
    ordinary = w_NK.abs() >= 2.0**-12
    assert torch.equal(found[ordinary], w_NK[ordinary])
    assert (found - w_NK).abs().max() <= 2.0**-36


def test_infinities_and_nan_come_through(library: simt.Library) -> None:
    torch.manual_seed(0)
    w_NK = torch.randn(16, 128).bfloat16()
    w_NK[3, 7], w_NK[5, 100], w_NK[11, 0] = float("inf"), float("-inf"), float("nan")
    x_MK = parity.activations(8, 128)
    found, expected = multiplied(library, ONE, x_MK, w_NK).float(), x_MK.float() @ w_NK.float().T
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found[expected.isinf()], expected[expected.isinf()]) and torch.equal(found.isinf(), expected.isinf())


@pytest.mark.parametrize("shape", [(16, 4096), (4096, 16), (331, 198)])
def test_every_bf16_is_decoded_bit_for_bit(library: simt.Library, shape: tuple[int, int]) -> None:
    """All 2^16 patterns, in rows of which nearly all are escapes."""
    torch.manual_seed(0)
    places = torch.arange(shape[0] * shape[1]).remainder(2**16)
    w_NK = torch.randperm(2**16)[places].to(torch.int16).view(torch.bfloat16).view(shape)
    assert torch.equal(bits(dequantized(library, w_NK)), bits(w_NK))


def test_every_bf16_that_is_no_escape_is_decoded_bit_for_bit(library: simt.Library) -> None:
    """Of each base a row with its 16 exponents, both signs and all mantissas: the tiles alone hold them."""
    torch.manual_seed(0)
    bases = torch.arange(1, 240)[:, None]
    rest = torch.randperm(2**12)
    patterns = (rest >> 11) << 15 | (bases + (rest >> 7 & 15)) << 7 | rest & 127
    w_NK = patterns.to(torch.int16).view(torch.bfloat16)
    assert len(LAYOUT.arrange(DenseCodes(w_NK))["escapes"]) == 0
    assert torch.equal(bits(dequantized(library, w_NK)), bits(w_NK))


def test_a_product_is_the_same_in_any_order_of_the_threads(library: simt.Library) -> None:
    torch.manual_seed(0)
    w_NK = with_escapes(torch.randn(40, 1024).bfloat16(), 0.05)
    x_MK, parts = parity.activations(7, 1024), arranged(w_NK)
    first, *others = (library.linear("Lossless", ONE, x_MK, parts, 40, seed=seed) for seed in range(3))
    assert all(torch.equal(first, other) for other in others)
