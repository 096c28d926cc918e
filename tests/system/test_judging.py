"""The verbs that judge models: eval and compare."""

import json
import shutil
from pathlib import Path

import pytest
from harness import CommandLine

from compressor import api
from compressor.errors import RecipeError
from compressor.evaluation.evaluate import evaluate

FEW = ("--samples", 2, "--seq-len", 32)


@pytest.fixture(scope="module")
def coarse(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model at 2 bits, which hurts."""
    out = tmp_path_factory.mktemp("coarse") / "int2"
    api.quantize(tiny, out, bits=2, method="rtn", evaluate=False, device="cpu", verify=False)
    return out


class TestLimits:
    @pytest.mark.parametrize(
        "limit", [("--max-kl", 1e-6), ("--max-kl-p99", 1e-6), ("--min-top1", "100%"), ("--max-ppl-increase", "-50%")]
    )
    def test_a_broken_limit_exits_with_1_and_is_named(
        self, limit: tuple[str, object], tiny: Path, coarse: Path, compress: CommandLine
    ) -> None:
        result = compress("eval", coarse, "--reference", tiny, *FEW, *limit)
        assert result.code == 1
        assert "perplexity" in result.out
        assert "limit broken: " in result.err
        assert limit[0] in result.err

    def test_a_kept_limit_exits_with_0(self, tiny: Path, compress: CommandLine) -> None:
        limits = ("--max-kl", 0, "--max-kl-p99", 0, "--min-top1", "100%", "--max-ppl-increase", "0%")
        assert compress("eval", tiny, "--reference", tiny, *FEW, *limits).code == 0

    def test_a_limit_without_a_reference_is_refused(self, tiny: Path, compress: CommandLine) -> None:
        assert "--reference" in compress("eval", tiny, "--max-kl", 0.1).error

    def test_a_limit_that_is_no_number_is_refused(self, tiny: Path, compress: CommandLine) -> None:
        assert "2%" in compress("eval", tiny, "--reference", tiny, "--max-ppl-increase", "lots").error


class TestEval:
    def test_each_text_is_reported_by_itself(self, tiny: Path, tmp_path: Path, compress: CommandLine) -> None:
        (tmp_path / "a.txt").write_text("def power(base): return base ** 2\n" * 40)
        answer = compress("eval", tiny, *FEW, "--data", "builtin", "--data", tmp_path / "a.txt", "--json").json
        assert [text["name"] for text in answer["texts"]] == ["builtin", str(tmp_path / "a.txt")]
        assert answer["tokens"] == sum(text["tokens"] for text in answer["texts"])

    def test_the_protocol_stands_with_the_figures(self, tiny: Path, compress: CommandLine) -> None:
        out = " ".join(compress("eval", tiny, *FEW, "--stride", 16, "--bos").out.split())
        assert "samples of 32, stride 16, begun with BOS, float32" in out
        assert "62 tokens" not in out  # 30 of the first sample, then 16
        assert "46 tokens" in out

    def test_streamed_and_resident_agree(self, tiny: Path, coarse: Path, compress: CommandLine) -> None:
        streamed, resident = (
            compress("eval", coarse, "--reference", tiny, *FEW, "--json", *path).json for path in ((), ("--resident",))
        )
        assert streamed["perplexity"] == pytest.approx(resident["perplexity"], rel=1e-5)

    def test_a_model_that_does_not_fit_is_not_made_resident(
        self, tiny: Path, monkeypatch: pytest.MonkeyPatch, compress: CommandLine
    ) -> None:
        monkeypatch.setattr("compressor.evaluation.evaluate.available_memory", lambda device: 1000)
        assert "--resident" in compress("eval", tiny, *FEW, "--resident").error

    def test_a_run_writes_no_samples_where_a_model_would_take_most_of_the_memory(
        self, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for module in ("evaluation.evaluate", "pipeline.memory_estimate"):
            monkeypatch.setattr(f"compressor.{module}.available_memory", lambda device: 3_000_000)  # the model takes 2.7 MB
        changes = ["evaluation.samples=2", "evaluation.seq_len=64"]
        report = api.quantize(
            tiny, tmp_path / "out", method="rtn", changes=changes, device="cpu", dtype="float32", verify=False
        )
        assert report.samples == []
        assert [w for w in report.warnings if "no samples were generated" in w and "more than half" in w]

    @pytest.mark.parametrize("options", [("--stride", 0), ("--stride", 33), ("--stride", 8, "--documents")])
    def test_a_stride_that_makes_no_sense_is_refused(
        self, options: tuple[object, ...], tiny: Path, compress: CommandLine
    ) -> None:
        assert "stride" in compress("eval", tiny, *FEW, *options).error

    def test_a_name_that_looks_like_markup_is_shown_as_it_is(self, tiny: Path, tmp_path: Path, compress: CommandLine) -> None:
        odd = tmp_path / "a[red]b[" / "x]"
        shutil.copytree(tiny, odd)
        result = compress("eval", odd, *FEW)
        assert result.code == 0
        assert "a[red]b[/x]" in result.out.replace("\n", "")

    @pytest.mark.parametrize(
        "limit", [("--max-kl", "nan"), ("--max-kl", -1), ("--min-top1", 95), ("--max-ppl-increase", "inf")]
    )
    def test_a_limit_that_cannot_be_is_refused(self, limit: tuple[str, object], tiny: Path, compress: CommandLine) -> None:
        assert limit[0] in compress("eval", tiny, "--reference", tiny, *FEW, *limit).error

    def test_a_number_of_questions_without_a_task_is_refused(self, tiny: Path, compress: CommandLine) -> None:
        assert "--tasks" in compress("eval", tiny, *FEW, "--limit", 3).error

    def test_a_task_that_is_not_known_is_refused_before_the_text_is_judged(self, tiny: Path, compress: CommandLine) -> None:
        assert "`no_such`" in compress("eval", tiny, *FEW, "--tasks", "no_such").error

    def test_figures_without_kl_do_not_replace_those_with_it(self, tiny: Path, tmp_path: Path, compress: CommandLine) -> None:
        out = tmp_path / "judged"
        small = ("--method", "rtn", "--set", "evaluation.samples=2", "--set", "evaluation.seq_len=32", "--no-verify")
        assert compress("quantize", tiny, "--out", out, *small).code == 0
        assert "--reference" in compress("eval", out, *FEW, "--save").error
        assert compress("eval", out, "--reference", tiny, *FEW, "--save").code == 0

    def test_what_a_model_was_calibrated_on_is_judged_by_its_held_out_part(
        self, tiny: Path, tmp_path: Path, compress: CommandLine
    ) -> None:
        file, out = tmp_path / "own.jsonl", tmp_path / "out"
        file.write_text("".join(json.dumps({"text": f"def f{n}(): return {n}\n" * 9}) + "\n" for n in range(400)))
        options = ("--samples", 4, "--seq-len", 32, "--calibration", file, "--no-eval", "--no-verify")
        assert compress("quantize", tiny, "--out", out, *options).code == 0
        ours, other = (compress("eval", m, *FEW, "--data", file, "--json").json["texts"][0]["split"] for m in (out, tiny))
        assert (ours, other) == ("held-out", "all")

    def test_several_processes_are_refused(self, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("compressor.pipeline.ranks._world", lambda: 2)
        with pytest.raises(RecipeError, match="without torchrun"):
            evaluate(tiny)


class TestCompare:
    def test_models_are_judged_as_by_eval(self, tiny: Path, coarse: Path, compress: CommandLine) -> None:
        both = compress("compare", tiny, coarse, "--reference", tiny, *FEW, "--json").json["models"]
        alone = compress("eval", coarse, "--reference", tiny, *FEW, "--json").json
        assert both[1]["quality"]["kl"] == alone["kl"]
        assert both[0]["quality"]["kl"] == 0
        assert both[1]["size_bytes"] < both[0]["size_bytes"]
        assert [one["best"] for one in both] == [True, True]

    def test_a_model_that_another_beats_is_not_marked(
        self, tiny: Path, coarse: Path, tmp_path: Path, compress: CommandLine
    ) -> None:
        finer = tmp_path / "finer"  # as large as the original, and no better
        api.quantize(
            tiny, finer, bits=8, group_size=32, method="rtn", ignore=("*.q_proj", "*.mlp.*"), evaluate=False, verify=False
        )
        both = compress("compare", tiny, finer, coarse, *FEW, "--reference", coarse, "--json").json["models"]
        assert both[2]["best"]
        assert [one["best"] for one in both[:2]] == [False, False]  # larger than the reference, and not equal to it

    def test_a_table_names_every_model(self, tiny: Path, coarse: Path, compress: CommandLine) -> None:
        out = compress("compare", tiny, coarse, *FEW).out
        assert "* tiny" in out
        assert "* int2" in out or "  int2" in out

    def test_a_page_is_written(self, tiny: Path, coarse: Path, tmp_path: Path, compress: CommandLine) -> None:
        compress("compare", tiny, coarse, "--reference", tiny, *FEW, "--report", tmp_path / "page.html")
        assert "int2" in (tmp_path / "page.html").read_text()
