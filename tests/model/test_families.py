"""Every supported family: what is streamed, written and loaded is what transformers computes, or what was rounded."""

import functools
import json
import re
from types import SimpleNamespace

import pytest
import torch
from tiny_models import FAMILIES, POSITIONS, exact, some_tokens, stock_logits, tensors
from transformers import AutoModelForCausalLM

from compressor import api
from compressor.model.source import ModelSource
from compressor.model.tokenizer import load_tokenizer
from compressor.pipeline.calibration.data import load_samples
from compressor.recipe.build import quantize_recipe

CPU = torch.device("cpu")
BITS, GROUP_SIZE = 4, 64
ALIKE = {"rtol": 0, "atol": 1e-4}
LEAST_CHANGE = 0.05  # of a logit of about 1 when all weights have four bits
CASES = {family: {} for family in FAMILIES} | {
    "llama in shards": {"shard_bytes": "100KB"},
    "llama in bfloat16": {"dtype": "bfloat16"},
    "qwen2 in bfloat16 shards": {"dtype": "bfloat16", "shard_bytes": "100KB"},
    "gpt2 in bfloat16 shards": {"dtype": "bfloat16", "shard_bytes": "100KB"},
    "gemma2 in float16": {"dtype": "float16"},
}
TIED_FAMILIES = {"llama_tied", "qwen2", "gemma2", "gemma3", "gemma3_vision", "opt", "opt_projected", "gpt2"}
TIED = [case for case in CASES if case.split()[0] in TIED_FAMILIES]
# Families that differ in what GPTQ works on: biases, tied and transposed weights, norms behind layers, sliding windows.
UNLIKE = ["llama in bfloat16", "llama_tied", "qwen2", "gemma2", "gpt2", "opt"]
TRANSPOSED = [case for case in CASES if case.startswith("gpt2")]
WEIGHT_IN_A_BLOCK = re.compile(r"(?<!encoder\.)(layers|h)\.\d+\..*\.weight$")  # of the decoder, not of a vision tower


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def family(tiny):
    return lambda case: tiny(case.split()[0], **CASES[case])


@pytest.fixture(scope="module")
def rounded(family, tmp_path_factory):
    place = tmp_path_factory.mktemp("rounded")

    @functools.cache
    def run(case):
        out = place / case
        recipe = quantize_recipe(BITS, method="rtn", group_size=GROUP_SIZE, evaluate=False)
        return SimpleNamespace(
            source=family(case), out=out, report=api.run(recipe, family(case), out, device="cpu", verify=False)
        )

    return run


@torch.no_grad()
def logits(model, tokens):
    return model(tokens, use_cache=False).logits


def step_and_values(parts, layer):
    """Independent of the format's code: the scale of each weight [O, I], and the values that the parts stand for."""
    nibbles = (parts[f"{layer}.weight_packed"][..., None] >> (4 * torch.arange(8, dtype=torch.int32))) & 15
    scale = parts[f"{layer}.weight_scale"].float().repeat_interleave(GROUP_SIZE, 1)
    assert parts[f"{layer}.weight_shape"].tolist() == list(scale.shape)
    return scale, (nibbles.flatten(1).float() - 8) * scale


def packed_layers(parts):
    return [name.removesuffix(".weight_packed") for name in parts if name.endswith(".weight_packed")]


@torch.no_grad()
def test_streaming_gives_the_logits_of_the_plain_model(case, family):
    source, tokens = ModelSource(family(case), CPU), some_tokens(3)
    hidden = source.first_inputs(tokens.split(2))
    for block in source.blocks():
        hidden = [block.forward(states) for states in hidden]
    torch.testing.assert_close(torch.cat(list(source.logits(hidden))), stock_logits(family(case), tokens), **ALIKE)


def test_loading_a_dense_checkpoint_gives_the_plain_model(case, family):
    torch.testing.assert_close(logits(exact(family(case)), some_tokens()), stock_logits(family(case), some_tokens()), **ALIKE)


def test_stock_transformers_loads_what_was_written_with_the_same_logits(case, rounded):
    made = rounded(case)
    if case in TRANSPOSED:
        assert made.report.layout == "compressor"
        return
    assert made.report.layout == "compressed-tensors"
    torch.testing.assert_close(stock_logits(made.out, some_tokens()), logits(exact(made.out), some_tokens()), **ALIKE)


def test_the_result_is_another_model_than_the_original(case, rounded):
    made, tokens = rounded(case), some_tokens()
    difference = logits(exact(made.out), tokens) - stock_logits(made.source, tokens)
    assert difference.abs().max() > LEAST_CHANGE


def test_the_loaded_model_is_the_plain_one_with_the_packed_values_for_weights(case, rounded):
    made, tokens = rounded(case), some_tokens()
    plain, parts = AutoModelForCausalLM.from_pretrained(made.source, dtype=torch.float32), tensors(made.out)
    of_stored = {stored: name for name, stored in ModelSource(made.source, CPU).names.items()}
    for layer in packed_layers(parts):
        parameter = plain.get_parameter(of_stored[f"{layer}.weight"])
        _, values = step_and_values(parts, layer)
        parameter.data = values.T if case in TRANSPOSED else values
    torch.testing.assert_close(logits(exact(made.out), tokens), logits(plain, tokens), **ALIKE)


def test_every_packed_value_is_within_half_a_step_of_the_original(case, rounded):
    made = rounded(case)
    source, parts = tensors(made.source), tensors(made.out)
    for layer in packed_layers(parts):
        weight = source[f"{layer}.weight"].float()
        step, values = step_and_values(parts, layer)
        missed = (values - (weight.T if case in TRANSPOSED else weight)).abs() / step
        assert missed.max() < 0.54, layer  # half a step, and what rounding the scale to bfloat16 moves the outermost value


def test_exactly_the_matrices_of_the_blocks_are_packed_and_all_else_is_identical(case, rounded):
    made = rounded(case)
    source, written = tensors(made.source), tensors(made.out)
    matrices = {n for n, t in source.items() if t.dim() == 2 and WEIGHT_IN_A_BLOCK.search(n)}
    assert {f"{layer}.weight" for layer in packed_layers(written)} == matrices
    others = {name for name in written if not name.endswith(("weight_packed", "weight_scale", "weight_shape"))}
    assert others == set(source) - matrices
    for name in others:
        assert written[name].dtype == source[name].dtype
        assert torch.equal(written[name], source[name]), name


@pytest.mark.parametrize("case", TIED, indirect=True)
def test_a_tied_head_stays_tied_and_is_stored_once(case, rounded):
    made = rounded(case)
    assert "lm_head.weight" not in tensors(made.out)
    assert json.loads((made.out / "config.json").read_text()).get("tie_word_embeddings", True)
    model = exact(made.out)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("case", UNLIKE, indirect=True)
def test_gptq_misses_less_of_the_first_blocks_outputs_than_rounding(case, family, rounded, text_file, tmp_path):
    data = {"calibration": str(text_file), "samples": 8, "seq_len": 32, "evaluate": False}
    recipe = quantize_recipe(BITS, group_size=GROUP_SIZE, **data, changes=["passes.0.refine=1", "passes.1.steps=10"])
    report = api.run(recipe, family(case), tmp_path / "out", device="cpu", dtype="float32", verify=False)
    rounding = rounded(case)
    assert [row.layer for row in report.rows] == [row.layer for row in rounding.report.rows]
    text = load_samples(str(text_file), load_tokenizer(family(case)), samples=8, seq_len=32).tokens
    plain = AutoModelForCausalLM.from_pretrained(family(case), dtype=torch.float32)
    inputs = {}
    for layer in [row.layer for row in report.rows[: len(report.rows) // len(ModelSource(family(case), CPU).layers)]]:
        plain.get_submodule(layer).register_forward_pre_hook(lambda m, args, layer=layer: inputs.update({layer: args[0]}))
    logits(plain, text)
    ours, theirs = exact(tmp_path / "out"), exact(rounding.out)
    assert inputs
    for layer, x in inputs.items():
        wanted, by_gptq, by_rounding = (m.get_submodule(layer)(x) for m in (plain, ours, theirs))
        assert (by_gptq - wanted).square().sum() < (by_rounding - wanted).square().sum(), layer


@pytest.mark.parametrize("group_size", [128, -1])
def test_other_group_sizes_load_in_stock_transformers_alike(group_size, tiny, tmp_path):
    recipe = quantize_recipe(BITS, method="rtn", group_size=group_size, evaluate=False)
    api.run(recipe, tiny("llama"), tmp_path / "out", device="cpu", verify=False)
    torch.testing.assert_close(
        stock_logits(tmp_path / "out", some_tokens()), logits(exact(tmp_path / "out"), some_tokens()), **ALIKE
    )


@pytest.mark.parametrize(
    ("family", "without"),
    [
        ("mistral", {"sliding_window": None}),
        ("gemma2", {"sliding_window": POSITIONS}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma3", {"layer_types": ["full_attention"] * 3}),
        ("gemma3", {"layer_types": ["sliding_attention"] * 3}),
    ],
)
@torch.no_grad()
def test_the_tiny_model_would_show_it_if_this_feature_were_ignored(family, without, tiny):
    tokens = some_tokens()
    changed = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32, **without)
    assert (logits(changed, tokens) - stock_logits(tiny(family), tokens)).abs().max() > 0.01
