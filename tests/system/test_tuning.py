"""A pass that trains the whole model after the last block: what it changes is written, resumed, and the same on two ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from harness import TEXT, CommandLine, Fork, contents, dies_at_rename, on_ranks
from safetensors.torch import load_file

from compressor import api
from compressor.errors import RecipeError
from compressor.model.checkpoint import SINGLE
from compressor.recipe.schema import make_recipe

REPORTS = ("report.json", "report.html", "README.md")  # name the place and the time


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared codebooks, trained together."""
    place = tmp_path_factory.mktemp("recipe")
    (place / "text.txt").write_text(TEXT)
    option = {"format": "vq", "vector": 8, "bits": 4, "norm": "layer"}
    passes = [{"pass": "vptq", "share": "block", "options": [option], "refine": 1}, {"pass": "pv_tune", "steps": 3}]
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


def test_it_changes_codebooks_and_nothing_outside_the_layers(
    recipe: Path, tiny: Path, result: Path, out: Path, tmp_path: Path
) -> None:
    data: dict[str, Any] = yaml.safe_load(recipe.read_text())
    (tmp_path / "before.yaml").write_text(yaml.safe_dump({**data, "passes": data["passes"][:1]}))
    api.run(tmp_path / "before.yaml", tiny, out, verify=False, device="cpu")
    before, after = load_file(out / SINGLE), load_file(result / SINGLE)
    assert before.keys() == after.keys()
    changed = {name.rpartition(".")[2] for name in after if not torch.equal(before[name], after[name])}
    assert "weight_codebook" in changed
    assert changed <= {"weight_codebook", "weight_index"}


@pytest.mark.parametrize("fate", [(name, after) for name in ("block-00002", "tuned") for after in (False, True)], ids=str)
def test_a_killed_run_resumes_to_the_same_bytes(
    fate: tuple[str, bool], recipe: Path, tiny: Path, result: Path, out: Path, tmp_path: Path, compress: CommandLine
) -> None:
    command = ("run", recipe, tiny, "--out", out, "--no-verify")
    Fork(tmp_path / "log", *command, fate=(dies_at_rename, (f"{fate[0]}.safetensors", fate[1]))).result()
    assert not out.exists()
    assert compress(*command, "--resume").code == 0
    assert contents(out, REPORTS) == contents(result, REPORTS)


def test_a_run_killed_once_it_was_trained_does_not_train_again(
    recipe: Path, tiny: Path, result: Path, out: Path, tmp_path: Path, compress: CommandLine
) -> None:
    command = ("run", recipe, tiny, "--out", out, "--no-verify")
    Fork(tmp_path / "log", *command, fate=(dies_at_rename, ("model.safetensors", False))).result()
    resumed = compress(*command, "--resume")
    assert resumed.code == 0
    assert "tune step" not in resumed.err
    assert contents(out, REPORTS) == contents(result, REPORTS)


def test_two_ranks_write_what_one_writes(recipe: Path, tiny: Path, result: Path, out: Path, tmp_path: Path) -> None:
    ranks = on_ranks(tmp_path / "log", "run", recipe, tiny, "--out", out, "--no-verify")
    assert [rank.code for rank in ranks] == [0, 0], ranks
    ours, theirs = load_file(out / SINGLE), load_file(result / SINGLE)
    indices = [name for name in ours if name.endswith("weight_index")]
    same = sum(int((ours[name] == theirs[name]).sum()) for name in indices) / sum(ours[name].numel() for name in indices)
    assert same > 0.95


def test_it_has_to_be_the_last(recipe: Path, tiny: Path, out: Path) -> None:
    data: dict[str, Any] = yaml.safe_load(recipe.read_text())
    made = make_recipe({**data, "passes": [data["passes"][0], {"pass": "pv_tune"}, {"pass": "learned"}]})
    with pytest.raises(RecipeError, match=r"passes\.1: it trains the whole model .* put it last"):
        api.forecast(made, tiny, out)
