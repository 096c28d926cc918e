"""A pass that chooses formats by itself: what it chose is what is written, read, resumed and forecast."""

import json
from pathlib import Path

import pytest
import yaml
from harness import TEXT, CommandLine, Fork, contents, dies_at_rename, on_ranks

from compressor.model.checkpoint import SINGLE

REPORTS = ("report.json", "report.html", "README.md")  # name the place and the time
BY_INPUT, BY_OUTPUT = "int_group", "int_input_group"
UNITS = 4 * 4


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rounds each layer along the better axis."""
    place = tmp_path_factory.mktemp("recipe")
    (place / "text.txt").write_text(TEXT)
    options = [{"format": name, "bits": 3, "group_size": 32} for name in (BY_INPUT, BY_OUTPUT)]
    calibration = {"source": str(place / "text.txt"), "samples": 32, "seq_len": 256}
    file = place / "recipe.yaml"
    file.write_text(
        yaml.safe_dump(
            {"passes": [{"pass": "adadim_rtn", "options": options}], "calibration": calibration, "evaluation": None}
        )
    )
    return file


@pytest.fixture(scope="module")
def result(recipe: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an uninterrupted run writes. Not to be changed."""
    place = tmp_path_factory.mktemp("whole")
    log = Fork(place / "log", "run", recipe, tiny, "--out", place / "out").result()  # verifies what it wrote
    assert log.code == 0, log.err
    return place / "out"


def chosen(result: Path) -> dict[str, str]:
    """The format of each layer, as the config has it."""
    layers = json.loads((result / "config.json").read_text())["quantization_config"]["layers"]
    return {layer: spec["format"] for layer, spec in layers.items()}


def test_both_are_chosen_somewhere(result: Path) -> None:
    assert set(chosen(result).values()) == {BY_INPUT, BY_OUTPUT}  # else the others show nothing
    assert len(chosen(result)) == 7 * 4


def test_the_report_names_the_choice(result: Path) -> None:
    labels = {row["layer"]: row["option"] for row in json.loads((result / "report.json").read_text())["rows"]}
    assert labels == {layer: "int3g32" if name == BY_INPUT else "int3g32-ic" for layer, name in chosen(result).items()}


def test_the_plan_names_each_unit_or_its_layers_where_they_differ(result: Path) -> None:
    plan = {name: spec["format"] for name, spec in yaml.safe_load((result / "plan.yaml").read_text()).items()}
    parts = {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }
    spread: dict[str, str] = {}
    for name, fmt in plan.items():
        parent, _, unit = name.rpartition(".")
        spread |= {f"{parent}.{part}": fmt for part in parts.get(unit, (unit,))}
    assert spread == chosen(result)
    assert UNITS <= len(plan) < 7 * 4


def test_a_killed_run_resumes_to_the_same_bytes(
    recipe: Path, tiny: Path, result: Path, out: Path, tmp_path: Path, compress: CommandLine
) -> None:
    command = ("run", recipe, tiny, "--out", out, "--no-verify")
    Fork(tmp_path / "log", *command, fate=(dies_at_rename, ("block-00002.safetensors", False))).result()
    assert not out.exists()
    assert compress(*command, "--resume").code == 0
    assert contents(out, REPORTS) == contents(result, REPORTS)


def test_two_ranks_write_what_one_writes(recipe: Path, tiny: Path, result: Path, out: Path, tmp_path: Path) -> None:
    ranks = on_ranks(tmp_path / "log", "run", recipe, tiny, "--out", out, "--no-verify")
    assert [rank.code for rank in ranks] == [0, 0], ranks
    assert contents(out, REPORTS) == contents(result, REPORTS)


def test_the_forecast_is_an_upper_bound_and_says_so(
    recipe: Path, tiny: Path, result: Path, out: Path, compress: CommandLine
) -> None:
    forecast = compress("run", recipe, tiny, "--out", out, "--dry-run", "--json").json
    size = (result / SINGLE).stat().st_size
    assert not forecast["exact"]
    assert size <= forecast["size_bytes"] <= size + 1000  # the formats are of one size, their names in the header are not
    assert forecast["bits_per_weight"] == json.loads((result / "report.json").read_text())["bits_per_weight"]
    assert [spec["format"] for spec in forecast["plan"]["model.layers.0.mlp.down_proj"]] == [BY_INPUT, BY_OUTPUT]
    assert "at most" in compress("run", recipe, tiny, "--out", out, "--dry-run").out


def test_an_option_that_cannot_hold_a_unit_is_not_one_of_its_choices(
    recipe: Path, tiny: Path, out: Path, compress: CommandLine
) -> None:
    """k_proj has 64 outputs, no group of 128; so q, k and v all keep to the other format."""
    groups = [f"passes.0.options.{i}.group_size=128" for i in range(2)]
    sets = [word for change in groups for word in ("--set", change)]
    plan = compress("run", recipe, tiny, "--out", out, "--dry-run", "--json", *sets).json["plan"]
    assert [spec["format"] for spec in plan["model.layers.0.self_attn.qkv_proj"]] == [BY_INPUT]
    assert [spec["format"] for spec in plan["model.layers.0.self_attn.o_proj"]] == [BY_INPUT, BY_OUTPUT]


def test_options_none_of_which_fits_are_refused(recipe: Path, tiny: Path, out: Path, compress: CommandLine) -> None:
    groups = [f"passes.0.options.{i}.group_size=96" for i in range(2)]
    sets = [word for change in groups for word in ("--set", change)]
    assert "in_features 128 is not a multiple of group_size 96" in compress("run", recipe, tiny, "--out", out, *sets).error


def test_without_a_pass_that_chooses_options_are_refused(recipe: Path, tiny: Path, out: Path, compress: CommandLine) -> None:
    error = compress("run", recipe, tiny, "--out", out, "--set", "passes.0.pass=rtn").error
    assert "2 options (int3g32, int3g32-ic) and nothing that chooses among them" in error
