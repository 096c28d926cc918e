"""The page of `compress compare`, and what a run's closing table says of loaders."""

import json
import shutil
from pathlib import Path

import pytest
from harness import CommandLine

from compressor import api
from compressor.evaluation.compare import compare, page
from compressor.report.files import read_report

FEW = {"samples": 2, "seq_len": 32}
ASKED = ("--samples", 2, "--seq-len", 32)


@pytest.fixture(scope="module")
def coarse(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model at 2 bits."""
    out = tmp_path_factory.mktemp("coarse") / "int2"
    api.quantize(tiny, out, bits=2, method="rtn", evaluate=False, device="cpu", verify=False)
    return out


def originals(html: str) -> int:
    """Diamonds in the plot of perplexity."""
    data = json.loads(html.partition('id="figures">')[2].partition("</script>")[0])["quality-perplexity"]["data"]
    return sum(one.get("marker", {}).get("symbol", "").startswith("diamond") for one in data)


def test_the_original_is_shown_once(tiny: Path, coarse: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(coarse, tmp_path / "bare"))
    (bare / "report.json").unlink()
    shown = page(compare([coarse, bare], tiny, **FEW), tiny)
    assert originals(shown) == 1
    assert "2 compressed models of tiny" in shown


def test_sizes_are_those_of_the_files(tiny: Path, coarse: Path) -> None:
    found = compare([tiny, coarse], tiny, **FEW)
    files = [(path / "model.safetensors").stat().st_size for path in (tiny, coarse)]
    assert [one.size_bytes for one in found] == files
    assert found[1].report == read_report(coarse)
    assert "report" not in found[1].to_dict()


@pytest.mark.parametrize("content", ["{", "[1]", '{"model": "foreign", "rows": []}'])
def test_a_foreign_report_is_not_used_which_the_page_says(content: str, tiny: Path, coarse: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(coarse, tmp_path / "other"))
    (other / "report.json").write_text(content)
    (found,) = compare([other], tiny, **FEW)
    (warning,) = found.report["warnings"]
    assert warning.startswith(f"shown without the report of its run: {other / 'report.json'}: ")
    assert "shown without the report of its run" in page([found], tiny)


@pytest.mark.parametrize("name", ["nowhere/page.html", ""])
def test_a_page_that_cannot_be_written_is_refused_before_the_work(
    name: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compress: CommandLine
) -> None:
    monkeypatch.setattr("compressor.evaluation.compare.evaluate_all", None)
    assert f"--report {tmp_path / name}: " in compress("compare", tiny, *ASKED, "--report", tmp_path / name).error


def test_the_closing_table_and_inspect_name_the_same_loaders(tiny: Path, tmp_path: Path, compress: CommandLine) -> None:
    for bits, group in ((4, 32), (3, 16)):
        out = tmp_path / f"{bits}"
        options = ("--method", "rtn", "--bits", bits, "--group-size", group, "--no-eval", "--no-verify")
        cells = compress("quantize", tiny, "--out", out, *options).out
        runtimes = compress("inspect", out, "--json").json["runtimes"]
        expected = ", ".join(
            one["name"] + ("" if one["tried"] else " (as read, not run)") for one in runtimes if one["loads"]
        )
        assert expected in " ".join(cells.replace("│", " ").split())
        assert ("vLLM" in cells) == (group == 32)
