"""Models some of whose weights are zero: what is written, and who reads it."""

from pathlib import Path

import pytest
import torch
from harness import TEXT, CommandLine, Fork, contents, dies_at_rename
from transformers import AutoModelForCausalLM

import compressor
from compressor.runtime.packed_linear import StoredLinear

REPORTS = ("report.json", "report.html", "README.md")  # name the place and the time
RECIPE = """
passes: [{pass: prune_weights, pattern: "2:4"}]
calibration: {samples: 4, seq_len: 64}
evaluation: null
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("{samples", f"{{source: {tmp_path / 'text.txt'}, samples"))
    return tmp_path / "recipe.yaml"


def test_both_ways_of_storing_hold_the_same_weights_and_their_sizes_are_known_before(
    tiny: Path, recipe: Path, tmp_path: Path, compress: CommandLine
) -> None:
    sizes = {}
    for stored in ("bitmask", "dense"):
        arguments = (
            "run",
            recipe,
            tiny,
            "--set",
            f"passes.0.stored={stored}",
            "--no-verify",
            "--out",
            tmp_path / stored,
            "--json",
        )
        forecast = compress(*arguments, "--dry-run").json
        report = compress(*arguments).json
        assert forecast["exact"]
        assert forecast["size_bytes"] == report["size_bytes"]
        sizes[stored] = report["size_bytes"]
    assert sizes["bitmask"] < sizes["dense"]
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert "quantization_config" not in dense.config.to_dict()
    packed = compressor.load(tmp_path / "bitmask")
    name = "model.layers.2.mlp.down_proj"
    layer, plain = packed.get_submodule(name), dense.get_submodule(name).weight
    assert isinstance(layer, StoredLinear)
    assert torch.equal(layer.quantized().dequantize(), plain)
    assert ((plain == 0).unflatten(1, (-1, 4)).sum(2) == 2).all()
    ids = torch.arange(12)[None]
    imported = AutoModelForCausalLM.from_pretrained(tmp_path / "bitmask")
    for model in (packed, imported):
        torch.testing.assert_close(model(ids).logits, dense(ids).logits)


@pytest.mark.parametrize("stored", ["bitmask", "dense"])
def test_a_run_that_is_killed_goes_on_to_the_same(
    stored: str, tiny: Path, recipe: Path, tmp_path: Path, compress: CommandLine
) -> None:
    arguments = ("run", recipe, tiny, "--set", f"passes.0.stored={stored}", "--no-verify", "--out")
    assert compress(*arguments, tmp_path / "whole").code == 0
    fate = (dies_at_rename, ("block-00001.safetensors", True))
    assert Fork(tmp_path / "log", *arguments, tmp_path / "out", fate=fate).result().code == -9
    assert compress(*arguments, tmp_path / "out", "--resume").code == 0
    assert contents(tmp_path / "out", REPORTS) == contents(tmp_path / "whole", REPORTS)


@pytest.mark.parametrize("stored", ["bitmask", "dense"])
def test_a_pattern_that_does_not_divide_a_layers_inputs_is_refused(
    stored: str, tiny: Path, recipe: Path, out: Path, compress: CommandLine
) -> None:
    changes = ("--set", "passes.0.pattern='2:48'", "--set", f"passes.0.stored={stored}")
    result = compress("run", recipe, tiny, *changes, "--out", out)
    assert result.code == 2
    assert "model.layers.0.self_attn.q_proj: in_features 128 is not a multiple of 48, as pattern 2:48 needs" in result.err
    assert "Traceback" not in result.err
    assert not out.exists()
