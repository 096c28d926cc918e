"""What is read of a model directory, when it is in memory, and which directories are refused with which sentence."""

import re
import shutil

import pytest
import torch
from tiny_models import change_config, change_tensors, exact, some_tokens, stock_logits, tensors

from compressor import api
from compressor.errors import CompressorError, SourceError
from compressor.model.source import ModelSource
from compressor.recipe.build import quantize_recipe

CPU = torch.device("cpu")
ROUND = quantize_recipe(4, method="rtn", group_size=64, evaluate=False)


@pytest.fixture(scope="module")
def rounded(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("rounded") / "llama"
    api.run(ROUND, tiny("llama"), out, device="cpu", verify=False)
    return out


def resident(source):
    """Names of the parameters that are in memory."""
    return {name for name, parameter in source.model.named_parameters() if not parameter.is_meta}


@torch.no_grad()
def streamed(path, tokens):
    source = ModelSource(path, CPU)
    hidden = source.first_inputs([tokens])
    for block in source.blocks():
        hidden = [block.forward(states) for states in hidden]
    return next(source.logits(hidden))


def own(path, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(path, tmp_path / "copy")


def refusal(path):
    """The sentence with which a directory is refused."""
    with pytest.raises(SourceError) as refused:
        ModelSource(path, CPU)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# What is in memory


def test_opening_a_model_reads_no_weight(tiny):
    assert resident(ModelSource(tiny("llama"), CPU)) == set()


def test_only_the_block_whose_turn_it_is_is_in_memory(tiny):
    source = ModelSource(tiny("llama"), CPU)
    for index, block in enumerate(source.blocks()):
        assert block.prefix == f"model.layers.{index}"
        assert resident(source) == {f"{block.prefix}.{name}" for name, _ in block.module.named_parameters()}
    assert resident(source) == set()


def test_first_inputs_arguments_and_logits_leave_nothing_in_memory(tiny):
    source = ModelSource(tiny("llama_tied"), CPU)
    hidden = source.first_inputs([some_tokens()])
    assert len(source.arguments((2, 24))) == 2
    list(source.logits(hidden))
    assert resident(source) == set()


def test_the_head_is_not_read_for_what_the_first_block_receives(tiny, monkeypatch):
    source, read = ModelSource(tiny("llama"), CPU), []
    monkeypatch.setattr(source, "read", lambda name: read.append(name) or ModelSource.read(source, name))
    source.first_inputs([some_tokens()])
    assert read == ["model.embed_tokens.weight", "model.norm.weight"]


def test_a_released_block_comes_back_with_the_same_weights(tiny):
    source = ModelSource(tiny("gpt2"), CPU)
    block = source.block(1)
    before = {name: block.weight(name).clone() for name in block.layers}
    source.release(block)
    again = source.block(1)
    assert before.keys() == again.layers.keys()
    assert all(torch.equal(weight, again.weight(name)) for name, weight in before.items())


def test_weights_are_in_the_dtype_of_computation_and_read_in_that_of_the_file(tiny):
    source = ModelSource(tiny("llama", dtype="bfloat16"), CPU, torch.float32)
    assert source.block(0).weight("mlp.up_proj").dtype == torch.float32
    assert source.read("model.layers.0.mlp.up_proj.weight").dtype == torch.bfloat16


@torch.no_grad()
def test_blocks_take_batches_of_different_shapes_in_turn(tiny):
    source, plain = ModelSource(tiny("gemma3"), CPU), tiny("gemma3")
    batches = [some_tokens(2, 24), some_tokens(1, 31), some_tokens(2, 24).flip(0)]
    hidden = source.first_inputs(batches)
    for block in source.blocks():
        hidden = [block.forward(states) for states in hidden]
    for tokens, logits in zip(batches, source.logits(hidden), strict=True):
        torch.testing.assert_close(logits, stock_logits(plain, tokens), rtol=0, atol=1e-4)


def test_sizes_are_those_of_the_config(tiny):
    source = ModelSource(tiny("gemma3_vision"), CPU)
    assert (source.vocab_size, source.max_positions, len(source.layers)) == (384, 64, 3)


# Names and tied parameters


@pytest.mark.parametrize(("family", "prefix"), [("gpt2", "transformer."), ("opt", "model."), ("llama_tied", "model.")])
def test_a_checkpoint_of_the_bare_decoder_keeps_its_names(family, prefix, tiny_copy, tmp_path):
    """The original GPT-2 and OPT are stored so."""
    path = tiny_copy(family)
    whole = stock_logits(path, some_tokens())
    change_tensors(path, lambda t: [t.update({name.removeprefix(prefix): t.pop(name)}) for name in list(t)])
    assert torch.equal(streamed(path, some_tokens()), whole)
    api.run(ROUND, path, tmp_path / "out", device="cpu", verify=False)
    assert {re.sub("_(packed|scale|shape)$", "", name) for name in tensors(tmp_path / "out")} == set(tensors(path))
    ours = exact(tmp_path / "out")(some_tokens()).logits
    if family != "gpt2":
        assert torch.equal(ours, stock_logits(tmp_path / "out", some_tokens()))
    assert not torch.allclose(ours, whole, atol=0.05)


def test_tensors_that_the_model_does_not_know_are_kept(tiny_copy, tmp_path):
    """The masks in the original GPT-2, the blocks for multi-token prediction in others."""
    path = tiny_copy("gpt2")
    mask = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
    change_tensors(path, lambda t: t.update({"transformer.h.0.attn.bias": mask}))
    api.run(ROUND, path, tmp_path / "out", device="cpu", verify=False)
    assert torch.equal(tensors(tmp_path / "out")["transformer.h.0.attn.bias"], mask)


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update({HEAD: t[EMBEDDING].clone()}),
        lambda t: t.update({HEAD: t[EMBEDDING].flip(0).contiguous()}),
        lambda t: t.update({HEAD: t.pop(EMBEDDING)}),
    ],
    ids=["both and equal", "both and different", "the head alone"],
)
def test_a_tied_pair_is_read_as_transformers_reads_it(change, tiny_copy, tmp_path):
    path = tiny_copy("llama_tied")
    change_tensors(path, change)
    before, wanted = tensors(path), stock_logits(path, some_tokens())
    assert torch.equal(streamed(path, some_tokens()), wanted)
    assert torch.equal(exact(path)(some_tokens()).logits, wanted)
    api.run(ROUND, path, tmp_path / "out", device="cpu", verify=False)
    after = tensors(tmp_path / "out")
    assert all(torch.equal(after[name], before[name]) for name in (HEAD, EMBEDDING) if name in before)
    ours = exact(tmp_path / "out")(some_tokens()).logits
    assert torch.equal(ours, stock_logits(tmp_path / "out", some_tokens()))


def test_a_loaded_model_ends_where_the_generation_config_says(tiny_copy, tmp_path):
    path = tiny_copy("llama")
    (path / "generation_config.json").write_text('{"eos_token_id": [0, 5]}')
    api.run(ROUND, path, tmp_path / "out", device="cpu", verify=False)
    assert exact(path).generation_config.eos_token_id == [0, 5]
    assert exact(tmp_path / "out").generation_config.eos_token_id == [0, 5]


# Packed checkpoints


def test_a_packed_checkpoint_names_its_packed_layers(rounded, tiny):
    packed = ModelSource(rounded, CPU).packed()
    assert len(packed) == 14
    assert {fmt.label for fmt in packed.values()} == {"int4g64"}
    assert ModelSource(tiny("llama"), CPU).packed() == {}


DOWN = "model.layers.1.mlp.down_proj"


def test_a_packed_layer_without_its_scale_is_refused_by_name(rounded, tmp_path):
    path = own(rounded, tmp_path)
    change_tensors(path, lambda t: t.pop(f"{DOWN}.weight_scale"))
    with pytest.raises(SourceError, match=f"{re.escape(DOWN)}.weight_scale is missing"):
        exact(path)


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ({"group_size": 32}, r"q_proj.weight_scale has shape \[128, 2\] where int4g32 .* needs \[128, 4\]"),
        ({"num_bits": 3}, "weight_packed has shape .* where int3g64"),
        ({"group_size": 96}, "q_proj cannot be packed as config.json has it: .*96"),
        ({"num_bits": 16}, "quantization_config cannot be read .*16"),
        ({"num_bits": None}, "quantization_config cannot be read"),
        ({"type": "float"}, "quantization scheme float/group cannot be read"),
    ],
)
def test_a_packed_checkpoint_that_its_config_does_not_fit_is_refused(weights, sentence, rounded, tmp_path):
    path = own(rounded, tmp_path)
    config = ModelSource(path, CPU).raw_config["quantization_config"]
    config["config_groups"]["group_0"]["weights"] |= weights
    change_config(path, quantization_config=config)
    with pytest.raises(SourceError, match=sentence):
        exact(path)


def test_a_packed_checkpoint_without_a_quantization_config_is_refused(rounded, tmp_path):
    path = own(rounded, tmp_path)
    change_config(path, quantization_config=None)
    with pytest.raises(SourceError, match=re.escape("_proj is packed but config.json has no quantization_config")):
        exact(path)


def test_a_quantized_model_is_not_compressed_again(rounded, tmp_path):
    with pytest.raises(SourceError, match=r"already quantized \(compressed-tensors\); compress the original model"):
        api.run(ROUND, rounded, tmp_path / "out", device="cpu", verify=False)
    assert not (tmp_path / "out").exists()


def test_a_model_quantized_by_another_method_is_refused(tiny_copy):
    path = tiny_copy("llama")
    change_config(path, quantization_config={"quant_method": "awq", "bits": 4})
    assert refusal(path).endswith("quantized with method `awq`, which cannot be read; use the original model")


def test_a_quantization_config_of_null_means_dense(tiny_copy, tmp_path):
    path = tiny_copy("llama")
    change_config(path, quantization_config=None)
    assert api.run(ROUND, path, tmp_path / "out", device="cpu", verify=False).layout == "compressed-tensors"


# What is not supported


@pytest.mark.parametrize(
    ("family", "sentence"),
    [
        ("mamba", "model type `mamba`: .*conv1d.weight .* is 3-dimensional; convolutions, state spaces and"),
        ("mixtral", "model type `mixtral`: .*experts.* is 3-dimensional; .*fused mixture-of-experts weights are not"),
        ("qwen3_moe", "model type `qwen3_moe`: .*experts.* is 3-dimensional; .*fused mixture-of-experts"),
        ("t5", "model type `t5` is an encoder-decoder; only decoders of causal models are supported"),
    ],
)
def test_an_unsupported_architecture_is_refused_with_its_reason(family, sentence, tiny, tmp_path):
    assert re.search(sentence, refusal(tiny(family)))
    with pytest.raises(CompressorError):
        api.run(ROUND, tiny(family), tmp_path / "out", device="cpu", verify=False)
    assert not (tmp_path / "out").exists()


def test_blocks_that_do_not_hand_on_plain_hidden_states_are_refused_when_streamed(tiny):
    source = ModelSource(tiny("gptj"), CPU)
    with pytest.raises(SourceError, match=r"GPTJBlock: .* cannot be streamed block by block"):
        source.first_inputs([some_tokens()])
    assert "forward" not in vars(source.layers[0])


def remote_code(path, **changes):
    """Say in config.json that code of the checkpoint is needed; that code would leave a file behind."""
    trap = path.parent / "executed"
    for name in ("configuration_own.py", "modeling_own.py"):
        (path / name).write_text(f"open({str(trap)!r}, 'w')\nraise SystemExit\n")
    auto_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    change_config(path, auto_map=auto_map, **changes)
    return trap


def test_an_unknown_architecture_is_refused_and_its_code_not_run(tiny_copy):
    path = tiny_copy("llama")
    trap = remote_code(path, model_type="own")
    assert re.search("does not know model type `own` without running code from the checkpoint, which .* never", refusal(path))
    assert not trap.exists()


def test_a_known_architecture_is_built_by_transformers_and_not_by_code_of_the_checkpoint(tiny_copy, tiny):
    path = tiny_copy("llama")
    trap = remote_code(path)
    assert torch.equal(streamed(path, some_tokens()), streamed(tiny("llama"), some_tokens()))
    assert not trap.exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": None}, "names no model_type"),
        ({"model_type": ["llama"]}, "names no model_type"),
        ({"model_type": "lama"}, "does not know model type `lama`; a newer one may"),
        ({"hidden_size": -1}, "cannot build a causal language model from config.json: .*hidden size"),
        ({"hidden_size": "wide"}, "cannot build a causal language model from config.json: .*hidden_size"),
        ({"num_attention_heads": 0}, "cannot build a causal language model from config.json: .*zero"),
        ({"hidden_act": "none"}, "cannot build a causal language model from config.json: .*none"),
        ({"num_hidden_layers": 0}, "hold no linear layer"),
        ({"num_hidden_layers": 3}, r"no tensor for model.layers.2.self_attn.q_proj.weight \(9 missing\)"),
        ({"intermediate_size": 512}, r"gate_proj.weight has shape \[256, 128\] where config.json needs \[512, 128\]"),
        ({"vocab_size": 385}, r"embed_tokens.weight has shape \[384, 128\] where config.json needs \[385, 128\]"),
        ({"attention_bias": True}, r"no tensor for model.layers.0.self_attn.q_proj.bias \(8 missing\)"),
    ],
)
def test_a_config_that_describes_no_model_or_another_one_is_refused(changes, sentence, tiny_copy):
    path = tiny_copy("llama")
    change_config(path, **changes)
    assert re.search(sentence, refusal(path))


# What is wrong with weights


def test_a_missing_tensor_is_named(tiny_copy):
    path = tiny_copy("llama")
    change_tensors(path, lambda t: t.pop(f"{DOWN}.weight"))
    assert f"no tensor for {DOWN}.weight (1 missing)" in refusal(path)


def test_an_untied_head_must_be_stored(tiny_copy):
    path = tiny_copy("llama")
    change_tensors(path, lambda t: t.pop(HEAD))
    assert f"no tensor for {HEAD} (1 missing)" in refusal(path)


def test_a_tied_pair_of_which_nothing_is_stored_is_missing(tiny_copy):
    path = tiny_copy("llama_tied")
    change_tensors(path, lambda t: t.pop(EMBEDDING))
    assert f"no tensor for {EMBEDDING} (2 missing)" in refusal(path)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(tiny_copy):
    path = tiny_copy("gpt2")
    change_tensors(path, lambda t: t.update({"transformer.h.1.mlp.c_fc.weight": torch.zeros(256, 128)}))
    assert "transformer.h.1.mlp.c_fc.weight has shape [256, 128] where config.json needs [128, 256]" in refusal(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_weight_that_is_not_finite_is_named_and_nothing_written(value, dtype, tiny_copy, tmp_path):
    path = tiny_copy("llama", dtype=dtype)
    change_tensors(path, lambda t: t[f"{DOWN}.weight"][3, 5:7].fill_(value))
    sentence = f"{re.escape(DOWN)}.weight holds 2 NaN or infinite values of 32768; .*get a sound copy"
    with pytest.raises(SourceError, match=sentence):
        api.run(ROUND, path, tmp_path / "out", device="cpu", verify=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [EMBEDDING, "model.norm.weight", "model.layers.0.input_layernorm.weight", HEAD])
def test_what_is_not_finite_is_named_wherever_it_is(name, tiny_copy):
    path = tiny_copy("llama")
    change_tensors(path, lambda t: t[name].view(-1)[7].fill_(float("nan")))
    with pytest.raises(SourceError, match=f"{re.escape(name)} holds 1 NaN or infinite"):
        streamed(path, some_tokens())
