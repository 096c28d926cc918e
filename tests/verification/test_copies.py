"""Files that were copied from the original: the tokenizer above all."""

from collections.abc import Callable
from pathlib import Path

import pytest

from compressor import api
from compressor.evaluation.verify.check import Check
from compressor.evaluation.verify.verify import verify
from compressor.recipe.build import quantize_recipe


@pytest.fixture
def out(tiny_copy: Callable[..., Path], tmp_path: Path) -> Path:
    """A result whose original has files of the names that a run gives to its own."""
    model = tiny_copy("llama")
    for name in ("manifest.json", "report.json", "recipe.yaml"):
        (model / name).write_text("{}")
    recipe = quantize_recipe(4, method="rtn", group_size=64, evaluate=False)
    api.run(recipe, model, tmp_path / "out", device="cpu", verify=False)
    return tmp_path / "out"


def copies(out: Path) -> Check:
    return next(check for check in verify(out) if check.check == "copies")


def test_a_sound_result_passes(out: Path) -> None:
    assert copies(out).outcome == "passed"


def test_a_changed_tokenizer_is_named(out: Path) -> None:
    (out / "tokenizer.json").write_text((out / "tokenizer.json").read_text() + " ")
    assert copies(out).outcome == "failed"
    assert "tokenizer.json: is not what the run copied" in copies(out).detail


def test_a_lost_tokenizer_is_named(out: Path) -> None:
    (out / "tokenizer.json").unlink()
    assert "tokenizer.json: is missing" in copies(out).detail
