"""Blocks with widths of their own: what is found, what is written, what reads it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import change_config, some_tokens
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import compressor
from compressor import api
from compressor.errors import RecipeError, SourceError
from compressor.model.source import ModelSource
from compressor.passes.prune.prunable import find_all
from compressor.recipe.schema import make_recipe

CPU = torch.device("cpu")
ALIKE = {"rtol": 0, "atol": 3e-5}
SEARCH = {"tokens": 256, "table_tokens": 64, "evolve": {"generations": 0}}
UNEVEN = {"pass": "prune_width", "ratio": 0.5, "of": "mlp", "multiple": 32, "layout": "per-layer", "search": SEARCH}
WIDTHS = {"model.layers.0.mlp": 64, "model.layers.1.mlp": 192}


def run(model: Path, out: Path, text: Path, *passes: dict[str, Any], **options: Any) -> Any:
    calibration = {"source": str(text), "samples": 6, "seq_len": 32}
    recipe = make_recipe({"passes": list(passes), "calibration": calibration, "evaluation": None})
    return api.run(recipe, model, out, **options)


def with_silence(path: Path, silent: dict[str, int]) -> Path:
    """A checkpoint in which the first so many columns of some layers are zero."""
    file = path / "model.safetensors"
    state = load_file(file)
    for name, columns in silent.items():
        state[f"{name}.weight"][:, :columns] = 0
    save_file(state, file, metadata={"format": "pt"})
    return path


@pytest.fixture
def uneven(tiny_copy: Callable[..., Path]) -> Callable[[str], Path]:
    """Models whose first block needs a quarter of its channels and whose second one three quarters."""
    silent = {"model.layers.0.mlp.down_proj": 192, "model.layers.1.mlp.down_proj": 64}
    return lambda family: with_silence(tiny_copy(family), silent)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(some_tokens(), use_cache=False).logits
    return found


def dense(path: Path) -> Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2"])
def test_each_block_keeps_the_channels_that_it_needs_and_nothing_changes(
    family: str, uneven: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    model = uneven(family)
    (report,) = run(model, tmp_path / "out", text_file, UNEVEN).pruning
    keep = {name: count for name, count in report["keep"].items() if name.endswith("mlp")}
    assert keep == WIDTHS
    torch.testing.assert_close(logits(compressor.load(tmp_path / "out", dtype=torch.float32)), dense(model), **ALIKE)
    before, after = report["parameters"]
    assert before - after == 256 * 3 * 128


def test_heads_may_go_in_one_block_alone(tiny_copy: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    model = with_silence(tiny_copy("llama"), {"model.layers.1.self_attn.o_proj": 64})
    parts = find_all(ModelSource(model, CPU))
    block, part = parts["model.layers.1.self_attn"]
    total = sum(p.count * p.parameters(b) for b, p in parts.values())
    step = {**UNEVEN, "ratio": 0.99 * part.parameters(block) / total, "of": "blocks", "multiple": 256}
    (report,) = run(model, tmp_path / "out", text_file, step, verify=False).pruning
    assert report["keep"]["model.layers.1.self_attn"] == 1
    assert report["keep"]["model.layers.0.self_attn"] == 2
    loaded = compressor.load(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(loaded), dense(model), **ALIKE)
    some = {
        "max_new_tokens": 16,
        "do_sample": False,
        "pad_token_id": 0,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    start = some_tokens()[:1, :8]
    with_cache, without = (loaded.generate(start, use_cache=cached, **some) for cached in (True, False))
    torch.testing.assert_close(torch.stack(with_cache.logits), torch.stack(without.logits), **ALIKE)


def test_transformers_reads_it_once_the_package_is_imported_and_saves_it_as_it_was(
    uneven: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    run(uneven("llama"), tmp_path / "out", text_file, UNEVEN, verify=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert [block.mlp.down_proj.in_features for block in model.model.layers] == [64, 192]
    model.save_pretrained(tmp_path / "again")
    again = compressor.load(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(logits(again), logits(compressor.load(tmp_path / "out", dtype=torch.float32)))


def test_without_the_entry_transformers_refuses_the_shapes(
    uneven: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    run(uneven("llama"), tmp_path / "out", text_file, UNEVEN, verify=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.pop("quantization_config")["widths"].items() >= WIDTHS.items()
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_it_can_be_rounded_shortened_and_not_narrowed_again(
    tiny: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    four = tiny("llama", num_hidden_layers=4)
    rounding = {"pass": "rtn", "options": [{"format": "int_group", "bits": 8, "group_size": 32}]}
    report = run(four, tmp_path / "both", text_file, {**UNEVEN, "ratio": 0.3}, rounding)
    assert [check for check in report.verification if check["outcome"] == "failed"] == []
    run(four, tmp_path / "narrow", text_file, {**UNEVEN, "ratio": 0.3}, verify=False)
    narrow = ModelSource(tmp_path / "narrow", CPU)
    assert {count for name, count in narrow.widths.items() if name.endswith("mlp")} != {256}
    shorter = {"pass": "prune_depth", "ratio": 0.1, "of": "blocks", "by": "even"}
    (gone,) = run(tmp_path / "narrow", tmp_path / "short", text_file, shorter).pruning[0]["gone"]
    short = ModelSource(tmp_path / "short", CPU)
    stays = [index for index in range(4) if index != gone]
    for new, old in enumerate(stays):
        assert short.widths.get(f"model.layers.{new}.mlp") == narrow.widths.get(f"model.layers.{old}.mlp")
    with pytest.raises(RecipeError, match="its blocks have widths of their own"):
        run(tmp_path / "narrow", tmp_path / "out", text_file, UNEVEN)


@pytest.mark.parametrize(
    ("widths", "said"),
    [
        ({"model.layers.0.nothing": 3}, "no attention or MLP of linear layers"),
        ({"model.layers.0.mlp": 0}, "it can have from 1 to 256"),
        ({"model.layers.0.self_attn": 3}, "it can have from 1 to 2"),
        (["model.layers.0.mlp"], "no number for each name"),
        ({"model.layers.0.mlp": "64"}, "no number for each name"),
    ],
)
def test_a_config_that_says_nonsense_is_refused(widths: object, said: str, tiny_copy: Callable[..., Path]) -> None:
    path = tiny_copy("llama")
    change_config(path, quantization_config={"quant_method": "compressor", "version": 1, "layers": {}, "widths": widths})
    with pytest.raises(SourceError, match=said):
        ModelSource(path, CPU)
