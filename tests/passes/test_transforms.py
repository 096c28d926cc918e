"""Passes that change nothing a model computes: they don't, they do what they are for, and they get through a whole run."""

import json

import pytest
import torch
from tiny_models import FAMILIES, some_tokens, stock_logits, tensors

from compressor import api
from compressor.assets import DEMO_MODEL
from compressor.errors import RecipeError
from compressor.evaluation.verify.verify import verify
from compressor.formats.float_group import FloatGroup
from compressor.formats.int_group import IntGroup
from compressor.formats.numerics.activations import FixedScale, scales
from compressor.model.block import Block
from compressor.model.dataflow import find_feeds
from compressor.model.source import ModelSource
from compressor.model.tokenizer import load_tokenizer
from compressor.passes.transform import learned_rotation
from compressor.passes.transform.awq import AWQ
from compressor.passes.transform.learned_rotation import gradient, learned, of_one_length, some_vectors
from compressor.passes.transform.preshift import Preshift
from compressor.passes.transform.rotate import Rotate
from compressor.passes.transform.rotation import Rotation
from compressor.passes.transform.smooth import Smooth
from compressor.pipeline.calibration.data import load_samples
from compressor.pipeline.calibration.stats import Hessian, Peak, Spread
from compressor.pipeline.calibration.stream import CalibrationStream, watching
from compressor.pipeline.job import Event
from compressor.pipeline.ranks import Ranks
from compressor.recipe.schema import make_recipe

CPU = torch.device("cpu")
FOUR_BITS = IntGroup(bits=4, group_size=64)
FP4 = FloatGroup(activations="e2m1-tensor")
SCALINGS = {"smooth": Smooth(), "awq": AWQ(format=FOUR_BITS), "preshift": Preshift(format=FP4)}
ALIKE = {"rtol": 0, "atol": 2e-5}  # logits of about 1 in fp32
PLAIN = (
    "llama",
    "llama_tied",
    "llama_biased",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
)  # norms without a mean, only before layers


@torch.no_grad()
def logits(source, blocks=None):
    """Of some tokens, streamed; `blocks` changes each block before it is used."""
    (hidden,) = source.first_inputs([some_tokens()])
    for block in source.blocks():
        if blocks is not None:
            blocks(block, hidden)
        hidden = block.forward(hidden)
    (result,) = source.logits([hidden])
    return result


def statistics(block, hidden, kinds):
    return CalibrationStream([hidden], Ranks(), CPU).collect(block, list(block.layers), kinds)


class TestScaling:
    @pytest.mark.parametrize(
        ("family", "step"),
        [
            *((family, "smooth") for family in FAMILIES),
            ("llama", "awq"),
            ("opt", "awq"),
            ("qwen3", "preshift"),
            ("opt", "preshift"),
        ],
    )
    def test_leaves_the_logits(self, family, step, tiny):
        changed = []

        def scale(block, hidden):
            before = {name: p.clone() for name, p in block.module.named_parameters()}
            block.install(SCALINGS[step].apply(block, statistics(block, hidden, SCALINGS[step].needs), {}).edits)
            changed.append(max(float((p - before[name]).abs().max()) for name, p in block.module.named_parameters()))

        source = ModelSource(tiny(family), CPU)
        torch.testing.assert_close(logits(source, scale), logits(source), **ALIKE)
        assert min(changed) > (0.01 if step != "preshift" else -1)  # where channels are alike nothing is shifted

    def test_finds_every_feed_of_a_gated_block(self, tiny):
        with_heads = list(find_feeds(ModelSource(tiny("qwen3"), CPU).block(0), 128))
        assert [(feed.writer, feed.readers) for feed in with_heads] == [
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("self_attn.v_proj", ("self_attn.o_proj",)),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
            ("mlp.up_proj", ("mlp.down_proj",)),
        ]

    def test_finds_no_feed_where_scaling_would_change_the_model(self, tiny):
        """OLMo 2 norms what its layers write, and OPT without norms before has them read the residual stream too."""
        for family in ("olmo2", "opt_projected"):
            feeds = find_feeds(ModelSource(tiny(family), CPU).block(0), 128)
            assert not [feed for feed in feeds if "norm" in feed.writer]

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_finds_the_same_in_any_precision(self, dtype, tiny):
        source = ModelSource(tiny("gemma2", dtype="bfloat16"), CPU, getattr(torch, dtype))
        assert len(find_feeds(source.block(0), 128)) == 4

    def test_rounding_a_norm_to_its_dtype_is_made_up_for(self, tiny):
        source = ModelSource(tiny("llama", dtype="bfloat16"), CPU)

        def scale(block, hidden):
            block.install(
                Smooth(layers=("q_proj", "k_proj", "v_proj")).apply(block, statistics(block, hidden, (Peak,)), {}).edits
            )
            gain = block.module.get_parameter("input_layernorm.weight")
            assert torch.equal(gain, gain.bfloat16().float())

        torch.testing.assert_close(logits(source, scale), logits(source), **ALIKE)

    def test_refuses_a_block_without_a_feed(self, tiny):
        block = ModelSource(tiny("gpt2"), CPU).block(0)
        with pytest.raises(RecipeError, match="no norm and no linear layer was found"):
            Smooth(layers=("c_proj",)).apply(block, statistics(block, torch.randn(1, 8, 128), (Peak,)), {})


class TestSmooth:
    def test_evens_out_the_ranges_of_activations_and_weights(self, tiny):
        hidden = torch.randn(2, 24, 128, generator=torch.Generator().manual_seed(0))
        hidden[..., 5] *= 30
        for readers in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.down_proj",)):
            block = ModelSource(tiny("llama"), CPU).block(0)
            block.install(Smooth(layers=readers).apply(block, statistics(block, hidden, (Peak,)), {}).edits)
            columns = torch.stack([block.weight(name).abs().amax(0) for name in readers]).amax(0)
            peaks = statistics(block, hidden, (Peak,))[readers[0], Peak].value
            torch.testing.assert_close(peaks, columns, rtol=1e-4, atol=0)

    @pytest.mark.parametrize("alpha", [-0.1, 1.1])
    def test_refuses_an_alpha_outside_its_range(self, alpha):
        with pytest.raises(ValueError, match="is not in 0 … 1"):
            Smooth(alpha=alpha)


class TestPreshift:
    """On what the norm before a gated MLP writes, some channels of which are large."""

    @pytest.fixture
    def at_work(self, tiny):
        hidden = torch.randn(4, 60, 128, generator=torch.Generator().manual_seed(0))
        block = ModelSource(tiny("llama"), CPU).block(0)
        gain = torch.ones(128)
        gain[::16] = 20
        block.install({"post_attention_layernorm.weight": gain})
        (feed,) = [f for f in find_feeds(block, 128) if f.writer == "post_attention_layernorm"]
        stats = statistics(block, hidden, (Spread,))
        weights = {name: block.weight(name).float() for name in feed.readers}
        return block, hidden, feed, weights, stats

    def test_factors_are_powers_of_two_and_bring_channels_together(self, at_work):
        _, _, feed, weights, stats = at_work
        factors = Preshift(format=FP4).factors(feed, weights, stats)
        exponents = factors.log2()
        assert torch.equal(exponents, exponents.round())
        assert len(set(exponents[::16].tolist())) == 1
        assert -5 <= (exponents[1:16] - exponents[0]).max() <= -2

    def test_the_error_of_the_readers_falls(self, at_work):
        """Oracle: the readers' outputs themselves, with activations and weights rounded, each scale at its best."""
        block, hidden, feed, weights, stats = at_work
        seen = []
        reader = block.module.get_submodule(feed.readers[0])
        handle = reader.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach()))
        block.forward(hidden)
        handle.remove()
        x = seen[0].flatten(0, 1)

        def error(factors):
            missed = []
            for scale in scales(FP4.input_elements[0], float((x / factors).abs().max())):
                rounded = FixedScale(FP4.input_elements[0], scale)(x / factors)
                total = 0.0
                for w in weights.values():
                    grid = FP4.fit(w * factors, (x / factors).square().mean(0))
                    total += float((rounded @ grid.decode(grid.round(w * factors, 0), 0).T - x @ w.T).square().mean())
                missed.append(total)
            return min(missed)

        found = error(Preshift(format=FP4).factors(feed, weights, stats))
        assert found < 0.5 * error(torch.ones(128))
        for doubled in (2.0, 0.5):  # of all but the large ones
            other = torch.full((128,), doubled) * Preshift(format=FP4).factors(feed, weights, stats)
            other[::16] = 1
            assert found < 1.02 * error(other)

    def test_a_format_that_rounds_no_activations_by_one_scale_is_refused(self, at_work):
        _, _, feed, weights, stats = at_work
        for fmt in (FOUR_BITS, FloatGroup(), FloatGroup(activations="e2m1-token")):
            with pytest.raises(RecipeError, match=r"preshift: .* does not round activations by one scale"):
                Preshift(format=fmt).factors(feed, weights, stats)


class TestAWQ:
    def test_no_layers_error_grows_and_some_shrink(self):
        """The error is that of the outputs, computed from them: an independent derivation of what the pass minimises."""
        source = ModelSource(DEMO_MODEL, CPU)
        texts = load_samples("builtin", load_tokenizer(DEMO_MODEL), samples=8, seq_len=64, seed=0).tokens
        (hidden,) = source.first_inputs([texts])
        block = source.block(0)
        fmt, feeds = IntGroup(bits=3, group_size=128), find_feeds(block, hidden.shape[-1])
        before = rounding_errors(block, hidden, fmt)
        block.install(AWQ(format=fmt).apply(block, statistics(block, hidden, (Hessian,)), {}).edits)
        after = rounding_errors(block, hidden, fmt)
        gains = [sum(after[n] for n in feed.readers) / sum(before[n] for n in feed.readers) for feed in feeds]
        assert len(gains) == 4
        assert max(gains) < 1 + 1e-3
        assert min(gains) < 0.97


def rounding_errors(block: Block, hidden, fmt):
    """By layer: squared error of the output, relative to it, if its weight were rounded now."""
    inputs = {}
    with watching(block, block.layers, lambda name, x: inputs.update({name: x.flatten(0, -2)})), torch.no_grad():
        block.forward(hidden)
    errors = {}
    for name, x in inputs.items():
        grid = fmt.fit(block.weight(name), search=False)
        values = grid.pack(grid.round(block.weight(name), 0)).dequantize()
        exact = x @ block.weight(name).T
        errors[name] = float((x @ values.T - exact).square().sum() / exact.square().sum())
    return errors


class TestRotation:
    @pytest.mark.parametrize("size", [1, 2, 3, 12, 64, 128, 384, 896])
    def test_is_orthogonal(self, size):
        r = Rotation.random(size, 0)(torch.eye(size)).double()
        torch.testing.assert_close(r @ r.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-6)

    def test_of_a_power_of_two_spreads_evenly(self):
        r = Rotation.random(256, 0)(torch.eye(256))
        torch.testing.assert_close(r.abs(), torch.full((256, 256), 1 / 16))

    def test_depends_on_the_seed_alone(self):
        x = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
        assert torch.equal(Rotation.random(24, 1)(x), Rotation.random(24, 1)(x))
        assert not torch.allclose(Rotation.random(24, 1)(x), Rotation.random(24, 2)(x), atol=0.1)

    def test_turns_rows_one_by_one_and_vectors_side_by_side(self):
        turn, x = Rotation.random(12, 0), torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
        r = turn(torch.eye(12))
        torch.testing.assert_close(turn(x), torch.cat([x[:, :12] @ r, x[:, 12:] @ r], 1))
        torch.testing.assert_close(turn.transposed(x.T), turn(x).T)


class TestLearnedRotation:
    def test_is_the_best_of_all_in_a_plane(self):
        """Every angle is tried: the vectors lie along two axes at an angle, which the best rotation puts between its own."""
        along = torch.randn(200, 1, generator=torch.Generator().manual_seed(0)).sign().double()
        x = torch.cat([along * torch.tensor([0.96, 0.28]), along * torch.tensor([-0.28, 0.96])]) * 2**0.5
        angles = torch.linspace(0, torch.pi, 2001).double()
        turns = torch.stack([torch.stack([angles.cos(), angles.sin()]), torch.stack([-angles.sin(), angles.cos()])])
        best = torch.einsum("xn,nma->axm", x, turns).pow(4).mean((1, 2)).min()
        start = Rotation(torch.ones(2).double(), (torch.eye(2).double(),))
        found = learned(start, lambda step: x, 100)(x).pow(4).mean()
        assert found <= best + 1e-3 < start(x).pow(4).mean() - 0.5

    def test_lowers_what_it_is_to_lower_on_vectors_it_never_saw_and_stays_orthogonal(self):
        mixed = torch.randn(4000, 24, generator=torch.Generator().manual_seed(0)) ** 3 @ Rotation.random(24, 7)(torch.eye(24))
        seen, unseen = mixed[:3000], of_one_length(mixed[3000:])
        start = Rotation.random(24, 0)
        turns = [start, *(learned(start, lambda step: some_vectors(seen, 500, step), steps) for steps in (5, 100))]
        losses = [float(turn(unseen).pow(4).mean()) for turn in turns]
        assert losses[0] > losses[1] > losses[2]
        r = turns[-1](torch.eye(24)).double()
        torch.testing.assert_close(r @ r.T, torch.eye(24, dtype=torch.float64), rtol=0, atol=1e-6)

    def test_takes_vectors_of_one_length(self):
        x = of_one_length(torch.randn(7, 12) * torch.arange(7)[:, None])
        assert len(x) == 6
        torch.testing.assert_close(x.square().mean(1), torch.ones(6).double())

    def test_depends_on_directions_alone(self):
        x = torch.randn(300, 8, generator=torch.Generator().manual_seed(0)).double()
        lengths = torch.rand(300, 1, generator=torch.Generator().manual_seed(1)) + 0.1
        turns = [learned(Rotation.random(8, 0), lambda step, x=x: x, 20)(torch.eye(8)) for x in (x, x * lengths)]
        torch.testing.assert_close(*turns)

    @pytest.mark.parametrize("strip", [2**22, 60])
    def test_follows_the_gradient(self, strip, monkeypatch):
        monkeypatch.setattr(learned_rotation, "STRIP", strip)
        x = torch.randn(3000, 6, generator=torch.Generator().manual_seed(0)).double() ** 3
        r = Rotation.random(6, 0)(torch.eye(6)).double().requires_grad_()
        (of_one_length(x) @ r).pow(4).sum().backward()
        torch.testing.assert_close(4 * gradient(x, r.detach()), r.grad)

    def test_tells_how_far_it_is(self):
        told = []
        learned(Rotation.random(4, 0), lambda step: torch.ones(3, 4).double(), 25, lambda *step: told.append(step))
        assert told[-1] == (25, 25)
        assert len(told) == 10

    def test_is_left_out_where_only_sizes_matter(self, tiny):
        told = []
        Rotate(learn=3).rewriting(ModelSource(tiny("llama"), CPU), lambda *step: told.append(step), sizes_only=True)
        assert not told

    def test_refuses_fewer_than_no_steps(self):
        with pytest.raises(ValueError, match="learn: -1 is no number of steps"):
            Rotate(learn=-1)


class TestRotate:
    @pytest.mark.parametrize(
        "options",
        [{}, {"residual": False}, {"heads": False, "seed": 3}, {"online": True}, {"learn": 5}],
        ids=str,
    )
    @pytest.mark.parametrize("family", PLAIN)
    def test_leaves_the_logits(self, family, options, tiny):
        if family == "phi3" and options.get("residual") is False:
            pytest.skip("its values are written by a fused layer")
        source = ModelSource(tiny(family), CPU)
        rotated = ModelSource(tiny(family), CPU, rewritings=[Rotate(**options).rewriting(source)])
        torch.testing.assert_close(logits(rotated), logits(source), **ALIKE)
        name = next(name for name in source.names if name.endswith("o_proj.weight"))
        assert not torch.allclose(rotated.read(name), source.read(name), atol=0.1)

    @pytest.mark.parametrize(
        ("family", "layers"),
        [
            ("opt", {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}),
            ("gpt2", {"c_attn", "c_proj", "c_fc"}),
            ("gemma2", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
            ("phi3", {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
        ],
    )
    @pytest.mark.parametrize("block", [0, 32])
    def test_turns_activations_of_all_layers_where_nothing_else_is_rotated(self, family, layers, block, tiny):
        source = ModelSource(tiny(family), CPU)
        rewriting = Rotate(residual=False, heads=False, online=True, block=block).rewriting(source)
        assert {name.rpartition(".")[2] for name in rewriting.hadamard} == layers
        assert not block or set(rewriting.hadamard.values()) == {block}
        torch.testing.assert_close(logits(ModelSource(tiny(family), CPU, rewritings=[rewriting])), logits(source), **ALIKE)

    def test_turns_activations_of_those_that_are_left(self, tiny):
        source = ModelSource(tiny("qwen3"), CPU)
        for options, layers in (({}, {"down_proj"}), ({"heads": False}, {"down_proj", "o_proj"})):
            rewriting = Rotate(online=True, **options).rewriting(source)
            assert {name.rpartition(".")[2] for name in rewriting.hadamard} == layers

    @pytest.mark.parametrize("block", [-1, 3, 48])
    def test_refuses_blocks_that_are_no_power_of_two(self, block):
        with pytest.raises(ValueError, match=f"block: {block} is no power of two"):
            Rotate(online=True, block=block)

    def test_folds_the_gains_of_norms(self, tiny):
        source = ModelSource(tiny("qwen3"), CPU)
        rotated = ModelSource(tiny("qwen3"), CPU, rewritings=[Rotate().rewriting(source)])
        norms = [name for name in source.names if name.endswith("norm.weight") and "self_attn" not in name]
        assert len(norms) == 5
        assert all(torch.equal(rotated.read(name), torch.ones(128)) for name in norms)

    @pytest.mark.parametrize("family", ["gemma2", "gemma3", "gemma3_vision", "olmo2", "gpt_neox", "opt", "gpt2"])
    def test_refuses_a_residual_stream_that_cannot_be_rotated(self, family, tiny):
        with pytest.raises(RecipeError, match="set residual: false"):
            Rotate().rewriting(ModelSource(tiny(family), CPU))

    def test_refuses_to_do_nothing(self, tiny):
        with pytest.raises(RecipeError, match=r"nothing in .* can be rotated"):
            Rotate(residual=False).rewriting(ModelSource(tiny("phi3"), CPU))

    def test_must_come_first(self, tiny, tmp_path):
        recipe = make_recipe({"passes": [rounding(), {"pass": "rotate"}]})
        with pytest.raises(RecipeError, match=r"passes\.1: .* put it first"):
            api.run(recipe, tiny("llama"), tmp_path / "out", device="cpu")


def rounding(**more):
    return {"pass": "rtn", "options": [{"format": "int_group", "bits": 8, "group_size": 64}], **more}


RUNS = {
    "smooth": [{"pass": "smooth"}, rounding(ignore=["q_proj", "up_proj"])],
    "awq": [{"pass": "awq", "format": {"format": "int_group", "bits": 8, "group_size": 64}}, rounding(ignore=["v_proj"])],
    "rotate": [{"pass": "rotate"}, rounding(ignore=["o_proj"])],
    "learned": [{"pass": "rotate", "learn": 5}, rounding()],
    "all": [{"pass": "rotate"}, {"pass": "smooth", "alpha": 0.3}, rounding(layers=["down_proj"])],
}


@pytest.mark.parametrize("case", RUNS)
class TestRun:
    def recipe(self, case, text_file):
        calibration = {"source": str(text_file), "samples": 8, "seq_len": 32}
        return make_recipe({"passes": RUNS[case], "calibration": calibration, "evaluation": None})

    def test_transformers_computes_what_the_original_does(self, case, tiny, tmp_path, text_file):
        """Eight bits leave the logits nearly as they are; a transform that got lost on the way would not."""
        model, out, tokens = tiny("qwen2"), tmp_path / "out", some_tokens()
        forecast = api.forecast(self.recipe(case, text_file), model, device="cpu")
        report = api.run(self.recipe(case, text_file), model, out, device="cpu", verify=False)
        assert forecast.size_bytes == report.size_bytes == sum(f.stat().st_size for f in out.glob("*.safetensors*"))
        expected = stock_logits(model, tokens)
        assert float((stock_logits(out, tokens) - expected).norm() / expected.norm()) < 0.05
        (check,) = [check for check in verify(out, model) if check.check == "reference"]
        assert check.outcome == "passed", check.detail
        tied = json.loads((out / "config.json").read_text())["tie_word_embeddings"]
        assert tied != ("lm_head.weight" in tensors(out))
        assert tied == ("rotate" not in str(RUNS[case]))

    def test_goes_on_from_where_it_was_interrupted(self, case, tiny, tmp_path, text_file):
        model, recipe = tiny("llama_tied", dtype="bfloat16"), self.recipe(case, text_file)

        def stop(event: Event) -> None:
            if event.stage == "compress" and event.done == 1 and not event.what:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            api.run(recipe, model, tmp_path / "two", device="cpu", dtype="float32", verify=False, tell=stop)
        api.run(recipe, model, tmp_path / "two", device="cpu", dtype="float32", verify=False, resume=True)
        api.run(recipe, model, tmp_path / "one", device="cpu", dtype="float32", verify=False)
        one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
