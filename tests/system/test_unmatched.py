"""Patterns of layers that match nothing: an error where somebody gave them for this run, a warning in a recipe file."""

from pathlib import Path

import pytest
from harness import CommandLine

import compressor
from compressor.errors import RecipeError

RECIPES = Path(compressor.__file__).parents[1] / "recipes"
QUICK = ("--group-size", 32, "--no-eval", "--no-verify", "--method", "rtn")
RECIPE = """
passes: [{pass: rtn, ignore: [lm_head, c_fc], options: [{format: int_group, bits: 4, group_size: 32}]}]
evaluation: null
"""


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("down_porj", "did you mean `down_proj`"),
        ("*.Down_Proj", "did you mean `down_proj`"),
        ("model.layers.0", "write `model.layers.0.*`"),
        ("mlp", "write `mlp.*`"),
        ("model.layers.1.mlp.down_proj.weight", "did you mean `model.layers.1.mlp.down_proj`"),
        ("model.layers.7.mlp.down_proj", "`model.layers.1.mlp.down_proj`"),
        ("re:dwon_proj$", "`down_proj`"),
        ("zzz", "a block has q_proj, k_proj"),
        ("z" * 5000, "a block has q_proj"),
    ],
)
@pytest.mark.parametrize("verb", ["quantize", "fit", "search", "run"])
def test_a_pattern_of_the_command_line_that_matches_nothing_is_an_error_with_a_hint(
    verb: str, pattern: str, hint: str, compress: CommandLine, tiny: Path, tmp_path: Path
) -> None:
    options: dict[str, tuple[object, ...]] = {
        "quantize": ("quantize", tiny, *QUICK, "--ignore", pattern),
        "fit": ("fit", tiny, "--bits", 3, "--ignore", pattern),
        "search": ("search", tiny, "--bits", 3, "--ignore", pattern),
        "run": ("run", RECIPES / "int4-gptq.yaml", tiny, "--set", f"passes.0.ignore=[{pattern!r}]"),
    }
    error = compress(*options[verb], "--out", tmp_path / "out").error
    assert hint in error
    assert len(error) <= 300
    assert list(tmp_path.iterdir()) == []


def test_the_dry_run_refuses_it_too(compress: CommandLine, tiny: Path) -> None:
    assert "matches no layer" in compress("quantize", tiny, *QUICK, "--dry-run", "--ignore", "down_porj").error


def test_an_argument_of_the_api_that_matches_nothing_is_an_error(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean `down_proj`"):
        compressor.quantize(tiny, tmp_path / "out", method="rtn", group_size=32, ignore=["down_porj"])


def test_the_warning_is_in_the_report_and_in_the_dry_run(compress: CommandLine, tiny: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    report = compress("run", recipe, tiny, "--out", tmp_path / "out", "--no-verify", "--json").json
    forecast = compress("run", recipe, tiny, "--out", tmp_path / "other", "--dry-run", "--json").json
    assert [("c_fc" in warning) for warning in report["warnings"]] == [True]
    assert forecast["warnings"] == report["warnings"]
    assert "warning: ignore `c_fc`" in compress("run", recipe, tiny, "--out", tmp_path / "other", "--dry-run").err
