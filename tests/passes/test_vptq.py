"""VPTQ: error feedback over vectors, codebooks by least squares, indices one by one."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from compressor.errors import RecipeError
from compressor.formats.int_group import IntGroup
from compressor.formats.vq import VQ, VectorGrid, stored
from compressor.passes.gptq import factorise, gptq, output_energy
from compressor.passes.vptq import VPTQ, linear_maps, recoded, solved

FORMATS = [VQ(vector=4, bits=5), VQ(vector=8, bits=4, residual_bits=4), VQ(vector=1, bits=3)]


def problem(rows: int = 32, columns: int = 64, tokens: int = 256) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, columns, generator=g) @ torch.randn(columns, columns, generator=g)
    return torch.randn(rows, columns, generator=g), x.T @ x / tokens


def start(fmt: VQ) -> tuple[Tensor, Tensor, Tensor, VectorGrid]:
    """A weight, its Hessian, and what error feedback finds."""
    w, h = problem()
    grid = fmt.fit(w, h.diagonal())
    codes, _, _ = gptq(w, factorise(h), grid)
    return w, h, codes, grid


def loss(w: Tensor, h: Tensor, codes: Tensor, grid: VectorGrid) -> float:
    missed = (w - grid.pack(codes).dequantize()).double()
    return float(((missed @ h.double()) * missed).sum())


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label)
def test_error_feedback_beats_the_nearest_entries(fmt: VQ) -> None:
    w, h, codes, grid = start(fmt)
    assert loss(w, h, codes, grid) < 0.85 * loss(w, h, grid.round(w, 0), grid)


def test_a_uniform_codebook_of_single_weights_gives_the_codes_of_gptq() -> None:
    """Of a scalar format with one scale for all."""
    w, h = problem()
    scalar = IntGroup(bits=3, group_size=-1).fit(w)
    scale = scalar.scale_OG[:1].abs()
    scalar = replace(scalar, scale_OG=scale.expand(32, 1).contiguous())
    uniform = scalar.decode(torch.arange(8, dtype=torch.uint8).expand(32, 8), 0)[0]
    grid = VectorGrid(VQ(vector=1, bits=3), uniform[:, None], None, 64)
    factor = factorise(h)
    found, missed, _ = gptq(w, factor, grid)
    expected, expected_loss, _ = gptq(w, factor, scalar)
    assert torch.equal(found, expected.int())
    assert missed == pytest.approx(expected_loss, rel=1e-5)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label)
def test_maps_between_entries_and_weights_are_each_others_transpose(fmt: VQ) -> None:
    w, _, codes, grid = start(fmt)
    entries, gathered, scattered = linear_maps(codes, grid)
    assert torch.equal(gathered(entries), grid.decode(codes, 0))
    direction = torch.randn_like(entries)
    assert float((gathered(direction) * w).sum()) == pytest.approx(float((direction * scattered(w)).sum()), rel=1e-4)


@pytest.mark.parametrize("fmt", FORMATS[:1] + FORMATS[2:], ids=lambda fmt: fmt.label)
def test_codebooks_are_the_least_squares_solution(fmt: VQ) -> None:
    """By the normal equations of one-hot choices, solved by a pseudoinverse in fp64."""
    w, h, codes, grid = start(fmt)
    found = solved(w, h, codes, grid, steps=200)
    root = torch.linalg.cholesky(h.double() + 1e-9 * torch.eye(64, dtype=torch.float64))
    for d in range(fmt.vector):
        rows = [root.T @ torch.nn.functional.one_hot(of_row.long(), 2**fmt.bits).double() for of_row in codes]
        wanted = [root.T @ row.double() for row in w[d :: fmt.vector]]
        best = torch.linalg.pinv(torch.cat(rows)) @ torch.cat(wanted)
        used = torch.zeros(2**fmt.bits, dtype=torch.bool).index_fill_(0, codes.unique().long(), True)
        torch.testing.assert_close(found.codebook_KD[used, d].double(), best[used], atol=2e-2, rtol=1e-2)  # stored in bf16


def test_with_residuals_the_loss_is_that_of_the_least_squares_solution() -> None:
    """Which is not unique: what one book gains the other may lose."""
    w, h, codes, grid = start(FORMATS[1])
    found = solved(w, h, codes, grid, steps=300)
    root = torch.linalg.cholesky(h.double() + 1e-9 * torch.eye(64, dtype=torch.float64))
    main, residual = codes.long() & 15, codes.long() >> 4
    best = 0.0
    for d in range(8):
        both = torch.cat([torch.nn.functional.one_hot(main, 16), torch.nn.functional.one_hot(residual, 16)], 2).double()
        rows, wanted = torch.cat([root.T @ row for row in both]), torch.cat([root.T @ row.double() for row in w[d::8]])
        best += float((rows @ (torch.linalg.pinv(rows) @ wanted) - wanted).square().sum())
    assert best <= loss(w, h, codes, found) < 1.002 * best


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label)
def test_no_step_raises_the_loss(fmt: VQ) -> None:
    w, h, codes, grid = start(fmt)
    losses = [loss(w, h, codes, grid)]
    for _ in range(4):
        grid = solved(w, h, codes, grid)
        losses.append(loss(w, h, codes, grid))
        codes = recoded(w, h, codes, grid)
        losses.append(loss(w, h, codes, grid))
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(losses)), losses
    assert losses[-1] < 0.95 * losses[0]


def test_codebooks_that_are_best_already_stay() -> None:
    _, h, codes, grid = start(FORMATS[0])
    grid = solved(grid.decode(codes, 0), h, codes, grid)
    assert torch.equal(grid.codebook_KD, start(FORMATS[0])[3].codebook_KD)
    assert torch.equal(stored(grid.codebook_KD), grid.codebook_KD)


def test_inputs_that_no_token_used_keep_their_codes() -> None:
    w, h, codes, grid = start(FORMATS[0])
    h[5], h[:, 5] = 0, 0
    assert torch.equal(recoded(w, h, codes, grid)[:, 5], codes[:, 5])


def test_the_pass_gives_what_its_steps_give_and_tells_the_loss() -> None:
    w, h, codes, grid = start(fmt := FORMATS[0])
    for _ in range(2):
        grid = solved(w, h, codes, grid)
        codes = recoded(w, h, codes, grid)
    step = VPTQ(options=(fmt,), refine=2)
    packed, found = step.solve(w, fmt, h, lambda damp, group: factorise(h, damp=damp, group=group), 0.01)
    assert torch.equal(packed.dequantize(), grid.pack(codes).dequantize())
    assert found == pytest.approx(output_energy(w - packed.dequantize(), h))


def test_formats_without_a_codebook_are_refused() -> None:
    w, h = problem()
    fmt = IntGroup(bits=3, group_size=32)
    with pytest.raises(RecipeError, match="vptq: only `vq` has codebooks; use `gptq` for other formats"):
        VPTQ(options=(fmt,)).solve(w, fmt, h, lambda damp, group: factorise(h, damp=damp, group=group), 0.01)
