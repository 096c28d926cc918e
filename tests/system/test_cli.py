"""The command line: what it refuses and how, what it answers, what it writes."""

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from harness import MAX_POSITIONS, CommandLine, Fork, build_model, contents, may_write
from safetensors import safe_open

from compressor import api
from compressor.model import shards
from compressor.model.checkpoint import INDEX, SINGLE

VERBS = ("quantize", "run", "eval", "compare", "verify", "inspect", "bench", "report", "generate", "demo")
QUICK = ("--method", "gptq", "--samples", 4, "--seq-len", 64, "--no-eval", "--no-verify")
ROUND = ("--method", "rtn", "--no-eval", "--no-verify")

# Bad input. For each: options of `compress quantize`, and what the sentence must name.
BAD_OPTIONS = {
    "a group size that does not divide": (
        ("--group-size", 100),
        ("model.layers.0.self_attn.q_proj", "in_features 128", "group_size 100", "64"),
    ),
    "a group size of zero": (("--group-size", 0), ("group_size: 0", "-1")),
    "too few bits": (("--bits", 1), ("bits: 1", "2 … 8")),
    "too many bits": (("--bits", 9), ("bits: 9", "2 … 8")),
    "an unknown pass": (("--method", "gptqq"), ("`gptqq`", "did you mean `gptq`?")),
    "a calibrated method without calibration": (("--method", "gptq", "--no-calibration"), ("`gptq`", "--no-calibration")),
    "calibration text without calibration": (("--calibration", "x.txt", "--no-calibration"), ("x.txt", "--no-calibration")),
    "an unknown format": (("--set", "passes.0.options.0.format=int_grop"), ("`int_grop`", "did you mean `int_group`?")),
    "an unknown key of a pass": (("--set", "passes.0.dmap=0.1"), ("dmap", "did you mean `damp`?")),
    "an unknown key of a format": (("--set", "passes.0.options.0.bitz=4"), ("bitz", "did you mean `bits`?")),
    "an unknown key of the calibration": (("--set", "calibration.sample=4"), ("calibration.sample", "`samples`?")),
    "an unknown key of the evaluation": (("--set", "evaluation.sampels=4"), ("evaluation.sampels", "`samples`?")),
    "an unknown key at the top": (("--set", "passs=[]"), ("passs", "did you mean `passes`?")),
    "a --set path beyond a list": (("--set", "passes.7.damp=0.1"), ("--set passes.7.damp=0.1", "--print-recipe")),
    "a --set path with a name for a number": (("--set", "passes.x.damp=0.1"), ("passes.x.damp", "--print-recipe")),
    "a --set path below a value": (("--set", "calibration.source.x=1"), ("calibration.source.x", "--print-recipe")),
    "a --set without a value": (("--set", "passes.0.damp"), ("passes.0.damp", "KEY=VALUE")),
    "a --set value that is not YAML": (("--set", "passes.0.damp=["), ("passes.0.damp=[", "YAML")),
    "a --set value of the wrong type": (("--set", "passes.0.damp=high"), ("damp", "'high'")),
    "a --set value out of range": (("--set", "passes.0.damp=2"), ("damp: 2.0", "0 … 1")),
    "no sample": (("--samples", 0), ("samples: 0",)),
    "a sequence longer than the model's": (("--seq-len", MAX_POSITIONS + 1), ("257", "256", "--seq-len")),
    "a sequence with nothing to predict": (("--seq-len", 1), ("seq_len 1", "at least 2", "--seq-len")),
    "an unknown dtype": (("--dtype", "float8"), ("float8", "bfloat16")),
    "an unknown device": (("--device", "tpu"), ("tpu", "cpu, cuda")),
    "a GPU that is not there": (("--device", "cuda"), ("cuda", "0 CUDA devices")),
    "every layer ignored": (("--ignore", "*"), ("leave no layer", "mlp.down_proj")),
}

# Bad calibration files: name, content, and what the sentence must name.
BAD_DATA = {
    "an empty text file": ("empty.txt", "", ("holds no text",)),
    "a text file of blank lines": ("blank.txt", "\n\n  \n", ("holds no text",)),
    "too little text": ("short.txt", "hello there", ("tokens of text", "4 samples of 64", "256", "--samples")),
    "text that is not UTF-8": ("latin.txt", b"caf\xe9", ("latin.txt", "UTF-8")),
    "JSON lines cut short": ("cut.jsonl", '{"text": "whole"}\n{"text": ', ("cut.jsonl",)),
    "JSON lines without a column of text": ("columns.jsonl", '{"body": "a"}\n', ("columns.jsonl:1", "body", "text")),
    "JSON lines of numbers": ("numbers.jsonl", "1\n2\n", ("numbers.jsonl:1", "a number")),
    "a damaged Parquet file": ("bad.parquet", "PAR", ("bad.parquet",)),
    "conversations without a chat template": (
        "chat.jsonl",
        '{"messages": [{"role": "user", "content": "hi"}]}\n',
        ("chat template",),
    ),
    "an unknown kind of file": ("table.csv", "a,b\n", ("table.csv", ".jsonl")),
}

# Bad recipe files.
BAD_RECIPES = {
    "no YAML": ("passes: [", ("not valid YAML", "line 1")),
    "not UTF-8": (b"\xff\xfe\x00", ("not UTF-8 text", "byte 0 is 0xff")),
    "empty": ("", ("expected a mapping",)),
    "a list": ("- gptq", ("expected a mapping",)),
    "without passes": ("calibration: {samples: 4}", ("passes", "required")),
    "with an empty list of passes": ("passes: []", ("passes: empty",)),
    "with a pass that has no options": ("passes: [{pass: gptq}]", ("options", "required")),
    "with a pass that cannot be imported": ("passes: [{pass: no.such}]", ("`no.such`", "importable")),
    "with a pass of a foreign module": ("passes: [{pass: json.decoder}]", ("`json.decoder`", "EXPORT")),
}


def remove_tokenizer(model: Path) -> None:
    for file in model.glob("token*"):
        file.unlink()


def fill_with_nan(model: Path) -> None:
    """Every bit of the data set: a NaN in every floating-point type."""
    file = model / SINGLE
    whole = file.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    file.write_bytes(whole[:start] + b"\xff" * (len(whole) - start))


# Bad model directories: how a good one is damaged, and what the sentence must name.
BAD_MODELS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "without a tokenizer": (remove_tokenizer, ("no tokenizer files", "tokenizer.json")),
    "with a damaged tokenizer": (lambda m: (m / "tokenizer.json").write_text("{"), ("tokenizer cannot be loaded",)),
    "without config.json": (lambda m: (m / "config.json").unlink(), ("no config.json",)),
    "with a damaged config.json": (lambda m: (m / "config.json").write_text("{"), ("config.json", "not valid JSON")),
    "of no known type": (lambda m: (m / "config.json").write_text('{"model_type": "x"}'), ("model type `x`",)),
    "without weights": (lambda m: (m / SINGLE).unlink(), (SINGLE, INDEX)),
    "with weights cut short": (lambda m: (m / SINGLE).write_bytes((m / SINGLE).read_bytes()[:-1]), (SINGLE, "not a whole")),
    "with NaN for weights": (fill_with_nan, ("NaN",)),
}


def assert_names(sentence: str, parts: tuple[str, ...]) -> None:
    assert [part for part in parts if part not in sentence] == [], sentence


class TestRefusals:
    """Exit status 2, one sentence on stderr, and no OUT."""

    @pytest.mark.parametrize("case", BAD_OPTIONS)
    def test_bad_options_are_named_in_one_sentence(self, case: str, tiny: Path, out: Path, compress: CommandLine) -> None:
        options, named = BAD_OPTIONS[case]
        assert_names(compress("quantize", tiny, "--out", out, *options).error, named)
        assert not out.exists()

    @pytest.mark.parametrize("case", BAD_DATA)
    def test_a_bad_calibration_file_is_named_in_one_sentence(
        self, case: str, tiny: Path, tmp_path: Path, out: Path, compress: CommandLine
    ) -> None:
        name, text, named = BAD_DATA[case]
        file = tmp_path / name
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        assert_names(compress("quantize", tiny, "--out", out, *QUICK, "--calibration", file).error, named)
        assert not out.exists()

    @pytest.mark.parametrize("case", BAD_RECIPES)
    def test_a_bad_recipe_is_named_in_one_sentence(
        self, case: str, tiny: Path, tmp_path: Path, out: Path, compress: CommandLine
    ) -> None:
        text, named = BAD_RECIPES[case]
        recipe = tmp_path / "bad.yaml"
        recipe.write_bytes(text if isinstance(text, bytes) else text.encode())
        assert_names(compress("run", recipe, tiny, "--out", out).error, ("bad.yaml", *named))
        assert not out.exists()

    @pytest.mark.parametrize("case", BAD_MODELS)
    def test_a_bad_model_is_named_in_one_sentence(self, case: str, model: Path, out: Path, compress: CommandLine) -> None:
        damage, named = BAD_MODELS[case]
        damage(model)
        assert_names(compress("quantize", model, "--out", out, *QUICK).error, named)
        assert not out.exists()

    def test_a_calibration_file_that_is_not_there_is_refused(self, tiny: Path, out: Path, compress: CommandLine) -> None:
        assert "no such file" in compress("quantize", tiny, "--out", out, "--calibration", "nowhere.txt").error

    def test_a_recipe_that_is_not_there_is_refused(self, tiny: Path, tmp_path: Path, compress: CommandLine) -> None:
        assert "no such recipe" in compress("run", tmp_path / "none.yaml", tiny).error

    def test_a_model_that_is_not_there_is_refused(self, tmp_path: Path, out: Path, compress: CommandLine) -> None:
        assert "no such directory" in compress("quantize", tmp_path / "nowhere", "--out", out).error

    def test_a_file_for_a_model_is_refused(self, tiny: Path, out: Path, compress: CommandLine) -> None:
        assert "MODEL" in compress("quantize", tiny / "config.json", "--out", out).error

    def test_the_current_directory_is_refused_if_it_is_no_model(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compress: CommandLine
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert "no config.json" in compress("quantize").error

    def test_a_quantized_model_is_refused(self, tiny: Path, tmp_path: Path, out: Path, compress: CommandLine) -> None:
        compress("quantize", tiny, "--out", tmp_path / "once", *ROUND)
        assert "already quantized" in compress("quantize", tmp_path / "once", "--out", out, *ROUND).error
        assert not out.exists()

    def test_an_option_of_the_wrong_type_exits_with_2(self, tiny: Path, compress: CommandLine) -> None:
        assert compress("quantize", tiny, "--bits", "four").code == 2

    @pytest.mark.parametrize("options", [("--seq-len", 0), ("--seq-len", 1), ("--seq-len", 257), ("--samples", 0)])
    def test_a_wrong_amount_of_evaluation_is_refused(
        self, options: tuple[object, ...], tiny: Path, compress: CommandLine
    ) -> None:
        assert str(options[0]) in compress("eval", tiny, *options).error

    def test_a_reference_of_another_vocabulary_is_refused(self, tiny: Path, tmp_path: Path, compress: CommandLine) -> None:
        other = build_model(tmp_path / "other", vocab_size=320)
        assert_names(compress("eval", tiny, "--reference", other, "--samples", 2).error, ("300", "320"))

    def test_a_chat_without_a_template_is_refused(self, tiny: Path, compress: CommandLine) -> None:
        assert "--chat" in compress("generate", tiny, "--chat").error

    def test_generating_on_an_unknown_device_is_refused(self, tiny: Path, compress: CommandLine) -> None:
        assert "cpu, cuda" in compress("generate", tiny, "--device", "xpu").error


class TestThePlaceForTheResult:
    """What is there already stays, unless --overwrite was given and it is a model."""

    def test_an_existing_directory_is_refused(self, tiny: Path, out: Path, compress: CommandLine) -> None:
        out.mkdir()
        assert_names(compress("quantize", tiny, "--out", out, *ROUND).error, (str(out), "--overwrite"))

    def test_overwrite_replaces_a_model(self, tiny: Path, out: Path, compress: CommandLine) -> None:
        compress("quantize", tiny, "--out", out, *ROUND)
        (out / "stale").touch()
        assert compress("quantize", tiny, "--out", out, *ROUND, "--overwrite").code == 0
        assert not (out / "stale").exists()

    def test_overwrite_fills_an_empty_directory(self, tiny: Path, out: Path, compress: CommandLine) -> None:
        out.mkdir()
        assert compress("quantize", tiny, "--out", out, *ROUND, "--overwrite").code == 0

    def test_overwrite_spares_a_directory_that_is_no_model(self, tiny: Path, out: Path, compress: CommandLine) -> None:
        out.mkdir()
        (out / "thesis.tex").touch()
        assert "not a model directory" in compress("quantize", tiny, "--out", out, *ROUND, "--overwrite").error
        assert (out / "thesis.tex").exists()

    def test_overwrite_spares_the_original(self, model: Path, compress: CommandLine) -> None:
        before = contents(model)
        assert "original" in compress("quantize", model, "--out", model, *ROUND, "--overwrite").error
        assert contents(model) == before

    def test_overwrite_spares_the_directory_that_the_original_is_in(self, model: Path, compress: CommandLine) -> None:
        assert "original" in compress("quantize", model, "--out", model.parent, *ROUND, "--overwrite").error

    def test_a_failed_run_leaves_the_earlier_result(self, tiny: Path, out: Path, compress: CommandLine) -> None:
        compress("quantize", tiny, "--out", out, *ROUND)
        before = contents(out)
        compress("quantize", tiny, "--out", out, *ROUND, "--overwrite", "--group-size", 100)
        assert contents(out) == before

    def test_a_place_that_cannot_be_written_to_is_named(self, tiny: Path, tmp_path: Path, compress: CommandLine) -> None:
        (tmp_path / "file").touch()
        assert "cannot be written" in compress("quantize", tiny, "--out", tmp_path / "file" / "out", *ROUND).error

    def test_a_disk_too_small_is_noticed_before_any_work(
        self, tiny: Path, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, compress: CommandLine
    ) -> None:
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))
        assert_names(compress("quantize", tiny, "--out", out, *ROUND).error, ("1,000 are free", "make room"))
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        "room", [pytest.param(50_000, id="in a block"), pytest.param(120_000, id="outside the blocks"),
                 pytest.param(300_000, id="in a shard")],
    )  # fmt: skip
    def test_a_disk_that_fills_up_is_named_in_one_sentence(self, room: int, tiny: Path, tmp_path: Path, out: Path) -> None:
        fork = Fork(tmp_path / "log", "quantize", tiny, "--out", out, *ROUND, fate=(may_write, (room,)))
        assert_names(fork.result().late_error, ("cannot be written", "make room"))
        assert not out.exists()

    def test_the_default_place_is_beside_the_current_directory(
        self, model: Path, monkeypatch: pytest.MonkeyPatch, compress: CommandLine
    ) -> None:
        monkeypatch.chdir(model)
        answer = compress("quantize", "--bits", 3, *ROUND, "--json").json
        assert Path(answer["path"]) == model.with_name("model-int3g128")

    def test_a_result_inside_the_model_directory_is_not_copied_into_itself(self, model: Path, compress: CommandLine) -> None:
        compress("quantize", model, "--out", model / "first", *ROUND)
        assert not (model / "first" / "first").exists()


class TestHelp:
    @pytest.mark.parametrize("verb", VERBS)
    def test_every_verb_explains_itself(self, verb: str, compress: CommandLine) -> None:
        assert compress(verb, "--help").code == 0

    def test_the_optional_model_is_in_one_pair_of_brackets(self, compress: CommandLine) -> None:
        assert "[[" not in compress("quantize", "--help").out

    def test_help_imports_neither_torch_nor_transformers(self) -> None:
        code = (
            "import sys; sys.argv = ['compress', '--help']\n"
            "from compressor.cli import main\n"
            "try: main()\n"
            "except SystemExit: pass\n"
            "print({'torch', 'transformers', 'datasets', 'pydantic'} & set(sys.modules))"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert result.stdout.splitlines()[-1] == "set()"


class TestRecipes:
    OPTIONS = ("--bits", 3, "--group-size", 64, "--asymmetric", "--samples", 7, "--seed", 5, "--ignore", "*.o_proj",
               "--set", "passes.0.damp=0.03", "--set", "evaluation.samples=2")  # fmt: skip

    def test_a_printed_recipe_reads_back_as_the_same_recipe(self, tmp_path: Path, compress: CommandLine) -> None:
        printed = compress("quantize", *self.OPTIONS, "--print-recipe").out
        (tmp_path / "recipe.yaml").write_text(printed)
        assert compress("run", tmp_path / "recipe.yaml", "--print-recipe").out == printed

    def test_a_printed_recipe_holds_the_options(self, compress: CommandLine) -> None:
        recipe = yaml.safe_load(compress("quantize", *self.OPTIONS, "--print-recipe").out)
        assert recipe["passes"][0] == {
            "pass": "gptq",
            "options": [
                {"format": "int_group", "bits": 3, "group_size": 64, "symmetric": False, "packed": True, "activations": None}
            ],
            "layers": ["*"],
            "ignore": ["lm_head", "*.o_proj"],
            "search": True,
            "damp": 0.03,
            "act_order": True,
            "static_groups": True,
            "refine": 4,
            "asymmetric_calibration": 0.0,
        }

    def test_a_printed_recipe_gives_the_same_model(self, tiny: Path, tmp_path: Path, compress: CommandLine) -> None:
        (tmp_path / "recipe.yaml").write_text(compress("quantize", *ROUND, "--print-recipe").out)
        compress("quantize", tiny, *ROUND, "--out", tmp_path / "a")
        compress("run", tmp_path / "recipe.yaml", tiny, "--out", tmp_path / "b", "--no-verify")
        assert contents(tmp_path / "a", REPORTS) == contents(tmp_path / "b", REPORTS)


REPORTS = ("report.json", "report.html", "README.md")  # name the place and the time
QUALITY_KEYS = {"perplexity", "reference_perplexity", "kl", "top1_agreement"}
REPORT_KEYS = QUALITY_KEYS | {"command", "tasks", "samples", "speed", "verification"} | {
    "model", "path", "version", "fingerprint", "recipe", "calibration", "versions", "rows", "warnings", "layout",
    "bits_per_weight", "model_bits_per_weight", "size_bytes", "source_size_bytes",
    "seconds", "peak_memory_bytes", "peak_device_memory_bytes",
}  # fmt: skip
FORECAST_KEYS = {"out", "plan", "exact", "size_bytes", "source_size_bytes", "bits_per_weight", "expected_peak_memory_bytes"}


class TestJson:
    """One object on stdout, with keys that scripts rely on."""

    def test_quantize_answers_with_the_report(self, tiny: Path, out: Path, compress: CommandLine) -> None:
        small = ("--samples", 4, "--seq-len", 64, "--set", "evaluation.samples=2", "--no-verify", "--set", "passes.1.steps=5")
        answer = compress("quantize", tiny, "--out", out, *small, "--json").json
        assert answer.keys() >= REPORT_KEYS
        assert all(
            answer[key] > 0 for key in (*QUALITY_KEYS, "bits_per_weight", "size_bytes", "seconds", "peak_memory_bytes")
        )

    def test_a_report_without_evaluation_says_null(self, tiny: Path, out: Path, compress: CommandLine) -> None:
        answer = compress("quantize", tiny, "--out", out, *ROUND, "--json").json
        assert {answer[key] for key in QUALITY_KEYS} == {None}

    def test_run_answers_with_the_report(self, tiny: Path, tmp_path: Path, out: Path, compress: CommandLine) -> None:
        (tmp_path / "r.yaml").write_text("passes: [{pass: rtn, options: [{format: int_group}]}]\nevaluation: null\n")
        assert compress("run", tmp_path / "r.yaml", tiny, "--out", out, "--no-verify", "--json").json.keys() >= REPORT_KEYS

    def test_the_report_on_disk_is_the_one_printed(self, tiny: Path, out: Path, compress: CommandLine) -> None:
        answer = compress("quantize", tiny, "--out", out, *ROUND, "--json").json
        assert json.loads((out / "report.json").read_text()) == answer

    def test_a_dry_run_answers_with_the_forecast(self, tiny: Path, compress: CommandLine) -> None:
        assert compress("quantize", tiny, "--dry-run", "--json").json.keys() >= FORECAST_KEYS

    def test_eval_answers_with_the_quality(self, tiny: Path, compress: CommandLine) -> None:
        answer = compress("eval", tiny, "--samples", 2, "--seq-len", 32, "--reference", tiny, "--json").json
        assert answer.keys() >= QUALITY_KEYS | {"tokens", "seq_len", "source"}

    def test_inspect_answers_with_the_sizes(self, tiny: Path, compress: CommandLine) -> None:
        answer = compress("inspect", tiny, "--json").json
        assert answer.keys() >= {"model_type", "blocks", "layout", "kinds", "weights", "size_bytes", "bits_per_weight"}

    def test_generate_answers_with_the_text(self, tiny: Path, compress: CommandLine) -> None:
        assert compress("generate", tiny, "--max-new-tokens", 4, "--json").json.keys() == {"prompt", "text"}

    def test_demo_answers_with_a_report_for_each_model(
        self, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compress: CommandLine
    ) -> None:
        monkeypatch.setattr("compressor.assets.DEMO_MODEL", tiny)
        answer = compress("demo", "--method", "rtn", "--bits", 8, "--out", tmp_path / "demo", "--json").json
        assert answer["models"]["demo-rtn-int8"].keys() >= REPORT_KEYS


class TestDryRun:
    """The exact size, before a weight is read."""

    def test_it_reads_no_weight(self, model: Path, compress: CommandLine) -> None:
        before = compress("quantize", model, "--dry-run", "--json").json
        fill_with_nan(model)
        assert compress("quantize", model, "--dry-run", "--json").json == before

    def test_it_needs_no_tokenizer(self, model: Path, compress: CommandLine) -> None:
        remove_tokenizer(model)
        assert compress("quantize", model, "--dry-run").code == 0

    def test_it_writes_nothing(self, model: Path, tmp_path: Path, compress: CommandLine) -> None:
        before = contents(tmp_path)
        compress("quantize", model, "--dry-run")
        assert contents(tmp_path) == before

    @pytest.mark.parametrize("shard_bytes", [10**10, 200_000], ids=["one file", "shards"])
    @pytest.mark.parametrize(
        "options", [(), ("--bits", 3, "--asymmetric"), ("--group-size", -1), ("--ignore", "*.mlp.*")],
        ids=["4 bits", "3 bits with zero points", "whole rows", "half of the layers"],
    )  # fmt: skip
    def test_its_size_is_that_of_the_files(
        self,
        shard_bytes: int,
        options: tuple[object, ...],
        tiny: Path,
        out: Path,
        monkeypatch: pytest.MonkeyPatch,
        compress: CommandLine,
    ) -> None:
        layout = shards.layout
        monkeypatch.setattr(shards, "layout", lambda headers, *_: layout(headers, shard_bytes))
        forecast = compress("quantize", tiny, "--out", out, *ROUND, *options, "--dry-run", "--json").json
        compress("quantize", tiny, "--out", out, *ROUND, *options)
        files = [*out.glob("*.safetensors"), *out.glob(INDEX)]
        assert (len(files) > 1) == (shard_bytes < 10**6)
        assert forecast["size_bytes"] == sum(file.stat().st_size for file in files)

    def test_its_bits_per_weight_are_those_of_the_report(self, tiny: Path, out: Path, compress: CommandLine) -> None:
        forecast = compress("quantize", tiny, "--out", out, *ROUND, "--dry-run", "--json").json
        report = compress("quantize", tiny, "--out", out, *ROUND, "--json").json
        assert forecast["bits_per_weight"] == report["bits_per_weight"]


@pytest.fixture(scope="module")
def result(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized model, not to be changed."""
    out = tmp_path_factory.mktemp("results") / "out"
    api.quantize(tiny, out, method="rtn", evaluate=False, device="cpu", verify=False)
    return out


class TestTheResult:
    """A whole model directory."""

    @pytest.mark.parametrize("name", ["config.json", SINGLE, "recipe.yaml", "plan.yaml", "report.json", "README.md"])
    def test_it_holds(self, name: str, result: Path) -> None:
        assert (result / name).stat().st_size > 0

    @pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE",
                                      "notes/history.json"])  # fmt: skip
    def test_other_files_of_the_original_are_copied_verbatim(self, name: str, tiny: Path, result: Path) -> None:
        assert (result / name).read_bytes() == (tiny / name).read_bytes()

    def test_no_file_of_the_original_is_lost(self, tiny: Path, result: Path) -> None:
        assert contents(tiny).keys() <= contents(result).keys()

    def test_the_original_card_is_kept_under_another_name(self, tiny: Path, result: Path) -> None:
        assert (result / "README.source.md").read_bytes() == (tiny / "README.md").read_bytes()

    def test_nothing_unfinished_is_left(self, result: Path) -> None:
        assert [file.name for file in result.parent.iterdir()] == ["out"]

    def test_the_plan_names_an_option_for_every_unit(self, result: Path) -> None:
        plan = yaml.safe_load((result / "plan.yaml").read_text())
        assert plan["model.layers.3.mlp.gate_up_proj"] == {
            "format": "int_group",
            "bits": 4,
            "group_size": 128,
            "symmetric": True,
            "packed": True,
            "activations": None,
        }
        assert len(plan) == 16

    def test_the_recipe_made_it(self, tiny: Path, result: Path, tmp_path: Path, compress: CommandLine) -> None:
        compress("run", result / "recipe.yaml", tiny, "--out", tmp_path / "again", "--no-verify")
        assert contents(tmp_path / "again", REPORTS) == contents(result, REPORTS)

    def test_shards_are_listed_in_their_index(
        self, tiny: Path, out: Path, monkeypatch: pytest.MonkeyPatch, compress: CommandLine
    ) -> None:
        layout = shards.layout
        monkeypatch.setattr(shards, "layout", lambda headers, *_: layout(headers, 200_000))
        compress("quantize", tiny, "--out", out, *ROUND)
        listed = json.loads((out / INDEX).read_text())["weight_map"]
        held = {}
        for file in out.glob("*.safetensors"):
            with safe_open(file, framework="pt") as opened:
                held |= dict.fromkeys(opened.keys(), file.name)
        assert listed == held
