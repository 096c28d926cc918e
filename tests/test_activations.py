"""Rounded activations: what is computed, written and read. The oracle is compressed-tensors, alone and in transformers."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from tiny_models import change_config, change_tensors, exact, some_tokens, stock, stock_logits, tensors
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import compressor
from compressor import api
from compressor.errors import SourceError
from compressor.evaluation.verify.loaders import streamed_logits
from compressor.evaluation.verify.verify import verify
from compressor.formats.base import Format
from compressor.formats.float_group import FloatGroup
from compressor.formats.fp8 import FP8
from compressor.formats.int_group import IntGroup
from compressor.formats.mxfp4 import MXFP4
from compressor.formats.mxfp8 import MXFP8
from compressor.formats.numerics.activations import (
    SCHEMES,
    FixedScale,
    FloatTokens,
    Seen,
    round_inputs,
    round_tokens,
    rounding,
    scales,
    static_part,
    token_scales,
    way,
)
from compressor.formats.numerics.minifloat import Minifloat
from compressor.formats.nvfp4 import NVFP4
from compressor.model.hf_config import quantization_config
from compressor.model.source import ModelSource
from compressor.pipeline.calibration.stats import Spread
from compressor.recipe.schema import make_recipe
from compressor.report.inspect import inspect_model
from compressor.runtime.packed_linear import PackedWeight

Tiny = Callable[..., Path]
W8A8 = IntGroup(bits=8, group_size=-1, packed=False, activations="int8")
W4A8 = IntGroup(bits=4, group_size=128, activations="int8")
SLIPS = 5e-3  # mean difference of logits when sums in another order take some activations to the next step
FORMATS = {
    "w8a8": W8A8,
    "w4a8": W4A8,
    "w4a8 in bytes": IntGroup(bits=4, group_size=32, packed=False, activations="int8"),
    "w3a8": IntGroup(bits=3, group_size=-1, activations="int8"),
    "w8a8 with zero points": IntGroup(bits=8, group_size=-1, symmetric=False, packed=False, activations="int8"),
}

FLOATS: list[Format] = [
    NVFP4(activations="nvfp4"),
    NVFP4(activations="fp8"),
    MXFP4(activations="mxfp4"),
    MXFP4(activations="mxfp8"),
    MXFP8(),
    MXFP8(activations="mxfp8"),
    FP8(scales="tensor"),
    FP8(scales="tensor", activations="fp8-static"),
    FP8(scales="channel", activations="fp8"),
    FP8(scales="block", activations="fp8-block"),
    FloatGroup(exponent=2, mantissa=1, activations="e2m1-tensor"),
    FloatGroup(exponent=3, mantissa=2, group_size=64, activations="e4m3-token"),
]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def quantized(tiny: Tiny, tmp_path: Path) -> Callable[..., Path]:
    """`quantized(fmt, family)`: a tiny model with every layer in a format."""

    def make(fmt: Format, family: str = "llama") -> Path:
        calibration = {"samples": 4, "seq_len": 32}
        recipe = make_recipe({"passes": [{"pass": "rtn", "options": [fmt]}], "calibration": calibration, "evaluation": None})
        out = tmp_path / f"{family}-{fmt.label}"
        api.run(recipe, tiny(family), out, device="cpu", verify=False)
        return out

    return make


def activations(*shape: int) -> Tensor:
    """Some of them outliers, one token zero."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    x[..., ::17] *= 30
    x[0, 3] = 0
    return x


def theirs(x_BSI: Tensor, name: str = "int8", stored: float = 1.0) -> Tensor:
    """What compressed-tensors makes of activations."""
    arguments = QuantizationArgs(**SCHEMES[name])
    if not arguments.dynamic:
        return fake_quantize(x_BSI, torch.tensor([stored]), torch.zeros(1), arguments)
    divisor = torch.tensor([stored]) if name == "nvfp4" else None
    scale, zero = compute_dynamic_scales_and_zp(x_BSI, arguments, nn.Linear(1, 1), global_scale=divisor)
    return fake_quantize(x_BSI, scale, zero, arguments, global_scale=divisor)


def difference(a: Tensor, b: Tensor) -> float:
    """Mean, of logits."""
    return float((a - b).abs().mean())


class TestRounding:
    def test_it_is_that_of_compressed_tensors_bit_for_bit(self) -> None:
        x = activations(3, 40, 200)
        assert torch.equal(round_tokens(x), theirs(x))

    @pytest.mark.parametrize("name", SCHEMES)
    @pytest.mark.parametrize("stored", [0.01, 0.3, 20.0])
    def test_so_are_all_that_it_knows(self, name: str, stored: float) -> None:
        """A group whose NVFP4 scale rounds to zero it gives a scale of 1/8, by which all of it becomes zero nearly always."""
        x = activations(3, 40, 256)
        found, expected = rounding(name, lambda part: torch.tensor([stored]))(x), theirs(x, name, stored)
        if name == "nvfp4" and stored == 0.01:
            assert not found[expected == 0].any()
        else:
            assert torch.equal(found, expected)

    def test_zeros_stay_zeros(self) -> None:
        for name in SCHEMES:
            assert not rounding(name, lambda part: torch.ones(1))(torch.zeros(2, 3, 256)).any()

    @pytest.mark.parametrize("name", ["e2m1", "e1m2", "e3m0", "e4m3"])
    def test_numbers_of_any_kind_are_the_nearest_of_them(self, name: str) -> None:
        """Oracle: all distances."""
        x, element = activations(1, 10, 64), Minifloat.parse(name)
        numbers = torch.tensor([*element.magnitudes, *(-m for m in element.magnitudes)])
        scale = x.abs().amax(-1, keepdim=True) / element.largest
        scale[scale == 0] = 1
        for rounds, steps in ((FloatTokens(element), scale), (FixedScale(element, 0.7), torch.tensor(0.7))):
            nearest = (numbers * steps[..., None] - x[..., None]).abs().amin(-1)
            torch.testing.assert_close((rounds(x) - x).abs(), nearest, rtol=1e-5, atol=1e-6)

    def test_what_is_stored_has_its_name(self) -> None:
        found = {name: static_part(name) for name in (*SCHEMES, "e2m1-token", "e2m1-tensor")}
        named = {name: part for name, part in found.items() if part is not None}
        assert named == {"fp8-static": "input_scale", "nvfp4": "input_global_scale", "e2m1-tensor": "input_scale"}

    def test_numbers_are_within_half_a_step_but_for_the_largest(self) -> None:
        """Of 256 steps there is one less above zero than below."""
        x = activations(3, 40, 200)
        step = x.abs().amax(-1, keepdim=True) / 127.5
        missed = (round_tokens(x) - x).abs()
        assert bool((missed <= step * 0.501).all())
        assert round_tokens(torch.tensor([[2.55, -2.55]])).tolist() == [[pytest.approx(2.54), pytest.approx(-2.56)]]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_in_half_precision_the_steps_are_those_of_fp32(self, dtype: torch.dtype) -> None:
        x = activations(1, 40, 200).to(dtype)
        assert torch.equal(round_tokens(x), round_tokens(x.float()).to(dtype))
        assert round_tokens(x).dtype == dtype
        assert token_scales(x).dtype == torch.float32

    def test_a_module_rounds_until_the_handles_are_removed(self) -> None:
        model, x = nn.Sequential(nn.Linear(16, 4), nn.Linear(4, 4)), activations(2, 5, 16)
        before = model(x)
        handles = round_inputs(model, {"0": round_tokens})
        assert torch.equal(model(x), model[1](nn.functional.linear(theirs(x), model[0].weight, model[0].bias)))
        for handle in handles:
            handle.remove()
        assert torch.equal(model(x), before)


class TestConfig:
    @pytest.mark.parametrize(
        ("fmt", "preset"),
        [
            (W8A8, "W8A8"),
            (W4A8, "W4A8"),
            (NVFP4(activations="nvfp4"), "NVFP4"),
            (MXFP4(activations="mxfp4"), "MXFP4"),
            (MXFP8(activations="mxfp8"), "MXFP8"),
            (FP8(scales="tensor", activations="fp8-static"), "FP8"),
            (FP8(scales="channel", activations="fp8"), "FP8_DYNAMIC"),
            (FP8(scales="block", activations="fp8-block"), "FP8_BLOCK"),
        ],
    )
    def test_schemes_are_the_presets_of_compressed_tensors(self, fmt: Format, preset: str) -> None:
        config = quantization_config.write({"layer": fmt}, ["layer"], [])
        group, known = config["config_groups"]["group_0"], preset_name_to_scheme(preset, ["Linear"])
        for key, expected in (("input_activations", known.input_activations), ("weights", known.weights)):
            found = QuantizationArgs(**group[key])
            for name in ("num_bits", "type", "symmetric", "strategy", "group_size", "dynamic", "actorder", "scale_dtype"):
                assert getattr(found, name) == getattr(expected, name), (key, name)
        assert group["output_activations"] is None

    @pytest.mark.parametrize("fmt", [*FORMATS.values(), *FLOATS], ids=lambda fmt: fmt.label)
    def test_what_is_written_is_read_back(self, fmt: Format) -> None:
        for formats in ({"a": fmt}, {"a": fmt, "b": IntGroup()}):
            config = {"quantization_config": quantization_config.write(formats, ["a", "b"], [])}
            read = quantization_config.reader(config, "here")
            assert {layer: read(layer, set()) for layer in formats} == formats

    def test_a_config_of_llm_compressor_is_read(self) -> None:
        """As it writes them: every key of compressed-tensors' model, most of them null."""
        scheme = preset_name_to_scheme("W8A8", ["Linear"])
        group = {**scheme.model_dump(mode="json"), "format": "int-quantized"}
        config = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"group_0": group}}
        assert quantization_config.reader({"quantization_config": config}, "here")("layer", set()) == W8A8

    @pytest.mark.parametrize(
        ("change", "kind"),
        [
            ({"dynamic": False, "strategy": "tensor"}, "8 int tensor static"),
            ({"dynamic": "local"}, "8 int token dynamic"),
            ({"symmetric": False}, "8 int token asymmetric dynamic"),
            ({"num_bits": 4}, "4 int token dynamic"),
            ({"type": "float"}, "8 float token dynamic"),
        ],
    )
    def test_other_activations_are_refused(self, change: dict[str, object], kind: str) -> None:
        config = quantization_config.write({"layer": W8A8}, ["layer"], [])
        config["config_groups"]["group_0"]["input_activations"] |= change
        with pytest.raises(
            SourceError, match=f"^here: activations are quantized as {kind}, which is not computed here; only"
        ):
            quantization_config.reader({"quantization_config": config}, "here")

    def test_quantized_outputs_are_refused(self) -> None:
        config = quantization_config.write({"layer": W8A8}, ["layer"], [])
        config["config_groups"]["group_0"]["output_activations"] = dict(SCHEMES["int8"])
        with pytest.raises(SourceError, match=r"^here: the outputs of layers are quantized"):
            quantization_config.reader({"quantization_config": config}, "here")


class TestModels:
    @pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
    def test_all_loaders_compute_what_stock_transformers_does(self, fmt: IntGroup, quantized: Callable[..., Path]) -> None:
        """Streamed as in every evaluation, whole, packed in memory, and through from_pretrained."""
        path, tokens = quantized(fmt), some_tokens(1, 40)
        expected = stock_logits(path, tokens)
        cpu = torch.device("cpu")
        streamed = streamed_logits(ModelSource(path, cpu), tokens, lambda done, total, what: None)
        whole = compressor.load(path, dtype=torch.float32, dense=True)
        ours = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        packed = [module for module in ours.modules() if isinstance(module, PackedWeight)]
        assert packed
        for module in packed:
            module.kernel = "reference"
        for found in (streamed[None], whole(tokens).logits, exact(path)(tokens).logits, ours(tokens).logits):
            assert difference(found, expected) < SLIPS

    @pytest.mark.parametrize("family", ["gpt_neox", "qwen2", "gemma3"])
    def test_in_other_families_too(self, family: str, quantized: Callable[..., Path]) -> None:
        path, tokens = quantized(W4A8, family), some_tokens(1, 40)
        assert difference(exact(path)(tokens).logits, stock_logits(path, tokens)) < SLIPS

    def test_where_stock_transformers_rounds_all_tokens_alike_nothing_is_compared(
        self, quantized: Callable[..., Path]
    ) -> None:
        """OPT hands its MLP activations [tokens, channels], which compressed-tensors takes for one token."""
        path = quantized(W4A8, "opt")
        assert difference(exact(path)(some_tokens()).logits, stock_logits(path, some_tokens())) > SLIPS
        check = next(check for check in verify(path) if check.check == "transformers")
        assert (check.outcome, "by one scale for all" in check.detail) == ("skipped", True)
        assert not next(runtime for runtime in inspect_model(path).runtimes if runtime.name == "transformers").loads

    def test_rounding_makes_a_difference(self, quantized: Callable[..., Path]) -> None:
        """Else the tests above would hold if nobody rounded."""
        path, tokens = quantized(W8A8), some_tokens(1, 40)
        rounded = exact(path)(tokens).logits
        config = ModelSource(path, torch.device("cpu")).raw_config["quantization_config"]
        config["config_groups"]["group_0"]["input_activations"] = None
        change_config(path, quantization_config=config)
        assert difference(exact(path)(tokens).logits, rounded) > 5 * SLIPS

    def test_the_cpu_kernels_round_as_the_reference_does_and_nothing_twice(self, quantized: Callable[..., Path]) -> None:
        """Layer by layer: in a whole model a step that went the other way changes all that follows."""
        model, x = compressor.load(quantized(W4A8), dtype=torch.float32, kernel="cpu"), activations(2, 5, 256)
        weights = [module for module in model.modules() if isinstance(module, PackedWeight)]
        assert len(weights) == 2 * 4  # fused
        for weight in weights:
            there = x[..., : weight.shape[1]].contiguous()
            found = weight(there)
            weight.kernel = "reference"
            torch.testing.assert_close(found, weight(there), rtol=1e-4, atol=1e-4)

    def test_a_layout_without_a_kernel_rounds_too(self, quantized: Callable[..., Path]) -> None:
        """Scales in fp32, which no layout of the kernels takes."""
        path, tokens = quantized(W8A8), some_tokens(1, 40)
        expected = exact(path)(tokens).logits
        change_tensors(path, lambda all_: all_.update({n: t.float() for n, t in all_.items() if n.endswith("weight_scale")}))
        model = exact(path)
        assert not any(isinstance(module, PackedWeight) for module in model.modules())
        assert difference(model(tokens).logits, expected) < SLIPS

    def test_a_loaded_model_is_saved_as_it_was(self, quantized: Callable[..., Path], tmp_path: Path) -> None:
        path, tokens = quantized(W4A8), some_tokens(1, 40)
        compressor.load(path).save_pretrained(tmp_path / "again")
        torch.testing.assert_close(stock_logits(tmp_path / "again", tokens), stock_logits(path, tokens), rtol=0, atol=0)


class TestPipeline:
    def test_later_blocks_are_calibrated_on_what_rounding_leaves(self, tiny: Tiny, tmp_path: Path) -> None:
        """Weights of the first block that differ in nothing but the rounding of activations give others in the second."""
        written = {}
        for kind in ("int8", None):
            option = {"format": "int_group", "bits": 8, "group_size": -1, "activations": kind}
            data = {"passes": [{"pass": "gptq", "options": [option]}], "calibration": {"samples": 4, "seq_len": 32}}
            recipe = make_recipe({**data, "evaluation": None})
            api.run(recipe, tiny("llama"), tmp_path / str(kind), device="cpu", verify=False)
            written[kind] = tensors(tmp_path / str(kind))
        first, second = "model.layers.0.mlp.down_proj.weight_packed", "model.layers.1.mlp.down_proj.weight_packed"
        assert torch.equal(written["int8"][first], written[None][first])
        assert not torch.equal(written["int8"][second], written[None][second])

    def test_a_divergence_includes_the_rounding(self, quantized: Callable[..., Path], tiny: Tiny) -> None:
        with_, without = (
            compressor.evaluate(quantized(fmt), tiny("llama"), samples=4, seq_len=32, device="cpu").to_dict()["kl"]
            for fmt in (W8A8, IntGroup(bits=8, group_size=-1, packed=False))
        )
        assert with_ > 1.2 * without


class TestInspection:
    def test_the_label_tells(self, quantized: Callable[..., Path]) -> None:
        found = inspect_model(quantized(W8A8))
        assert "packed int8-bytes-a8" in [kind.name for kind in found.kinds]

    @pytest.mark.parametrize(
        ("fmt", "names"),
        [
            (W8A8, {"transformers", "vLLM", "SGLang"}),
            (W4A8, {"transformers"}),
            (IntGroup(bits=4, group_size=128, packed=False, activations="int8"), {"transformers", "vLLM"}),
            (IntGroup(bits=8, group_size=128, packed=False, activations="int8"), {"transformers"}),
            (IntGroup(bits=4, symmetric=False, activations="int8"), set()),
        ],
        ids=lambda value: value.label if isinstance(value, IntGroup) else "",
    )
    def test_what_others_load(self, fmt: IntGroup, names: set[str], quantized: Callable[..., Path]) -> None:
        found = {runtime.name for runtime in inspect_model(quantized(fmt)).runtimes if runtime.loads}
        assert found == names | {"compressor"}


class TestFloats:
    @pytest.mark.parametrize("fmt", FLOATS, ids=lambda fmt: fmt.label)
    def test_all_loaders_compute_the_same(self, fmt: Format, quantized: Callable[..., Path]) -> None:
        """Streamed as in every evaluation, whole, packed in memory, and through from_pretrained; and stock transformers."""
        path, tokens, cpu = quantized(fmt), some_tokens(1, 40), torch.device("cpu")
        expected = streamed_logits(ModelSource(path, cpu), tokens, lambda done, total, what: None)[None]
        whole = compressor.load(path, dtype=torch.float32, dense=True)
        ours = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for module in ours.modules():
            if isinstance(module, PackedWeight):
                module.kernel = "reference"
        for found in (whole(tokens).logits, exact(path)(tokens).logits, ours(tokens).logits):
            assert difference(found, expected) < SLIPS

    @pytest.mark.parametrize("fmt", [f for f in FLOATS if f.compressed_tensors()], ids=lambda fmt: fmt.label)
    def test_stock_transformers_computes_the_same(self, fmt: Format, quantized: Callable[..., Path]) -> None:
        """In fp32, though it decompresses some of them to bf16 first."""
        path, tokens = quantized(fmt), some_tokens(1, 40)
        with stock():
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        with suppress(RuntimeError):
            model(tokens)
        nn.Module.float(model)
        ours = compressor.load(path, dtype=torch.float32, dense=True)
        assert difference(model(tokens).logits, ours(tokens).logits) < SLIPS / 50

    @pytest.mark.parametrize("fmt", FLOATS, ids=lambda fmt: fmt.label)
    def test_a_loaded_model_is_saved_as_it_was(self, fmt: Format, quantized: Callable[..., Path], tmp_path: Path) -> None:
        path = quantized(fmt)
        compressor.load(path).save_pretrained(tmp_path / "again")
        before, after = tensors(path), tensors(tmp_path / "again")
        packed = {name for name in before if "_proj." in name}
        assert packed <= after.keys()
        assert all(torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)) for name in packed)

    @pytest.mark.parametrize("fmt", [fmt for fmt in FLOATS if way(fmt) is not None], ids=lambda fmt: fmt.label)
    def test_rounding_makes_a_difference(self, fmt: Format, quantized: Callable[..., Path]) -> None:
        path, tokens = quantized(fmt), some_tokens(1, 40)
        model = compressor.load(path, dtype=torch.float32, dense=True)
        rounded = model(tokens).logits
        for module in model.modules():
            module._forward_pre_hooks.clear()
        assert difference(model(tokens).logits, rounded) > SLIPS / 20

    @pytest.mark.parametrize("part", ["input_scale", "input_global_scale"])
    def test_layers_that_read_the_same_share_what_is_stored(self, part: str, quantized: Callable[..., Path]) -> None:
        fmt = FP8(scales="channel", activations="fp8-static") if part == "input_scale" else NVFP4(activations="nvfp4")
        found = tensors(quantized(fmt))
        of = {layer: float(found[f"model.layers.0.{layer}_proj.{part}"]) for layer in
              ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")}  # fmt: skip
        assert of["self_attn.q"] == of["self_attn.k"] == of["self_attn.v"]
        assert of["mlp.gate"] == of["mlp.up"]
        assert len(set(of.values())) > 1

    def test_without_calibration_a_number_that_it_has_to_find_is_missed(self, tiny: Tiny, tmp_path: Path) -> None:
        """`adadim_rtn` can be told to read no text; it reads some nevertheless where a format asks for it."""
        data = {
            "passes": [{"pass": "rtn", "options": [NVFP4(activations="nvfp4")]}],
            "calibration": {"samples": 2, "seq_len": 16},
        }
        report = api.run(
            make_recipe({**data, "evaluation": None}), tiny("llama"), tmp_path / "out", device="cpu", verify=False
        )
        assert report is not None
        assert all(float(t) > 0 for n, t in tensors(tmp_path / "out").items() if n.endswith("input_global_scale"))

    @pytest.mark.parametrize("number", [0.0, float("nan"), float("inf"), -1.0])
    def test_a_number_by_which_nothing_can_be_rounded_is_refused(self, number: float, quantized: Callable[..., Path]) -> None:
        path = quantized(NVFP4(activations="nvfp4"))
        layer = "model.layers.0.mlp.down_proj.input_global_scale"
        change_tensors(path, lambda all_: all_.update({layer: torch.tensor([number])}))
        with pytest.raises(SourceError, match=r"input_global_scale is .* by which nothing can be divided"):
            ModelSource(path, torch.device("cpu")).block(0)

    @pytest.mark.parametrize("wrong", ["e2m1", "e9m1-token", "fp4-token", "int4-tensor"])
    def test_other_ways_are_refused(self, wrong: str) -> None:
        with pytest.raises(ValueError, match=r"says not by which scale|is no kind of number|make 3 to 8 bits"):
            FloatGroup(activations=wrong)

    def test_a_kind_is_chosen_by_the_error_it_leaves(self) -> None:
        """Oracle: rounding the activations themselves, by every kind and scale."""
        x = activations(4, 200, 32).flatten(0, 1)
        counted = Spread(32, torch.device("cpu"))
        counted.update(x)
        energy = torch.rand(32, generator=torch.Generator().manual_seed(1))
        seen = Seen(counted.value, energy)
        kinds = [Minifloat.parse(name) for name in ("e2m1", "e1m2", "e3m0")]
        element, scale = seen.best(kinds)

        def cost(element: Minifloat, scale: float) -> float:
            return float(((FixedScale(element, scale)(x) - x).square().mean(0) * energy).sum())

        least = min(cost(kind, tried) for kind in kinds for tried in scales(kind, float(x.abs().max())))
        assert cost(element, scale) < 1.03 * least
        assert seen.costs(element, [scale])[0] == pytest.approx(cost(element, scale), rel=0.03)
