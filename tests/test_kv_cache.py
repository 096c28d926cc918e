"""A cache of 8 bits: scales found, written and read. The oracle is compressed-tensors, alone and in transformers."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from tiny_models import change_tensors, exact, some_tokens, stock_logits, tensors
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

import compressor
from compressor import api
from compressor.cli import main
from compressor.errors import CalibrationError, RecipeError, SourceError
from compressor.evaluation.verify.loaders import streamed_logits
from compressor.evaluation.verify.verify import verify
from compressor.model.hf_config.quantization_config import cache_rounding
from compressor.model.source import ModelSource
from compressor.model.surgery.kv_cache import CacheRounding, read_scheme
from compressor.passes.quantize.kv_cache import KVCache
from compressor.pipeline import blocks
from compressor.pipeline.plan import make_plan
from compressor.pipeline.write_model import default_out
from compressor.recipe.schema import Recipe, make_recipe
from compressor.report.inspect import inspect_model
from compressor.runtime.packed_linear import PackedWeight

Tiny = Callable[..., Path]
CPU = torch.device("cpu")
FP8, INT8 = CacheRounding(kv_cache="fp8"), CacheRounding(kv_cache="int8")
SLIPS = 2e-3  # mean difference of logits when sums in another order take some numbers to the next step


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def recipe(dtype: str, *, cached: bool = True, fmt: str = "int_group") -> Recipe:
    """Rounding to 8 bits, with scales for the cache or without."""
    weights = {"pass": "rtn", "options": [{"format": fmt, "bits": 8}]}
    cache = [{"pass": "kv_cache", "dtype": dtype}] if cached else []
    return make_recipe({"passes": [weights, *cache], "calibration": {"samples": 4, "seq_len": 32}, "evaluation": None})


@pytest.fixture
def quantized(tiny: Tiny, tmp_path: Path) -> Callable[..., Path]:
    """`quantized(dtype, family)`: a tiny model of 8 bits with scales for its cache."""

    def make(dtype: str, family: str = "llama", **options: bool) -> Path:
        out = tmp_path / "-".join((family, dtype, *map(str, options.values())))
        api.run(recipe(dtype, **options), tiny(family), out, device="cpu", verify=False)
        return out

    return make


def difference(a: Tensor, b: Tensor) -> float:
    """Mean, of logits."""
    return float((a - b).abs().mean())


class TestRounding:
    @pytest.mark.parametrize("rounding", [FP8, INT8], ids=lambda r: r.label)
    def test_it_is_that_of_compressed_tensors_bit_for_bit(self, rounding: CacheRounding) -> None:
        x = torch.randn(2, 3, 40, 32, generator=torch.Generator().manual_seed(0)) ** 3
        for largest in (x.abs().max(), x.abs().max() / 3):  # also where it is cut off
            scale = rounding.scale(largest)
            expected = fake_quantize(x, scale.float(), None, QuantizationArgs(**rounding.scheme()))
            assert torch.equal(rounding.round(x, scale), expected)

    def test_the_largest_number_is_kept(self) -> None:
        for rounding, share in ((FP8, 1 / 16), (INT8, 1 / 127)):
            for largest in (1e-3, 0.7, 300.0):
                x = torch.tensor([largest])
                assert float(rounding.round(x, rounding.scale(x))) == pytest.approx(largest, rel=share)

    @pytest.mark.parametrize("rounding", [FP8, INT8], ids=lambda r: r.label)
    def test_a_scheme_is_read_back(self, rounding: CacheRounding) -> None:
        assert read_scheme(rounding.scheme()) == rounding
        as_llm_compressor_has_it = QuantizationArgs(**rounding.scheme()).model_dump(mode="json")
        assert read_scheme(as_llm_compressor_has_it) == rounding

    @pytest.mark.parametrize("change", [{"strategy": "attn_head"}, {"dynamic": True}, {"num_bits": 4}, {"symmetric": False}])
    def test_another_scheme_is_refused(self, change: dict[str, object]) -> None:
        config = {"quant_method": "compressed-tensors", "kv_cache_scheme": {**FP8.scheme(), **change}}
        with pytest.raises(SourceError, match=r"^here: quantization_config cannot be read \(kv_cache_scheme of num_bits"):
            cache_rounding({"quantization_config": config}, "here")


class TestScales:
    @pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma2"])
    def test_they_are_of_the_largest_numbers_in_the_cache_of_transformers(self, family: str, tiny: Tiny) -> None:
        """Keys are those after the rotary embedding, and after what norms a family has for them."""
        tokens, source = some_tokens(3, 40), ModelSource(tiny(family), CPU)
        model = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32)
        cache = DynamicCache()  # without a window: all keys stay
        model(tokens, past_key_values=cache, use_cache=True)
        group = SimpleNamespace(device=CPU, max_=lambda tensors: None)
        hidden = source.first_inputs([tokens])
        step = KVCache(dtype="int8")
        for index, block in enumerate(source.blocks()):
            found = step.apply(block, SimpleNamespace(inputs=hidden, ranks=group), step.units(block))  # type: ignore[arg-type]
            assert (found.edits, found.errors) == ({}, {})
            assert found.cache is not None
            scales = [float(scale) for scale in found.cache.tensors().values()]
            largest = [float(states.abs().max()) for states in (cache.layers[index].keys, cache.layers[index].values)]
            assert scales == pytest.approx([one / 127.5 for one in largest], rel=2**-8)
            assert list(found.cache.tensors()) == ["self_attn.k_scale", "self_attn.v_scale"]
            hidden = [block.forward(one) for one in hidden]

    def test_text_that_gives_none_is_refused(self, tiny: Tiny) -> None:
        block = ModelSource(tiny("llama"), CPU).block(0)
        group = SimpleNamespace(device=CPU, max_=lambda tensors: None)
        with pytest.raises(CalibrationError, match=r"model\.layers\.0\.self_attn: its largest key is 0 and .* other text"):
            KVCache().apply(block, SimpleNamespace(inputs=[], ranks=group), KVCache().units(block))  # type: ignore[arg-type]

    def test_a_model_whose_keys_cannot_be_got_at_is_refused(self, tiny: Tiny) -> None:
        with pytest.raises(RecipeError, match=r"^gpt_neox\.layers\.0: kv_cache finds no attention with a k_proj"):
            make_plan(ModelSource(tiny("gpt_neox"), CPU), [KVCache()])

    def test_they_are_not_all_that_is_done(self, tiny: Tiny) -> None:
        with pytest.raises(RecipeError, match="kv_cache rounds no weight, and nothing else does; put `rtn`"):
            make_plan(ModelSource(tiny("llama"), CPU), [KVCache()])


class TestModels:
    @pytest.mark.parametrize(("dtype", "family"), [("fp8", "llama"), ("int8", "llama"), ("fp8", "qwen3"), ("int8", "gemma3")])
    def test_all_loaders_compute_what_stock_transformers_does(
        self, dtype: str, family: str, quantized: Callable[..., Path]
    ) -> None:
        """Which finds the scheme and the scales, and rounds: without, the difference is far larger."""
        path, tokens = quantized(dtype, family), some_tokens(1, 40)
        expected = stock_logits(path, tokens)
        streamed = streamed_logits(ModelSource(path, CPU), tokens, lambda done, total, what: None)
        whole = compressor.load(path, dtype=torch.float32, dense=True)
        ours = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for module in ours.modules():
            if isinstance(module, PackedWeight):
                module.kernel = "reference"
        for found in (streamed[None], whole(tokens).logits, exact(path)(tokens).logits, ours(tokens).logits):
            assert difference(found, expected) < SLIPS
        plain = exact(quantized(dtype, family, cached=False))
        assert difference(plain(tokens).logits, expected) > 3 * SLIPS

    def test_decoding_step_by_step_rounds_each_key_once(self, quantized: Callable[..., Path]) -> None:
        model, tokens = exact(quantized("int8")), some_tokens(2, 40)
        past, steps = None, []
        for first in range(0, 40, 8):
            out = model(tokens[:, first : first + 8], past_key_values=past, use_cache=True)
            past = out.past_key_values
            steps.append(out.logits)
        assert difference(torch.cat(steps, 1), model(tokens).logits) < SLIPS
        held = past.layers[0].keys / model.model.layers[0].self_attn.k_scale.float()
        torch.testing.assert_close(held, held.round(), rtol=0, atol=1e-4)

    @pytest.mark.parametrize("load", [compressor.load, AutoModelForCausalLM.from_pretrained])
    def test_a_loaded_model_is_saved_as_it_was(
        self, load: Callable[[Path], torch.nn.Module], quantized: Callable[..., Path], tmp_path: Path
    ) -> None:
        path = quantized("fp8")
        load(path).save_pretrained(tmp_path / "again")  # type: ignore[operator]
        before, after = tensors(path), tensors(tmp_path / "again")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name].float(), after[name].float()) for name in before if name.endswith("_scale"))
        assert difference(stock_logits(tmp_path / "again", some_tokens()), stock_logits(path, some_tokens())) < SLIPS

    def test_a_missing_scale_is_named(self, quantized: Callable[..., Path]) -> None:
        path = quantized("fp8")
        change_tensors(path, lambda content: content.pop("model.layers.1.self_attn.v_scale"))
        with pytest.raises(
            SourceError, match=r"model\.layers\.1\.self_attn\.v_scale is missing, which kv_cache_scheme needs"
        ):
            compressor.load(path)

    def test_a_divergence_includes_the_rounding(self, quantized: Callable[..., Path], tiny: Tiny) -> None:
        options = {"samples": 4, "seq_len": 32, "device": "cpu"}
        found = [compressor.evaluate(quantized("fp8", cached=one), tiny("llama"), **options) for one in (True, False)]
        assert found[0].to_dict()["kl"] > 2 * found[1].to_dict()["kl"]


class TestRuns:
    def test_what_is_written_is_verified_and_told(
        self, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "out"
        planned = api.forecast(recipe("fp8"), tiny("llama"), out, device="cpu")
        report = api.run(recipe("fp8"), tiny("llama"), out, device="cpu", verify=False)
        assert report.size_bytes == planned.size_bytes
        checks = {check.check: check.outcome for check in verify(out, tiny("llama"))}
        assert set(checks.values()) == {"passed"}, checks
        assert checks.keys() >= {"transformers", "reference", "logits"}
        found = inspect_model(out)
        assert found.kv_cache == "fp8"
        assert next(kind for kind in found.kinds if kind.name == "scales of the cache").size_bytes == 2 * 2 * 2
        assert {runtime.name for runtime in found.runtimes if runtime.loads} == {
            "compressor",
            "transformers",
            "vLLM",
            "SGLang",
        }
        monkeypatch.setattr("sys.argv", ["compress", "inspect", str(out)])
        with pytest.raises(SystemExit):
            main()
        assert "cache in fp8" in " ".join(capsys.readouterr().out.split())

    def test_engines_hold_fp8_only(self, quantized: Callable[..., Path]) -> None:
        found = {runtime.name: runtime for runtime in inspect_model(quantized("int8")).runtimes}
        assert found["transformers"].loads
        assert not found["vLLM"].loads
        assert "caches hold fp8, this model was made for one of int8" in found["vLLM"].reason

    def test_a_layout_of_others_that_has_no_word_for_it_is_not_used(self, tiny: Tiny, tmp_path: Path) -> None:
        api.run(recipe("fp8", fmt="gptq_int"), tiny("llama"), tmp_path / "out", device="cpu", verify=False)
        config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
        assert (config["quant_method"], config["kv_cache_scheme"]) == ("compressor", FP8.scheme())
        assert ModelSource(tmp_path / "out", CPU).cache == FP8

    def test_the_directory_is_named_for_it(self, tiny: Tiny) -> None:
        source = ModelSource(tiny("llama"), CPU)
        assert default_out(Path("/models/tiny"), (), make_plan(source, recipe("fp8").passes)).name == "tiny-int8g128-kv-fp8"

    def test_an_interrupted_run_goes_on_with_the_scales_it_had(
        self, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        work = blocks.compress_block

        def only_the_first(job: blocks.Job, block: blocks.Block, *more: object) -> object:
            if block.index == 1:
                raise KeyboardInterrupt
            return work(job, block, *more)  # type: ignore[arg-type]

        monkeypatch.setattr(blocks, "compress_block", only_the_first)
        with pytest.raises(KeyboardInterrupt):
            api.run(recipe("int8"), tiny("llama"), tmp_path / "cut", device="cpu", verify=False)
        monkeypatch.setattr(blocks, "compress_block", work)
        api.run(recipe("int8"), tiny("llama"), tmp_path / "cut", device="cpu", verify=False, resume=True)
        api.run(recipe("int8"), tiny("llama"), tmp_path / "whole", device="cpu", verify=False)
        for name in ("model.safetensors", "config.json", "manifest.json", "plan.yaml"):
            assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
