"""Codebooks that layers of a block share, norms and dense channels: written once, counted once, read, resumed, trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from harness import TEXT, CommandLine, Fork, contents, dies_at_rename, on_ranks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import compressor
from compressor.errors import SourceError
from compressor.model.checkpoint import SINGLE
from compressor.model.source import ModelSource
from compressor.runtime.packed_linear import PackedLinear

REPORTS = ("report.json", "report.html", "README.md")  # name the place and the time
VECTORS = {"format": "vq", "vector": 8, "bits": 4, "residual_bits": 4, "norm": "channel", "outliers": 0.05}
BLOCKS, LAYERS = 4, 7


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All layers of a block with the same two codebooks."""
    place = tmp_path_factory.mktemp("recipe")
    (place / "text.txt").write_text(TEXT)
    passes = [{"pass": "vptq", "share": "block", "options": [VECTORS], "refine": 1}, {"pass": "learned", "steps": 2}]
    calibration = {"source": str(place / "text.txt"), "samples": 32, "seq_len": 256}
    file = place / "recipe.yaml"
    file.write_text(yaml.safe_dump({"passes": passes, "calibration": calibration, "evaluation": None}))
    return file


@pytest.fixture(scope="module")
def result(recipe: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an uninterrupted run writes. Not to be changed."""
    place = tmp_path_factory.mktemp("whole")
    log = Fork(place / "log", "run", recipe, tiny, "--out", place / "out").result()  # verifies what it wrote
    assert log.code == 0, log.err
    return place / "out"


def logits(model: Any) -> torch.Tensor:
    """Of some tokens."""
    found: torch.Tensor = model(torch.arange(32)[None]).logits
    return found


def test_each_block_has_one_of_each_codebook(result: Path) -> None:
    names = list(load_file(result / SINGLE))
    for part in ("codebook", "residual"):
        assert sum(name.endswith(f"weight_{part}") for name in names) == BLOCKS
    assert sum(name.endswith("weight_index") for name in names) == BLOCKS * LAYERS


def test_the_reported_size_is_that_of_the_file(result: Path) -> None:
    tensors = load_file(result / SINGLE)
    packed = sum(8 * t.nbytes for name, t in tensors.items() if ".weight_" in name)
    source = ModelSource(result, torch.device("cpu"))
    weights = sum(source.read_packed(layer).dequantize().numel() for layer in source.packed())
    assert json.loads((result / "report.json").read_text())["bits_per_weight"] == pytest.approx(packed / weights)


def test_the_forecast_is_the_size(recipe: Path, tiny: Path, result: Path, out: Path, compress: CommandLine) -> None:
    told = json.loads(compress("run", recipe, tiny, "--out", out, "--dry-run", "--json").out)
    assert told["bits_per_weight"] == json.loads((result / "report.json").read_text())["bits_per_weight"]


def test_every_loader_computes_the_same(result: Path) -> None:
    dense = logits(compressor.load(result, dtype=torch.float32, dense=True))
    packed = logits(compressor.load(result, dtype=torch.float32))
    stock = logits(AutoModelForCausalLM.from_pretrained(result, dtype=torch.float32))
    torch.testing.assert_close(packed, dense, rtol=1e-4, atol=1e-4)
    assert torch.equal(stock, packed)


def test_a_saved_model_has_the_same_tensors(result: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(result).save_pretrained(tmp_path)
    before, after = load_file(result / SINGLE), load_file(tmp_path / SINGLE)
    assert {n: t for n, t in before.items() if "weight_" in n}.keys() == {n for n in after if "weight_" in n}
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


def test_a_state_dict_brings_the_lenders_codebooks_to_all(result: Path) -> None:
    model = compressor.load(result, dtype=torch.float32)
    state = {name: t * 2 if name.endswith(("codebook", "residual", "dense")) else t for name, t in model.state_dict().items()}
    before = {name: m.dequantize() for name, m in model.named_modules() if isinstance(m, PackedLinear)}
    model.load_state_dict(state)
    after = {name: m.dequantize() for name, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert len(after) == BLOCKS * LAYERS
    assert all(torch.equal(2 * before[name], weight) for name, weight in after.items())


def test_a_lender_that_is_no_layer_is_named(result: Path, tmp_path: Path) -> None:
    config = json.loads((result / "config.json").read_text())
    layers = config["quantization_config"]["layers"]
    borrower = next(layer for layer, spec in layers.items() if spec["lender"])
    layers[borrower]["lender"] = "model.layers.9.nothing"
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / SINGLE).symlink_to(result / SINGLE)
    message = f"{borrower} uses the codebooks of model.layers.9.nothing, which is no layer of this model"
    with pytest.raises(SourceError, match=message):
        compressor.load(tmp_path)


def test_a_killed_run_resumes_to_the_same_bytes(
    recipe: Path, tiny: Path, result: Path, out: Path, tmp_path: Path, compress: CommandLine
) -> None:
    command = ("run", recipe, tiny, "--out", out, "--no-verify")
    Fork(tmp_path / "log", *command, fate=(dies_at_rename, ("block-00002.safetensors", False))).result()
    assert not out.exists()
    assert compress(*command, "--resume").code == 0
    assert contents(out, REPORTS) == contents(result, REPORTS)


@pytest.mark.parametrize("key", ["0.mlp.down_proj", "0.self_attn.q_proj"])
def test_a_run_killed_within_a_layer_resumes_to_the_same_bytes(
    key: str, recipe: Path, tiny: Path, out: Path, tmp_path: Path, compress: CommandLine
) -> None:
    command = ("run", recipe, tiny, "--no-verify", "--set", "passes.0.share=layer")
    whole = tmp_path / "whole"
    assert compress(*command, "--out", whole).code == 0
    note = f"block-00001.{key}.0.01.note"
    Fork(tmp_path / "log", *command, "--out", out, fate=(dies_at_rename, (note, True))).result()
    work = out.with_name(f"{out.name}.partial") / "work"
    assert (work / note).exists()
    assert not out.exists()
    assert compress(*command, "--out", out, "--resume").code == 0
    assert contents(out, REPORTS) == contents(whole, REPORTS)


def test_notes_of_the_first_block_are_not_lost_unasked(
    recipe: Path, tiny: Path, out: Path, tmp_path: Path, compress: CommandLine
) -> None:
    command = ("run", recipe, tiny, "--out", out, "--no-verify")
    note = "block-00000.0.self_attn.q_proj.0.01.note"
    Fork(tmp_path / "log", *command, fate=(dies_at_rename, (note, True))).result()
    refused = compress(*command)
    assert refused.code == 2
    assert "holds 0 finished parts and one that is begun of an interrupted run; give --resume" in refused.err


def test_two_ranks_write_what_one_writes(recipe: Path, tiny: Path, result: Path, out: Path, tmp_path: Path) -> None:
    ranks = on_ranks(tmp_path / "log", "run", recipe, tiny, "--out", out, "--no-verify")
    assert [rank.code for rank in ranks] == [0, 0], ranks
    ours, theirs = load_file(out / SINGLE), load_file(result / SINGLE)
    assert ours.keys() == theirs.keys()
    indices = [name for name in ours if name.endswith("weight_index")]
    same = sum(int((ours[name] == theirs[name]).sum()) for name in indices) / sum(ours[name].numel() for name in indices)
    assert same > 0.95
