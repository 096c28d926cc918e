"""VPTQ: error feedback over vectors, codebooks by least squares, indices one by one."""

import itertools
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from compressor.formats.base import stored_bits
from compressor.formats.int_group import IntGroup
from compressor.formats.numerics.codebook import vectors
from compressor.formats.vq import VQ, Norm, VectorGrid, stored
from compressor.passes.quantize import vptq
from compressor.passes.quantize.gptq import Factors, Layer, factorise, gptq, output_energy
from compressor.passes.quantize.vectors import Problem, reduced
from compressor.passes.quantize.vptq import VPTQ, entries, linear_maps, recoded, solved
from compressor.pipeline.contract import NoNotes

FORMATS = [VQ(vector=4, bits=5), VQ(vector=8, bits=4, residual_bits=4), VQ(vector=1, bits=3)]


def problem(rows: int = 32, columns: int = 64, tokens: int = 256) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, columns, generator=g) @ torch.randn(columns, columns, generator=g)
    return torch.randn(rows, columns, generator=g), x.T @ x / tokens


def plain(w: Tensor, h: Tensor) -> Problem:
    """With nothing around the vectors."""
    return reduced(layer(w, h), VQ(vector=1, bits=1), 0.01)


def layer(w: Tensor, h: Tensor, name: str = "layer") -> Layer:
    """As a pass has it before it."""

    def factors_of(h: Tensor) -> Factors:
        return lambda damp, group: factorise(h, damp=damp, group=group)

    return Layer(name, w, h, factors_of(h), factors_of)


def rescaled(w: Tensor, h: Tensor, fmt: VQ) -> tuple[Tensor, Tensor]:
    """The weight and second moment that the losses of a reduced problem with norms are relative to."""
    bare = reduced(layer(w, h), replace(fmt, norm="none"), 1e-6)
    return bare.w_OI, bare.h_II


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
    gathered, scattered = linear_maps(codes, grid)
    assert torch.equal(gathered(entries(grid)), grid.decode(codes, 0))
    direction = torch.randn_like(entries(grid))
    assert float((gathered(direction) * w).sum()) == pytest.approx(float((direction * scattered(w)).sum()), rel=1e-4)


@pytest.mark.parametrize("fmt", FORMATS[:1] + FORMATS[2:], ids=lambda fmt: fmt.label)
def test_codebooks_are_the_least_squares_solution(fmt: VQ) -> None:
    """By the normal equations of one-hot choices, solved by a pseudoinverse in fp64."""
    w, h, codes, grid = start(fmt)
    found = solved([plain(w, h)], [codes], grid, steps=200)
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
    found = solved([plain(w, h)], [codes], grid, steps=300)
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
        grid = solved([plain(w, h)], [codes], grid)
        losses.append(loss(w, h, codes, grid))
        codes = recoded(w, h, codes, grid)
        losses.append(loss(w, h, codes, grid))
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(losses)), losses
    assert losses[-1] < 0.95 * losses[0]


def test_codebooks_that_are_best_already_stay() -> None:
    _, h, codes, grid = start(FORMATS[0])
    grid = solved([plain(grid.decode(codes, 0), h)], [codes], grid)
    assert torch.equal(grid.codebook_KD, start(FORMATS[0])[3].codebook_KD)
    assert torch.equal(stored(grid.codebook_KD), grid.codebook_KD)


def test_inputs_that_no_token_used_keep_their_codes() -> None:
    w, h, codes, grid = start(FORMATS[0])
    h[5], h[:, 5] = 0, 0
    assert torch.equal(recoded(w, h, codes, grid)[:, 5], codes[:, 5])


def test_the_pass_gives_what_its_steps_give_and_tells_the_loss() -> None:
    w, h, codes, grid = start(fmt := FORMATS[0])
    for _ in range(2):
        grid = solved([plain(w, h)], [codes], grid)
        codes = recoded(w, h, codes, grid)
    step = VPTQ(options=(fmt,), refine=2)
    packed, found = step.solve_together([layer(w, h)], {"layer": fmt}, 0.01, NoNotes())["layer"]
    assert torch.equal(packed.dequantize(), grid.pack(codes).dequantize())
    assert found == pytest.approx(output_energy(w - packed.dequantize(), h) / output_energy(w, h))


def test_formats_without_a_codebook_are_refused() -> None:
    with pytest.raises(ValueError, match="options: int3g32 has no codebooks; use `vq`, or `gptq` for other formats"):
        VPTQ(options=(IntGroup(bits=3, group_size=32),))


def test_layers_that_share_need_norms() -> None:
    with pytest.raises(ValueError, match="share: block needs norms; add `norm: layer` or `norm: channel` to vq4k5"):
        VPTQ(options=(VQ(vector=4, bits=5),), share="block")


class TestShared:
    """Codebooks of several layers."""

    def test_layers_with_the_same_input_are_one_weight(self) -> None:
        w, h, codes, grid = start(FORMATS[0])
        parts = [(w[:20], codes[:5]), (w[20:], codes[5:])]
        one = solved([plain(w, h)], [codes], grid)
        two = solved([plain(part, h) for part, _ in parts], [own for _, own in parts], grid)
        torch.testing.assert_close(one.codebook_KD, two.codebook_KD, rtol=1e-2, atol=1e-4)

    def test_what_is_best_for_all_is_worse_for_each(self) -> None:
        w, h, codes, grid = start(FORMATS[0])
        other = torch.diag(torch.rand(64, generator=torch.Generator().manual_seed(1)) + 0.1)
        both = solved([plain(w, h), plain(w, other)], [codes, codes], grid, steps=200)
        alone = [solved([plain(w, m)], [codes], grid, steps=200) for m in (h, other)]
        assert all(loss(w, m, codes, own) < loss(w, m, codes, both) for m, own in zip((h, other), alone, strict=True))
        total = [sum(loss(w, m, codes, g) for m in (h, other)) for g in (both, *alone)]
        assert total[0] < min(total[1:])

    @pytest.mark.parametrize("fmt", [VQ(vector=4, bits=5, norm=norm) for norm in ("layer", "channel")], ids=lambda f: f.norm)
    def test_one_layer_lends_to_the_others(self, fmt: VQ) -> None:
        layers = {name: layer(problem()[0] * size, problem()[1], name) for name, size in (("a", 1.0), ("b", 32.0))}
        formats = {"a": fmt, "b": fmt.borrowing("block.a")}
        found = VPTQ(options=(fmt,), share="block").solve_together(list(layers.values()), formats, 0.01, NoNotes())
        a, b = (found[name][0] for name in layers)
        assert set(a.own) == set(a.parts) == set(b.parts)
        assert set(b.own) == {"weight_index", "weight_norm"}
        assert torch.equal(a.parts["weight_codebook"], b.parts["weight_codebook"])
        assert stored_bits(a) == fmt.stored_bits((32, 64))
        assert stored_bits(b) == formats["b"].stored_bits((32, 64)) == stored_bits(a) - 16 * 4 * 2**5
        assert torch.equal(b.dequantize(), 32 * a.dequantize())


@pytest.mark.parametrize("norm", ["none", "layer", "channel"])
@pytest.mark.parametrize("outliers", [0.0, 0.1])
class TestReduced:
    """Norms and dense channels."""

    def test_its_loss_is_that_of_the_whole_weight(self, norm: Norm, outliers: float) -> None:
        w, h = problem()
        fmt = VQ(vector=4, bits=5, norm=norm, outliers=outliers)
        left = reduced(layer(w, h), fmt, 1e-6)
        grid = fmt.inner.books(vectors(left.w_OI, 4), torch.ones(left.w_OI.numel() // 4))
        codes = grid.round(left.w_OI, 0)
        packed = left.packed(replace(grid, format=fmt), codes)
        whole = output_energy(w - packed.dequantize(), h)
        own = output_energy(left.w_OI - grid.decode(codes, 0), left.h_II)
        scale = 1.0 if norm == "none" else output_energy(*rescaled(w, h, fmt))
        assert whole == pytest.approx(own * scale, rel=2e-3)

    def test_the_channels_with_the_largest_inputs_are_dense_and_no_others(self, norm: Norm, outliers: float) -> None:
        w, h = problem()
        fmt = VQ(vector=4, bits=5, norm=norm, outliers=outliers)
        packed, _ = VPTQ(options=(fmt,)).solve_together([layer(w, h)], {"layer": fmt}, 0.01, NoNotes())["layer"]
        assert sum(8 * part.nbytes for part in packed.parts.values()) == fmt.stored_bits((32, 64))
        if outliers:
            largest = h.diagonal().argsort(descending=True)[:6].sort().values
            assert packed.parts["weight_channels"].tolist() == largest.tolist()
            assert packed.parts["weight_dense"].shape == (32, 6)

    def test_dense_channels_cannot_do_better(self, norm: Norm, outliers: float) -> None:
        w, h = problem()
        fmt = VQ(vector=4, bits=5, norm=norm, outliers=outliers)
        packed, _ = VPTQ(options=(fmt,)).solve_together([layer(w, h)], {"layer": fmt}, 1e-6, NoNotes())["layer"]
        slope = (w - packed.dequantize()) @ h
        for channel in packed.parts.get("weight_channels", torch.empty(0)).tolist():
            assert slope[:, int(channel)].abs().max() < 0.02 * slope.abs().max()


class TestBrokenOff:
    """A run that ends within a layer goes on from its notes."""

    class Notes:
        """In memory; the process ends when so many have been written."""

        def __init__(self, last: int) -> None:
            self.kept: dict[str, dict[str, Tensor]] = {}
            self.last = last

        def load(self, key: str) -> dict[str, Tensor]:
            return self.kept.get(key, {})

        def save(self, key: str, tensors: Mapping[str, Tensor]) -> None:
            self.kept[key] = {name: t.clone() for name, t in tensors.items()}
            self.last -= 1
            if self.last == 0:
                raise KeyboardInterrupt

    @pytest.mark.parametrize("last", range(1, 6))
    def test_to_the_same_result(self, last: int) -> None:
        fmt = VQ(vector=4, bits=5, residual_bits=3, norm="layer")
        w, h = problem()
        step, layers = VPTQ(options=(fmt,), refine=2, share="block"), [layer(w, h, "a"), layer(w.flip(0), h, "b")]
        formats = {"a": fmt, "b": fmt.borrowing("block.a")}
        whole = step.solve_together(layers, formats, 0.01, NoNotes())
        notes = self.Notes(last)
        with pytest.raises(KeyboardInterrupt):
            step.solve_together(layers, formats, 0.01, notes)
        resumed = step.solve_together(layers, formats, 0.01, notes)
        assert all(
            torch.equal(whole[name][0].parts[part], t) for name in formats for part, t in resumed[name][0].parts.items()
        )

    def test_without_doing_again_what_is_done(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fmt, (w, h) = VQ(vector=4, bits=5), problem()
        step, notes = VPTQ(options=(fmt,), refine=2), self.Notes(3)
        with pytest.raises(KeyboardInterrupt):
            step.solve_together([layer(w, h)], {"layer": fmt}, 0.01, notes)
        turns = []
        again = vptq.solved
        monkeypatch.setattr(vptq, "gptq", None)
        monkeypatch.setattr(vptq, "solved", lambda *given: turns.append(1) or again(*given))
        step.solve_together([layer(w, h)], {"layer": fmt}, 0.01, notes)
        assert turns == [1]
