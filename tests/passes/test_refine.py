"""Coordinate descent after GPTQ: it never loses, and ends where no single change of what is stored would gain."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from compressor.formats.base import Rescalable
from compressor.formats.gptq_int import GptqInt
from compressor.formats.int_group import IntGroup
from compressor.formats.int_input_group import IntInputGroup
from compressor.passes.quantize import refine
from compressor.passes.quantize.gptq import GPTQ, factorise, gptq
from compressor.passes.quantize.refine import refined

FORMATS = [
    IntGroup(bits=2, group_size=16),
    IntGroup(bits=3, group_size=-1),
    IntGroup(bits=4, group_size=8, symmetric=False),
    GptqInt(bits=3, group_size=16),
    IntInputGroup(bits=2, group_size=3),
    IntInputGroup(bits=3, group_size=-1, symmetric=False),
]
formats = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label)


def problem(rows=6, columns=32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(128, columns, generator=g) @ torch.randn(columns, columns, generator=g)
    return torch.randn(rows, columns, generator=g), x.T @ x / 128


def start(fmt, w, h):
    codes, _, grid = gptq(w, factorise(h), fmt.fit(w, h.diagonal()))
    assert isinstance(grid, Rescalable)
    return codes, grid


def loss(w, values, h):
    missed = w.double() - values.double()
    return float(((missed @ h.double()) * missed).sum())


def stored_loss(w, found, h):
    codes, grid = found
    return loss(w, grid.pack(codes).dequantize(), h)


@formats
def test_no_sweep_raises_the_loss_of_what_is_stored(fmt):
    w, h = problem()
    codes, grid = start(fmt, w, h)
    losses = [stored_loss(w, refined(w, h, codes, grid, sweeps=n), h) for n in range(6)]
    assert losses[0] == stored_loss(w, (codes, grid), h)
    assert losses[1] < 0.995 * losses[0]
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(losses))


@formats
def test_in_the_end_no_single_code_can_be_changed_for_the_better(fmt):
    w, h = problem()
    codes, grid = refined(w, h, *start(fmt, w, h), sweeps=25)
    least = stored_loss(w, (codes, grid), h)
    for row in range(len(w)):
        for column in range(w.shape[1]):
            for code in range(2**fmt.bits):
                other = codes.clone()
                other[row, column] = code
                values = grid.decode(other[:, column : column + 1], column)
                tried = grid.decode(codes, 0).index_copy(1, torch.tensor([column]), values)
                assert loss(w, tried, h) >= least * (1 - 1e-6)


@formats
def test_in_the_end_no_single_scale_can_be_changed_for_the_better(fmt):
    w, h = problem()
    codes, grid = refined(w, h, *start(fmt, w, h), sweeps=25)
    packed = grid.pack(codes)
    least, stored = loss(w, packed.dequantize(), h), fmt.codes(packed)
    for place in range(stored.scale.numel()):
        for away in (-1, 1):  # to the neighbouring number of the stored dtype: the loss is convex in a scale
            scale = stored.scale.clone()
            scale.view(torch.int16).view(-1)[place] += away
            tried = fmt.stored(replace(stored, scale=scale), packed.shape)
            assert loss(w, tried.dequantize(), h) >= least * (1 - 1e-6)


@formats
def test_how_many_columns_are_collected_changes_nothing(fmt, monkeypatch):
    w, h = problem()
    codes, grid = start(fmt, w, h)
    whole = refined(w, h, codes, grid, sweeps=2)
    monkeypatch.setattr(refine, "AT_ONCE", 4)
    assert torch.equal(refined(w, h, codes, grid, sweeps=2)[0], whole[0])


def test_a_channel_without_tokens_keeps_its_codes():
    w, h = problem()
    h[5], h[:, 5] = 0, 0
    codes, grid = start(IntGroup(bits=3, group_size=16), w, h)
    assert torch.equal(refined(w, h, codes, grid, sweeps=3)[0][:, 5], codes[:, 5])


def test_a_group_of_zeros_stays_one():
    w, h = problem()
    w[:, :16] = 0
    h[:16, 16:], h[16:, :16] = 0, 0
    fmt = IntGroup(bits=3, group_size=16)
    codes, grid = refined(w, h, *start(fmt, w, h), sweeps=3)
    assert grid.pack(codes).dequantize()[:, :16].abs().max() == 0


def test_inputs_are_not_modified():
    w, h = problem()
    codes, grid = start(IntGroup(bits=3, group_size=16), w, h)
    given = (w, h, codes, grid.scale_OG)
    before = [tensor.clone() for tensor in given]
    refined(w, h, codes, grid, sweeps=2)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


@formats
def test_gptq_reports_the_loss_of_what_it_stores(fmt):
    w, h = problem()
    packed, found = GPTQ(options=(fmt,), refine=2).solve(
        w, fmt, h, lambda damp, group: factorise(h, damp=damp, group=group), 0.01
    )
    assert found == pytest.approx(loss(w, packed.dequantize(), h), rel=1e-4)
