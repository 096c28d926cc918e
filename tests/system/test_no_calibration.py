"""Quantizing from the weights alone: no text is read, and several ranks choose what one chooses."""

from pathlib import Path

import pytest
import yaml
from harness import CommandLine, contents, on_ranks

from compressor.recipe.schema import load_recipe, to_yaml

REPORTS = ("report.json", "report.html", "README.md")  # name the place and the time
WEIGHTS_ALONE = ("--no-calibration", "--no-eval", "--no-verify")
RECIPES = Path(__file__).parents[2] / "recipes"
CASES = {
    "by budget": ("finequant", ["evaluation=null"]),
    "by tolerance": ("finequant", ["evaluation=null", "passes.0.budget_bits_per_weight=null", "passes.0.tolerance=0.2"]),
}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_best_method_that_needs_no_text_is_taken(bits: int, compress: CommandLine) -> None:
    recipe = yaml.safe_load(compress("quantize", "--bits", bits, "--no-calibration", "--print-recipe").out)
    assert [step["pass"] for step in recipe["passes"]] == ["hqq"]


@pytest.mark.parametrize("method", ["rtn", "hqq"])
def test_a_method_that_needs_no_text_may_be_named(method: str, compress: CommandLine) -> None:
    recipe = yaml.safe_load(compress("quantize", "--method", method, "--no-calibration", "--print-recipe").out)
    assert [step["pass"] for step in recipe["passes"]] == [method]


def test_no_text_is_read(model: Path, out: Path, compress: CommandLine) -> None:
    """Without a tokenizer none can be."""
    for file in model.glob("token*"):
        file.unlink()
    assert compress("quantize", model, "--out", out, *WEIGHTS_ALONE).code == 0


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_write_what_one_writes(case: str, tiny: Path, tmp_path: Path, compress: CommandLine) -> None:
    name, changes = CASES[case]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(load_recipe(RECIPES / f"{name}.yaml", changes)))
    compress("run", recipe, tiny, "--out", tmp_path / "one", "--no-verify")
    on_ranks(tmp_path / "log", "run", recipe, tiny, "--out", tmp_path / "two", "--no-verify")
    assert contents(tmp_path / "two", REPORTS) == contents(tmp_path / "one", REPORTS)


def test_the_plan_says_what_was_chosen(tiny: Path, out: Path, compress: CommandLine) -> None:
    """And keeps the budget, block by block; the forecast is of the finest groups."""
    recipe = RECIPES / "finequant.yaml"
    forecast = compress("run", recipe, tiny, "--dry-run", "--json").json
    report = compress("run", recipe, tiny, "--out", out, "--no-verify", "--set", "evaluation=null", "--json").json
    plan = yaml.safe_load((out / "plan.yaml").read_text())
    assert {step["format"] for step in plan.values()} == {"int_group"}
    assert report["bits_per_weight"] <= 4.25 + 64 * 7 / 65536  # each layer also stores its shape
    assert report["size_bytes"] <= forecast["size_bytes"]
