"""Learned rounding: its gradients, what it promises of its objective, and how it meets the rest of the pipeline."""

from dataclasses import replace

import pytest
import torch

from compressor.assets import DEMO_MODEL
from compressor.errors import RecipeError
from compressor.formats.base import dense
from compressor.formats.float_group import FloatGroup
from compressor.formats.fp8 import FP8
from compressor.formats.int_group import IntGroup
from compressor.formats.mxfp4 import MXFP4
from compressor.formats.numerics.activations import rounded_inputs
from compressor.formats.numerics.activations import rounding as rounding_of
from compressor.formats.numerics.codes import FloatCodes, values
from compressor.formats.nvfp4 import NVFP4
from compressor.formats.vq import VQ, VectorGrid
from compressor.model.source import ModelSource
from compressor.passes.quantize.rtn import RTN
from compressor.passes.train.latents import AGAIN
from compressor.passes.train.learned import Learned, rounding
from compressor.pipeline.calibration.stream import CalibrationStream
from compressor.pipeline.ranks import Ranks

CPU = torch.device("cpu")
FORMATS = [
    IntGroup(bits=2, group_size=16),
    IntGroup(bits=3, group_size=-1, symmetric=False),
    NVFP4(),
    MXFP4(),
    FP8(scales="tensor"),
    FloatGroup(exponent=3, mantissa=2, group_size=16),
]


def started(fmt, seed=0):
    w = torch.randn(24, 64, generator=torch.Generator().manual_seed(seed))
    grid = fmt.fit(w)
    return w, grid.pack(grid.round(w, 0))


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label)
class TestRounding:
    def test_starts_where_the_earlier_pass_ended(self, fmt):
        w, packed = started(fmt)
        assert torch.equal(rounding(packed, w, "").weight(), packed.dequantize())

    def test_keeps_a_code_that_is_not_the_nearest(self, fmt):
        """Neighbours are those in the order of codes, up to the last."""
        w, packed = started(fmt)
        codes = fmt.codes(packed)
        half = codes.element.sign if isinstance(codes, FloatCodes) else 2**fmt.bits
        last = half - codes.element.reserved - 1 if isinstance(codes, FloatCodes) else half - 1
        other = codes.codes_OI // half * half + (codes.codes_OI % half + 1).clamp(max=last)
        moved = replace(codes, codes_OI=other.to(torch.uint8))
        start = rounding(fmt.stored(moved, packed.shape), w, "")
        assert torch.equal(start.weight(), values(moved))
        assert torch.equal(start.result().codes_OI, moved.codes_OI)
        assert float((start.latent_OI - start.rounded()[0]).abs().max()) > 0

    def test_result_is_what_it_computed_with(self, fmt):
        w, packed = started(fmt)
        trained = rounding(packed, w, "")
        trained.latent_OI += torch.randn(w.shape, generator=torch.Generator().manual_seed(1))
        trained.scale *= 1.1
        assert torch.equal(fmt.stored(trained.result(), packed.shape).dequantize(), trained.weight())

    def test_slopes_are_those_of_autograd_with_rounding_as_the_identity(self, fmt):
        w, packed = started(fmt)
        trained = rounding(packed, w, "")
        trained.latent_OI += torch.randn(w.shape, generator=torch.Generator().manual_seed(1))
        latent, scale = trained.latent_OI.clone().requires_grad_(), trained.scale.clone().requires_grad_()
        if isinstance(trained.codes, FloatCodes):
            numbers, factor = trained.codes.element.magnitudes, trained.codes.factor
            end = numbers[-1] + (numbers[-1] - numbers[-2]) / 2
            within = latent.clamp(-end, end)
        else:
            zero, factor = trained.spread(trained.codes.zero.float()), 1.0
            within = latent.clamp(min=-zero - 0.5, max=2**fmt.bits - 0.5 - zero)
        steps = within + (trained.weight() / trained.spread(trained.stored_scale()) - within).detach()
        upstream = torch.randn(w.shape, generator=torch.Generator().manual_seed(2))
        stored = scale * factor + (trained.stored_scale() - scale * factor).detach()
        (steps * trained.spread(stored) * upstream).sum().backward()
        by_latent, by_scale = trained.slopes(upstream)
        torch.testing.assert_close(by_latent, latent.grad)
        torch.testing.assert_close(by_scale, scale.grad)


class TestFloats:
    def test_scales_that_are_powers_of_two_stay(self):
        w, packed = started(MXFP4())
        trained = rounding(packed, w, "")
        trained.scale *= 3
        assert torch.equal(trained.result().scale.view(torch.uint8), packed.parts["weight_scale"])

    def test_activations_that_are_rounded_pass_their_gradient(self):
        """Else nothing before the last layer would be trained."""
        model, x = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 4)), torch.randn(5, 32)
        with rounded_inputs(model, {"1": rounding_of("mxfp4", {}.__getitem__)}):
            given = model(x)
            given.sum().backward()
        with torch.no_grad(), rounded_inputs(model, {"1": rounding_of("mxfp4", {}.__getitem__)}):
            assert torch.equal(given, model(x))
        expected = model[1].weight.sum(0)[:, None] * x.sum(0)
        torch.testing.assert_close(model[0].weight.grad, expected)


@pytest.mark.parametrize("fmt", [VQ(vector=4, bits=4), VQ(vector=8, bits=4, residual_bits=3)], ids=lambda fmt: fmt.label)
class TestVectors:
    def test_starts_where_the_earlier_pass_ended(self, fmt):
        w, packed = started(fmt)
        start = rounding(packed, w, "")
        assert torch.equal(start.weight(), packed.dequantize())
        assert not torch.equal(start.latent_OI, packed.dequantize())
        again = fmt.stored(start.result(), packed.shape)
        assert all(torch.equal(again.parts[name], part) for name, part in packed.parts.items())

    def test_keeps_an_entry_that_is_not_the_nearest(self, fmt):
        w, packed = started(fmt)
        codes = fmt.codes(packed)
        moved = replace(codes, index_VI=codes.index_VI.roll(1, 1))
        found = rounding(fmt.stored(moved, packed.shape), w, "").result()
        same = (found.index_VI == moved.index_VI).float().mean()
        assert same == 1 if fmt.residual_bits == 0 else same > 0.8  # of sums only the nearest few are tried

    def test_a_vector_is_rounded_to_the_nearest_once_it_is_sought_again(self, fmt):
        w, packed = started(fmt)
        trained = rounding(packed, w, "")
        trained.latent_OI += torch.randn(w.shape, generator=torch.Generator().manual_seed(1))
        trained.scale *= 1.1
        assert trained.moved(AGAIN - 1) is trained
        again = trained.moved(AGAIN)
        assert again.latent_OI is trained.latent_OI
        assert again.scale is trained.scale
        codes = again.result()
        grid = VectorGrid(fmt, codes.codebook.float(), None if codes.residual is None else codes.residual.float(), 64)
        assert torch.equal(again.weight(), grid.decode(grid.round(trained.latent_OI, 0), 0))

    def test_result_is_what_it_computed_with(self, fmt):
        w, packed = started(fmt)
        trained = rounding(packed, w, "")
        trained.latent_OI += 0.3 * torch.randn(w.shape, generator=torch.Generator().manual_seed(1))
        trained.scale *= 1.1
        assert torch.equal(fmt.stored(trained.result(), packed.shape).dequantize(), trained.weight())

    def test_slopes_are_those_of_autograd_with_rounding_as_the_identity(self, fmt):
        w, packed = started(fmt)
        trained = rounding(packed, w, "")
        upstream = torch.randn(w.shape, generator=torch.Generator().manual_seed(2))
        entries, codes = trained.scale.clone().requires_grad_(), fmt.codes(packed)
        found = entries[codes.index_VI.long()]
        if codes.residual_index_VI is not None:
            found = found + entries[codes.residual_index_VI.long() + len(codes.codebook)]
        (found.transpose(1, 2).flatten(0, 1) * upstream).sum().backward()
        by_latent, by_entry = trained.slopes(upstream)
        assert torch.equal(by_latent, upstream)
        torch.testing.assert_close(by_entry, entries.grad)


FMT = IntGroup(bits=3, group_size=64)


def working_on(fmt):
    """A stream before a block that has been rounded, and the block."""
    source = ModelSource(DEMO_MODEL, CPU)
    tokens = torch.randint(4096, (4, 32), generator=torch.Generator().manual_seed(0))
    metrics = [torch.eye(256)] * len(source.layers)
    stream = CalibrationStream(source.first_inputs(tokens.split(2)), Ranks(), CPU, two_streams=True, metrics=metrics)
    block = source.block(0)
    block.unrounded = {}
    stream.enter(block)
    first = RTN(options=(fmt,))
    block.install(first.apply(block, stream.collect(block, (), ()), dict.fromkeys(first.units(block), fmt)).edits)
    return stream, block


@pytest.fixture
def at_work():
    return working_on(FMT)


def train(stream, block, **options):
    step = Learned(steps=10, batch=2, lr=0.06, **options)
    return step.apply(block, stream.collect(block, list(step.units(block)), step.needs), {})


def missed(stream, block, edits):
    """The squared error of the block's output, by another way than the pass computes it: install and run."""
    block.install(edits)
    out = torch.cat([block.forward(h) for h in stream.hidden])
    return float((out - torch.cat(stream.targets)).double().square().sum())


@pytest.mark.parametrize("sensitivity", [False, True])
def test_brings_the_output_of_a_block_nearer_to_that_of_the_dense_one(at_work, sensitivity):
    stream, block = at_work
    before = missed(stream, block, {})
    assert missed(stream, block, train(stream, block, sensitivity=sensitivity).edits) < 0.9 * before


@pytest.mark.parametrize("fmt", [VQ(vector=4, bits=6), VQ(vector=4, bits=4, residual_bits=3)], ids=lambda fmt: fmt.label)
def test_vectors_are_trained_too(fmt):
    stream, block = working_on(fmt)
    before = missed(stream, block, {})
    edits = train(stream, block).edits
    assert {new.format for new in edits.values()} == {fmt}
    assert missed(stream, block, edits) < 0.9 * before


def test_formats_and_sizes_stay(at_work):
    stream, block = at_work
    start = dict(block.installed)
    edits = train(stream, block).edits
    assert edits.keys() == start.keys() == block.layers.keys()
    for name, new in edits.items():
        assert new.format == FMT
        assert {p: (t.dtype, t.shape) for p, t in new.parts.items()} == {
            p: (t.dtype, t.shape) for p, t in start[name].parts.items()
        }


def test_changes_nothing_itself(at_work):
    stream, block = at_work
    before = {name: (block.weight(name).clone(), dense(new).clone()) for name, new in block.installed.items()}
    train(stream, block)
    for name, (weight, stored) in before.items():
        assert torch.equal(block.weight(name), weight)
        assert torch.equal(dense(block.installed[name]), stored)


def test_is_the_same_twice_and_another_with_another_seed(at_work):
    one, two, other = (train(*at_work, seed=seed).edits for seed in (0, 0, 1))
    assert all(torch.equal(dense(one[name]), dense(two[name])) for name in one)
    assert not all(torch.equal(dense(one[name]), dense(other[name])) for name in one)


def test_what_training_made_worse_is_not_kept(at_work):
    stream, block = at_work
    start = dict(block.installed)
    step = Learned(steps=2, batch=2, lr=1.0, scale_lr=1.0)
    outcome = step.apply(block, stream.collect(block, list(step.units(block)), step.needs), {})
    assert all(torch.equal(dense(outcome.edits[name]), dense(start[name])) for name in start)
    assert "did not lower" in outcome.warnings[0]


def test_targets_are_what_the_dense_model_computes(at_work):
    """Two blocks deep, with a compressed first block in between."""
    stream, block = at_work
    stream.advance(block)
    source = ModelSource(DEMO_MODEL, CPU)
    second = source.block(1)
    stream.enter(second)
    tokens = torch.randint(4096, (4, 32), generator=torch.Generator().manual_seed(0))
    model = ModelSource(DEMO_MODEL, CPU).whole()
    expected = model(tokens, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(torch.cat(stream.targets), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(torch.cat(stream.hidden), torch.cat(stream.dense), rtol=1e-2, atol=1e-2)


def test_needs_something_rounded():
    source = ModelSource(DEMO_MODEL, CPU)
    stream = CalibrationStream(source.first_inputs([torch.ones(1, 8, dtype=torch.long)]), Ranks(), CPU, two_streams=True)
    with pytest.raises(RecipeError, match=r"model.layers.0: no earlier pass has rounded a layer; put `gptq`"):
        train(stream, source.block(0))
