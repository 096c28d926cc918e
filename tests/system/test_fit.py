"""`compress fit`, `compress search` and `--plan`: the size is met, the plan is kept to, nothing is lost on the way."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from harness import TEXT, CommandLine, Fate, Fork, Result, contents, dies_at_call, dies_at_rename, on_ranks

from compressor.model.source import ModelSource
from compressor.pipeline.target_search import minutes

REPORTS = ("report.json", "report.html", "README.md")  # name the place and the time
SMALL = (
    *("--samples", 4, "--seq-len", 64),
    *("--set", "search.tokens=1024", "--set", "search.table_tokens=256", "--set", "search.rounds=2"),
    *("--set", "search.evolve.generations=3", "--set", "search.evolve.offspring=6"),
    *("--set", "search.evolve.stages=[[3, 128], [1, 512]]"),
)
UNREFINED = ("--set", "passes.0.refine=0", "--set", "passes.0.search=false")
QUICK = (*SMALL, *UNREFINED, "--no-eval", "--no-verify")
UNTRAINED = ("--set", "passes.1.steps=1")
INTS = "passes.0.options=[" + ", ".join(f"{{format: int_group, bits: {b}, group_size: 32}}" for b in (2, 3, 4, 8)) + "]"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Quicker to read than the built-in one."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture
def compress(capsys: pytest.CaptureFixture[str], text: Path) -> Callable[..., Result]:
    """The command line, calibrating on that text where nothing else is said."""
    line = CommandLine(capsys)

    def run(verb: str, *arguments: object) -> Result:
        given = verb not in ("fit", "search") or "--calibration" in arguments
        return line(verb, *arguments, *(() if given else ("--calibration", text)))

    return run


@pytest.fixture(scope="module")
def levels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The levels that the first of several targets measures for `tiny` and `INTS`, and the others use."""
    return tmp_path_factory.mktemp("shared") / "levels"


def weight_bytes(model: Path) -> int:
    return sum(file.stat().st_size for file in model.glob("*.safetensors*"))


@pytest.mark.parametrize("bits", [2.7, 6.1])
def test_bits_are_met_from_below(tiny: Path, out: Path, compress: Callable[..., Result], bits: float) -> None:
    trained = UNTRAINED if bits <= 4 else ()
    report = compress("fit", tiny, "--bits", bits, "--out", out, *QUICK, *trained, "--set", INTS, "--json").json
    assert 0.98 * bits < report["bits_per_weight"] <= bits  # 16 units: no finer steps than these
    assert not out.with_name("out.search").exists()


@pytest.mark.parametrize(("flag", "share"), [("--size", 0.2), ("--ratio", 0.78)])
def test_sizes_are_met_from_below(
    tiny: Path, levels: Path, out: Path, compress: Callable[..., Result], flag: str, share: float
) -> None:
    whole = weight_bytes(tiny)
    wanted = int(share * whole) if flag == "--size" else int((1 - share) * whole)
    given = wanted if flag == "--size" else share
    result = compress("fit", tiny, flag, given, "--out", out, *QUICK, *UNTRAINED, "--set", INTS, "--levels", levels)
    assert result.code == 0, result.err
    assert 0.99 * wanted < weight_bytes(out) <= wanted


def test_the_report_says_what_else_was_there_to_choose(tiny: Path, out: Path, compress: Callable[..., Result]) -> None:
    result = compress(
        *("fit", tiny, "--bits", 3, "--out", out, *SMALL, *UNREFINED, *UNTRAINED, "--set", INTS),
        *("--set", "evaluation.samples=2"),
    )
    assert result.code == 0, result.err
    assert "uniform" in result.out
    search = json.loads((out / "report.json").read_text())["search"]
    by_name = {row["name"]: row for row in search["contestants"]}
    assert {"uniform", "LIM", "ZD", "Hessian trace", "block errors"} <= by_name.keys()
    assert by_name[search["best"]]["kl"] == min(row["kl"] for row in search["contestants"])
    assert all(row["bits_per_weight"] <= 3 for row in search["contestants"])
    assert "search" in (out / "report.html").read_text()


def test_a_searched_plan_applied_gives_what_fit_gives(tiny: Path, tmp_path: Path, compress: Callable[..., Result]) -> None:
    options = (*SMALL, *UNREFINED, "--set", INTS)
    recipe = tmp_path / "fit.yaml"
    printed = compress("fit", tiny, "--bits", 3, *options, *UNTRAINED, "--no-eval", "--print-recipe")
    recipe.write_text(printed.out)
    plan = tmp_path / "plan.yaml"
    assert compress("search", tiny, "--bits", 3, *options, *UNTRAINED, "--out", plan).code == 0
    assert not (tmp_path / "plan.yaml.search").exists()
    assert compress("fit", tiny, "--bits", 3, *options, *UNTRAINED, *QUICK[-2:], "--out", tmp_path / "fitted").code == 0
    result = compress("run", recipe, tiny, "--plan", plan, "--no-verify", "--out", tmp_path / "planned")
    assert result.code == 0, result.err
    assert "measure" not in result.err  # the plan is what was found: nothing is searched for
    fitted, planned = (contents(tmp_path / name, (*REPORTS, "recipe.yaml")) for name in ("fitted", "planned"))
    assert fitted == planned
    assert (tmp_path / "fitted" / "plan.yaml").read_text() == plan.read_text()


def test_a_plan_of_one_run_repeats_it_with_another_recipe(
    tiny: Path, tmp_path: Path, compress: Callable[..., Result]
) -> None:
    """What the plan gives is put on offer in the recipe, which gave something else."""
    plan = tmp_path / "plan.yaml"
    compress("search", tiny, "--bits", 3, *SMALL, *UNREFINED, "--set", INTS, "--out", plan)
    recipe = tmp_path / "rtn.yaml"
    recipe.write_text("passes:\n- pass: rtn\n  options: [{format: int_group, bits: 4, group_size: 32}]\nevaluation: null\n")
    forecast = compress("run", recipe, tiny, "--plan", plan, "--dry-run", "--json").json
    report = compress("run", recipe, tiny, "--plan", plan, "--no-verify", "--out", tmp_path / "out", "--json").json
    assert report["bits_per_weight"] == pytest.approx(forecast["bits_per_weight"])
    assert report["size_bytes"] == forecast["size_bytes"] == weight_bytes(tmp_path / "out")
    assert (tmp_path / "out" / "plan.yaml").read_text() == plan.read_text()
    again = compress("run", tmp_path / "out" / "recipe.yaml", tiny, "--plan", plan, "--no-verify", "--out", tmp_path / "2")
    assert again.code == 0, again.err
    assert contents(tmp_path / "2", REPORTS) == contents(tmp_path / "out", REPORTS)


def test_integers_floats_and_vectors_are_mixed(tiny: Path, out: Path, compress: Callable[..., Result]) -> None:
    integers = "passes.0.options=[{format: int_group, bits: 2, group_size: 32}, {format: int_group, bits: 4, group_size: 32}]"
    vectors = "passes.2.options=[{format: vq, vector: 4, bits: 6, residual_bits: 0}]"
    few = ("--set", integers, "--set", vectors, "--set", "passes.1.refine=0", "--set", "passes.2.refine=0")
    mixed = ("--using", "int,fp4,vq", *QUICK, *few, "--set", "passes.3.steps=1")
    result = compress("fit", tiny, "--bits", 3.4, "--out", out, *mixed, "--levels", out.with_name("levels"))
    assert result.code == 0, result.err
    lines = [json.loads(line) for line in (out.with_name("levels") / "journal.jsonl").read_text().splitlines()[1:]]
    offered = {level["option"]["format"] for line in lines for level in line["unit"]["levels"]}
    assert offered == {"int_group", "mxfp4", "nvfp4", "vq"}
    assert json.loads((out / "report.json").read_text())["bits_per_weight"] <= 3.4


def test_attentions_and_mlps_go_where_a_size_asks_for_it(
    tiny: Path, tmp_path: Path, out: Path, compress: Callable[..., Result]
) -> None:
    """Half of what two bits for all take: something has to go; the plan alone makes the same model again."""
    two_bits = "passes.0.options=[{format: int_group, bits: 2, group_size: 32}, {format: int_group, bits: 4, group_size: 32}]"
    source = ModelSource(tiny, torch.device("cpu"))
    blocks = [source.block(index, load=False) for index in range(len(source.layers))]
    weights = sum(block.weight(name).numel() for block in blocks for name in block.layers)
    size = weight_bytes(tiny) - 4 * weights + weights * 2.5 / 8 / 2  # fp32
    options = ("--using", "int,prune", "--size", int(size) + 20000, "--set", two_bits, *SMALL, *UNREFINED, *UNTRAINED)
    result = compress("fit", tiny, *options, "--no-eval", "--out", out)
    assert result.code == 0, result.err
    assert 0.9 * size < weight_bytes(out) <= int(size) + 20000
    gone = ModelSource(out, torch.device("cpu")).absent
    assert gone
    assert "without 0" not in compress("inspect", out).out
    recipe = tmp_path / "fit.yaml"
    recipe.write_text(compress("fit", tiny, *options, "--no-eval", "--print-recipe").out)
    again = compress("run", recipe, tiny, "--plan", out / "plan.yaml", "--no-verify", "--out", tmp_path / "again")
    assert again.code == 0, again.err
    assert contents(tmp_path / "again", (*REPORTS, "recipe.yaml")) == contents(out, (*REPORTS, "recipe.yaml"))


def test_levels_are_made_again_around_a_choice(tiny: Path, tmp_path: Path, compress: Callable[..., Result]) -> None:
    options = (*SMALL, *UNREFINED, "--set", INTS, "--set", "search.rebuilds=1", "--levels", tmp_path / "levels")
    first = compress("search", tiny, "--bits", 3, *options, "--out", tmp_path / "plan.yaml", "--json")
    names = [row["name"] for row in first.json["contestants"]]
    assert "uniform" in names
    assert "before, levels made again (1)" in names
    assert all(row["bits_per_weight"] <= 3 for row in first.json["contestants"])
    (again,) = (tmp_path / "levels").glob("around-*")
    units = [json.loads(line)["unit"] for line in (again / "journal.jsonl").read_text().splitlines()[1:]]
    whole = [json.loads(line)["unit"] for line in (tmp_path / "levels" / "journal.jsonl").read_text().splitlines()[1:]]
    assert [unit["name"] for unit in units] == [unit["name"] for unit in whole]
    assert any(len(a["levels"]) < len(b["levels"]) for a, b in zip(units, whole, strict=True))
    first_block = [unit for unit in units if unit["block"] == 0]
    for new, old in zip(first_block, whole, strict=False):  # nothing comes before: they are what they were
        errors = {str(level["option"]): level["error"] for level in old["levels"]}
        assert all(level["error"] == errors[str(level["option"])] for level in new["levels"])
    repeated = compress("search", tiny, "--bits", 3, *options, "--out", tmp_path / "again.yaml")
    assert "measure" not in repeated.err
    assert (tmp_path / "again.yaml").read_text() == (tmp_path / "plan.yaml").read_text()


def test_levels_that_are_kept_serve_another_target(tiny: Path, tmp_path: Path, compress: Callable[..., Result]) -> None:
    options = (*SMALL, *UNREFINED, "--set", INTS, "--levels", tmp_path / "levels")
    assert "measure" in compress("search", tiny, "--bits", 3, *options, "--out", tmp_path / "3.yaml").err
    second = compress("search", tiny, "--bits", 4, *options, "--out", tmp_path / "4.yaml")
    assert second.code == 0, second.err
    assert "measure" not in second.err
    same = compress("search", tiny, "--bits", 3, *options, "--out", tmp_path / "3-again.yaml")
    assert "evolve" not in same.err  # not even that
    assert (tmp_path / "3.yaml").read_text() == (tmp_path / "3-again.yaml").read_text()
    other = compress("search", tiny, "--bits", 3, *options, "--samples", 5, "--out", tmp_path / "5.yaml")
    assert "name another directory with --levels" in other.late_error


DEATHS: dict[str, Fate] = {
    "while levels are measured": (dies_at_rename, ("model.layers.2.mlp.down_proj.safetensors", True)),
    "before evolution": (dies_at_call, ("compressor.pipeline.search.find", "evolve")),
    "while the model is written": (dies_at_rename, ("block-00002.safetensors", True)),
    "after the result appeared": (dies_at_rename, ("out", True)),
}


@pytest.fixture(scope="module")
def killable(tiny: Path, text: Path) -> tuple[object, ...]:
    """A command that may be killed, but for where it writes."""
    return ("fit", tiny, "--bits", 3, *QUICK, *UNTRAINED, "--set", INTS, "--calibration", text)


@pytest.fixture(scope="module")
def whole(killable: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What it writes if it is not."""
    place = tmp_path_factory.mktemp("whole")
    assert Fork(place / "log", *killable, "--out", place / "out").result().code == 0
    return contents(place / "out", REPORTS)


@pytest.mark.parametrize("fate", DEATHS.values(), ids=DEATHS)
def test_a_fit_that_is_killed_goes_on_to_the_same(
    killable: tuple[object, ...], whole: dict[str, bytes], tmp_path: Path, compress: Callable[..., Result], fate: Fate
) -> None:
    assert Fork(tmp_path / "log", *killable, "--out", tmp_path / "out", fate=fate).result().code == -9
    result = compress(*killable, "--out", tmp_path / "out", "--resume")
    assert result.code == 0, result.err
    assert contents(tmp_path / "out", REPORTS) == whole
    assert not (tmp_path / "out.partial").exists()


def test_two_ranks_find_the_same_plan(tiny: Path, text: Path, tmp_path: Path, compress: Callable[..., Result]) -> None:
    data = ("--samples", 32, "--seq-len", 256, "--calibration", text)
    arguments = ("search", tiny, "--bits", 3, *SMALL, *UNREFINED, *data, "--set", INTS)
    assert compress(*arguments, "--out", tmp_path / "one.yaml").code == 0
    results = on_ranks(tmp_path / "log", *arguments, "--out", tmp_path / "two.yaml")
    assert [result.code for result in results] == [0, 0], results[0].err
    assert (tmp_path / "two.yaml").read_text() == (tmp_path / "one.yaml").read_text()


class TestBadInput:
    def test_an_impossible_target_says_what_is_needed(self, tiny: Path, out: Path, compress: Callable[..., Result]) -> None:
        error = compress("fit", tiny, "--bits", 2.1, "--out", out, *QUICK, "--set", INTS).error
        assert "the smallest options (int2g32) take 2.506; allow bits 2.507, or offer smaller options" in error
        assert not out.exists()

    def test_the_smallest_size_that_is_named_can_be_had(
        self, tiny: Path, levels: Path, out: Path, compress: Callable[..., Result]
    ) -> None:
        def fit(size: object) -> Result:
            options = (*QUICK, *UNTRAINED, "--set", INTS, "--levels", levels)
            return compress("fit", tiny, "--size", size, "--out", out, *options)

        named = re.search(r"allow size (\d+), or", fit(1000).error)
        assert named is not None
        assert "allow size" in fit(int(named[1]) - 8).error
        assert fit(named[1]).code == 0
        assert weight_bytes(out) <= int(named[1])

    def test_a_time_in_which_nothing_can_be_measured(self, tiny: Path, out: Path, compress: Callable[..., Result]) -> None:
        error = compress("fit", tiny, "--bits", 3, "--time", "0.01s", "--out", out, *QUICK, "--set", INTS).late_error
        assert "search.minutes: two options of every layer take" in error
        assert "minutes more" in error

    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            ((), "give exactly one of size, bits and ratio"),
            (("--bits", 3, "--ratio", 0.5), "bits and ratio given"),
            (("--size", "big"), "'big' is no positive size"),
            (("--size", "0GB"), "no positive size"),
            (("--ratio", 1.2), "ratio: 1.2 is not between 0 and 1"),
            (("--bits", -1), "bits: -1.0 is not a positive number"),
            (("--bits", 3, "--using", "int,bf16"), "--using bf16: no such numbers"),
            (("--bits", 3, "--using", "int,prune"), "give --size or --ratio"),
            (("--ratio", 0.5, "--using", "prune"), "and numbers for the rest"),
            (("--bits", 3, "--set", "search.drop=true"), "give a target of size or ratio"),
            (("--bits", 3, "--set", "search.rebuilds=-1"), "rebuilds: -1"),
            (("--bits", 2, "--using", "fp4"), "none of these numbers has options near 2.00 bits"),
            (("--bits", 3, "--time", "soon"), "--time soon: not a time"),
            (("--bits", 3, "--set", "search.evolve.offspring=0"), "offspring: 0 is not a positive number"),
            (("--bits", 3, "--set", "search.tokens=-5"), "tokens: -5"),
        ],
    )
    def test_options_that_make_no_sense(
        self, tiny: Path, out: Path, compress: Callable[..., Result], flags: tuple[object, ...], said: str
    ) -> None:
        assert said in compress("fit", tiny, *flags, "--out", out).error

    def test_a_size_that_is_too_small_though_everything_may_go(
        self, tiny: Path, out: Path, compress: Callable[..., Result]
    ) -> None:
        error = compress("fit", tiny, "--size", "10KB", "--using", "int,prune", "--out", out, *QUICK).error
        assert "the smallest options (none at all) take 0.000; allow size" in error

    def test_a_plan_for_a_recipe_that_prunes(self, tiny: Path, tmp_path: Path, compress: Callable[..., Result]) -> None:
        recipe = tmp_path / "r.yaml"
        steps = [
            {"pass": "prune_depth", "ratio": 0.1},
            {"pass": "gptq", "options": [{"format": "int_group", "bits": b} for b in (4, 8)]},
        ]
        recipe.write_text(yaml.safe_dump({"passes": steps, "target": {"bits": 5}}))
        assert "the recipe prunes it" in compress("search", tiny, "--recipe", recipe, "--out", tmp_path / "plan.yaml").error

    def test_too_little_text_to_search_on(self, tiny: Path, out: Path, compress: Callable[..., Result]) -> None:
        greedy = compress("fit", tiny, "--bits", 3, "--out", out, *SMALL, "--set", "search.tokens=9000000")
        assert "search.tokens 9000000, besides those of calibration" in greedy.late_error

    def test_nothing_to_choose(self, tiny: Path, out: Path, compress: Callable[..., Result]) -> None:
        one = "passes.0.options=[{format: int_group, bits: 4, group_size: 32}]"
        assert "offer one option" in compress("fit", tiny, "--bits", 5, "--out", out, *QUICK, "--set", one).error

    def test_a_pass_that_changes_blocks_before(self, tiny: Path, tmp_path: Path, compress: Callable[..., Result]) -> None:
        recipe = tmp_path / "r.yaml"
        steps = [{"pass": "smooth"}, {"pass": "gptq", "options": [{"format": "int_group", "bits": b} for b in (4, 8)]}]
        recipe.write_text(yaml.safe_dump({"passes": steps, "target": {"bits": 5}}))
        assert "passes.0: changes dense weights of blocks" in compress("run", recipe, tiny).error

    def test_a_dry_run_of_a_target(self, tiny: Path, tmp_path: Path, compress: Callable[..., Result]) -> None:
        recipe = tmp_path / "r.yaml"
        steps = [{"pass": "gptq", "options": [{"format": "int_group", "bits": b} for b in (4, 8)]}]
        recipe.write_text(yaml.safe_dump({"passes": steps, "target": {"bits": 5}}))
        assert "known after a search" in compress("run", recipe, tiny, "--dry-run").error

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ("- a\n- b\n", "not a plan"),
            ("{", "not valid YAML"),
            ("model.layers.0.mlp.down_proj: {format: int_grop, bits: 4}\n", "did you mean `int_group`?"),
            ("model.layers.0.mlp.down_proj: {format: int_group, bits: 4, group_size: 32}\n", "has no entry for"),
        ],
    )
    def test_what_is_no_plan(
        self, tiny: Path, tmp_path: Path, compress: Callable[..., Result], content: str, said: str
    ) -> None:
        plan, recipe = tmp_path / "plan.yaml", tmp_path / "r.yaml"
        plan.write_text(content)
        recipe.write_text("passes:\n- pass: rtn\n  options: [{format: int_group, bits: 4, group_size: 32}]\n")
        assert said in compress("run", recipe, tiny, "--plan", plan).error

    def test_a_plan_for_another_model(self, tiny: Path, tmp_path: Path, compress: Callable[..., Result]) -> None:
        plan, recipe = tmp_path / "plan.yaml", tmp_path / "r.yaml"
        recipe.write_text("passes:\n- pass: rtn\n  options: [{format: int_group, bits: 4, group_size: 32}]\n")
        assert compress("run", recipe, tiny, "--no-verify", "--out", tmp_path / "out", "--set", "evaluation=null").code == 0
        whole = (tmp_path / "out" / "plan.yaml").read_text()
        plan.write_text(whole + "model.layers.9.mlp.down_proj: {format: int_group, bits: 4, group_size: 32}\n")
        assert "no pass of the recipe offers for it" in compress("run", recipe, tiny, "--plan", plan).error

    def test_a_plan_that_is_not_there(self, tiny: Path, tmp_path: Path, compress: Callable[..., Result]) -> None:
        recipe = tmp_path / "r.yaml"
        recipe.write_text("passes:\n- pass: rtn\n  options: [{format: int_group, bits: 4, group_size: 32}]\n")
        error = compress("run", recipe, tiny, "--plan", tmp_path / "none.yaml").error
        assert "cannot be read" in error

    def test_a_plan_that_is_there_already(self, tiny: Path, tmp_path: Path, compress: Callable[..., Result]) -> None:
        (tmp_path / "plan.yaml").write_text("mine")
        assert "exists already" in compress("search", tiny, "--bits", 3, "--out", tmp_path / "plan.yaml").error
        assert (tmp_path / "plan.yaml").read_text() == "mine"


@pytest.mark.parametrize(("text", "expected"), [("90s", 1.5), ("30m", 30), ("2h", 120), ("5", 5), ("1.5h", 90)])
def test_times(text: str, expected: float) -> None:
    assert minutes(text) == expected


@pytest.mark.parametrize(
    ("size", "expected"), [("4GB", 4 * 10**9), ("3.5GiB", 3.5 * 2**30), ("800 MB", 8 * 10**8), (1234, 1234), ("7k", 7000)]
)
def test_sizes(size: str | int, expected: float) -> None:
    from compressor.recipe.schema import Target

    assert Target(size=size).bytes == expected
