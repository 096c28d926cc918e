"""MLPs with widths of their own in a form that others read: what is written, what stock transformers makes of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_per_layer import ALIKE, CPU, SEARCH, UNEVEN, WIDTHS, dense, logits, run, with_silence
from tiny_models import change_config, some_tokens
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto import configuration_auto

import compressor
from compressor.assets import DECILM_CODE
from compressor.errors import RecipeError, SourceError
from compressor.evaluation.verify.verify import verify
from compressor.model.hf_config import decilm
from compressor.model.source import ModelSource
from compressor.passes.prune.shapes import parameters
from compressor.report.inspect import inspect_model
from compressor.runtime import hf_quantizer

BLOCKS = {**UNEVEN, "layout": "block-configs"}


@pytest.fixture
def model(tiny_copy: Callable[..., Path]) -> Path:
    """A model whose first block needs a quarter of its channels and whose second one three quarters."""
    return with_silence(tiny_copy("llama"), {"model.layers.0.mlp.down_proj": 192, "model.layers.1.mlp.down_proj": 64})


@pytest.fixture
def out(model: Path, text_file: Path, tmp_path: Path) -> Path:
    run(model, tmp_path / "out", text_file, BLOCKS, verify=False)
    return tmp_path / "out"


def trusting(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=True)


def config(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "config.json").read_text())
    return found


def test_stock_transformers_computes_what_ours_does_by_the_file_beside_the_weights(
    model: Path, text_file: Path, tmp_path: Path
) -> None:
    report = run(model, tmp_path / "out", text_file, BLOCKS)
    assert {check["check"]: check["outcome"] for check in report.verification}["transformers"] == "passed"
    assert report.pruning[0]["keep"].items() >= WIDTHS.items()
    assert [block["ffn"]["intermediate_size"] for block in config(tmp_path / "out")["block_configs"]] == [64, 192]
    assert "quantization_config" not in config(tmp_path / "out")
    torch.testing.assert_close(logits(trusting(tmp_path / "out")), dense(model), **ALIKE)
    torch.testing.assert_close(logits(compressor.load(tmp_path / "out", dtype=torch.float32)), dense(model), **ALIKE)


def test_heads_that_go_in_all_blocks_count(text_file: Path, tmp_path: Path, tiny_copy: Callable[..., Path]) -> None:
    """One of two groups is of no use: with it most of what has to go has gone."""
    columns = {f"model.layers.{index}.self_attn.o_proj": 64 for index in range(2)}
    model = with_silence(tiny_copy("llama"), columns)
    step = {**BLOCKS, "ratio": 0.2, "of": "blocks", "search": {**SEARCH, "rounds": 1}}
    (report,) = run(model, tmp_path / "out", text_file, step).pruning
    before, after = report["parameters"]
    assert {count for name, count in report["keep"].items() if name.endswith("self_attn")} == {1}
    assert config(tmp_path / "out")["num_key_value_heads"] == 1
    whole = parameters(ModelSource(model, CPU), "blocks")
    step_of_both = 3 * 128 * 32  # channels of one block at a time
    assert 0.2 * whole <= before - after < 0.2 * whole + 2 * step_of_both


@pytest.mark.parametrize("groups", [{}, {"num_key_value_heads": None}, {"num_key_value_heads": 8}])
def test_without_a_number_of_groups_every_head_is_one(groups: dict[str, Any]) -> None:
    """As transformers has it of Llama."""
    llama = {"hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 1, **groups}
    written = {**llama, **decilm.changes(llama, [48])}
    assert written["block_configs"][0]["attention"]["n_heads_in_group"] == 1
    assert decilm.widths(written, "here") == {"model.layers.0.mlp": 48}


def test_it_is_saved_and_read_again_by_either(out: Path, tmp_path: Path) -> None:
    trusting(out).save_pretrained(tmp_path / "theirs")
    compressor.load(out, dtype=torch.float32).save_pretrained(tmp_path / "ours")
    for name in ("theirs", "ours"):
        again = compressor.load(tmp_path / name, dtype=torch.float32)
        assert torch.equal(logits(again), logits(compressor.load(out, dtype=torch.float32)))
    assert torch.equal(logits(trusting(tmp_path / "theirs")), logits(trusting(out)))


def test_cached_generation_is_uncached_generation(out: Path) -> None:
    some = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    start, loaded = some_tokens()[:1, :8], trusting(out)
    cached, uncached = (
        torch.stack(loaded.generate(start, use_cache=use, return_dict_in_generate=True, **some).logits)
        for use in (True, False)
    )
    torch.testing.assert_close(cached, uncached, **ALIKE)


def test_entries_are_attributes_of_the_config_as_vllm_asks_for_them(out: Path) -> None:
    found = AutoConfig.from_pretrained(out, trust_remote_code=True)
    (attention, other), (ffn, _) = ([getattr(block, name) for block in found.block_configs] for name in ("attention", "ffn"))
    assert not attention.no_op
    assert found.num_attention_heads // other.n_heads_in_group == found.num_key_value_heads
    assert not hasattr(ffn, "ffn_mult")  # which would be taken, and rounded up
    assert ffn.intermediate_size == 64
    assert found.model_type == "nemotron-nas"
    assert found.model_type not in configuration_auto.CONFIG_MAPPING_NAMES  # else no code would have to be trusted


@pytest.mark.parametrize("hidden", [2048, 3072, 4096, 5120, 8192])
def test_widths_of_whole_256s_are_said_by_their_multiple_too(hidden: int) -> None:
    llama = {"hidden_size": hidden, "num_attention_heads": 16, "num_key_value_heads": 4}
    for count in range(256, 4 * hidden, 256):
        (block,) = decilm.changes(llama, [count])["block_configs"]
        whole = int(2 * block["ffn"]["ffn_mult"] * hidden / 3)  # as llama.cpp, vLLM and TensorRT-LLM compute it
        assert whole + -whole % 256 == count
        assert block["attention"]["n_heads_in_group"] == 4
    assert "ffn_mult" not in decilm.changes(llama, [256, 320])["block_configs"][0]["ffn"]


def test_it_can_be_rounded_and_is_then_read_by_stock_transformers_too(model: Path, text_file: Path, tmp_path: Path) -> None:
    rounding = {"pass": "rtn", "options": [{"format": "int_group", "bits": 8, "group_size": 32}]}
    report = run(model, tmp_path / "both", text_file, BLOCKS, rounding)
    assert report.layout == "compressed-tensors"
    assert {check["outcome"] for check in report.verification} == {"passed"}
    packed = compressor.load(tmp_path / "both", dtype=torch.float32, kernel="reference")
    packed.save_pretrained(tmp_path / "again")
    again = compressor.load(tmp_path / "again", dtype=torch.float32, kernel="reference")
    assert torch.equal(logits(again), logits(packed))
    with hf_quantizer.stock():
        torch.testing.assert_close(logits(trusting(tmp_path / "both")), logits(packed), **ALIKE)
    assert type(trusting(tmp_path / "both").model.layers[0].mlp.down_proj) is not torch.nn.Linear  # but ours, with kernels


def test_blocks_of_it_can_go(text_file: Path, tmp_path: Path, tiny_copy: Callable[..., Path]) -> None:
    four = tiny_copy("llama", num_hidden_layers=4)
    run(
        with_silence(four, {f"model.layers.{i}.mlp.down_proj": 64 * i for i in range(4)}), tmp_path / "out", text_file, BLOCKS
    )
    shorter = {"pass": "prune_depth", "ratio": 0.1, "of": "blocks", "by": "even"}
    report = run(tmp_path / "out", tmp_path / "short", text_file, shorter)
    (gone,) = report.pruning[0]["gone"]
    before, after = (config(tmp_path / name)["block_configs"] for name in ("out", "short"))
    assert after == before[:gone] + before[gone + 1 :]
    assert "failed" not in {check["outcome"] for check in report.verification}


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (UNEVEN, "its blocks have widths of their own"),
        ({"pass": "prune_hidden", "ratio": 0.2}, "hidden channels have to go before"),
    ],
)
def test_it_is_not_narrowed_again(step: dict[str, Any], said: str, out: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=said):
        run(out, tmp_path / "again", text_file, step)


def test_other_families_are_refused(tiny: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is for models of type `llama`, this one's is `qwen2`"):
        run(tiny("qwen2"), tmp_path / "out", text_file, BLOCKS)
    assert list(tmp_path.iterdir()) == []


def test_no_foreign_code_is_run(out: Path) -> None:
    ours = logits(compressor.load(out, dtype=torch.float32))
    (out / "decilm.py").write_text("raise SystemExit('foreign code was run')\n")
    assert torch.equal(logits(compressor.load(out, dtype=torch.float32)), ours)
    (check,) = [check for check in verify(out) if check.check == "transformers"]
    assert (check.outcome, check.detail) == ("skipped", "it would run code from the directory, which is not this package's")
    change_config(out, auto_map={"AutoConfig": "somebody/elses--decilm.DeciLMConfig"})
    (out / "decilm.py").write_bytes(DECILM_CODE.read_bytes())
    assert not decilm.own_code(out, config(out))


def test_inspect_says_who_reads_it(out: Path) -> None:
    found = {runtime.name: runtime.reason for runtime in inspect_model(out).runtimes}
    assert "trust_remote_code=True" in found["transformers"]
    assert "--trust-remote-code" in found["vLLM"]
    assert "multiples of 256" in found["llama.cpp"]
    assert "trust_remote_code=True" in (out / "README.md").read_text()


def other(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    """A change to what is said of the first block."""
    return lambda entries: change(entries["block_configs"][0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other(lambda block: block["attention"].update(n_heads_in_group=1)), "differ in more than the width"),
        (other(lambda block: block["attention"].update(no_op=True)), "do without parts"),
        (other(lambda block: block["ffn"].update(no_op=True)), "do without parts"),
        (other(lambda block: block["ffn"].pop("intermediate_size")), "cannot be read .'ffn_mult'"),
        (other(lambda block: block.pop("attention")), "cannot be read .'attention'"),
        (lambda entries: entries["block_configs"].pop(), "there are 1 for 2 blocks"),
        (lambda entries: entries.pop("block_configs"), "cannot be read .'block_configs'"),
        (lambda entries: entries.update(block_configs="all alike"), "cannot be read"),
        (other(lambda block: block["ffn"].update(intermediate_size=0)), "from 1 to"),
    ],
)
def test_a_config_that_says_nonsense_is_refused(change: Callable[[Any], object], said: str, out: Path) -> None:
    entries = config(out)
    change(entries)
    (out / "config.json").write_text(json.dumps(entries))
    with pytest.raises(SourceError, match=said):
        ModelSource(out, CPU)


def test_what_says_the_multiple_alone_is_read(tiny_copy: Callable[..., Path]) -> None:
    path = tiny_copy("llama", hidden_size=384, head_dim=32, intermediate_size=512)
    state = load_file(path / "model.safetensors")
    for name in ("gate_proj", "up_proj"):
        state[f"model.layers.0.mlp.{name}.weight"] = state[f"model.layers.0.mlp.{name}.weight"][:256].clone()
    state["model.layers.0.mlp.down_proj.weight"] = state["model.layers.0.mlp.down_proj.weight"][:, :256].clone()
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    heads = config(path)["num_attention_heads"] // config(path)["num_key_value_heads"]
    attention = {"no_op": False, "n_heads_in_group": heads, "window_length": None}
    blocks = [{"attention": attention, "ffn": {"no_op": False, "ffn_mult": mult}} for mult in (0.9, 2.0)]
    change_config(path, model_type="nemotron-nas", block_configs=blocks)  # 230 and 512 channels, in 256s
    source = ModelSource(path, CPU)
    assert source.widths == {"model.layers.0.mlp": 256, "model.layers.1.mlp": 512}
    assert torch.isfinite(logits(compressor.load(path, dtype=torch.float32))).all()
