"""`compress report`."""

import json
from pathlib import Path
from typing import Any

import pytest
from reports import full, report

from compressor.cli.report import report as command
from compressor.errors import CompressorError, OutputError
from compressor.report.html.plots import plot_data
from compressor.report.html.schema import NEEDED


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two results."""
    places = [tmp_path / "demo-int4", tmp_path / "demo-int3"]
    for place in places:
        place.mkdir()
        (place / "report.json").write_text(json.dumps(report(place.name)), encoding="utf-8")
    return places


def test_one_page_lies_with_its_model(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    command(runs[:1])
    assert capsys.readouterr().out == f"{runs[0] / 'report.html'}\n"
    assert "demo-int4" in (runs[0] / "report.html").read_text(encoding="utf-8")
    assert sorted(file.name for file in runs[0].iterdir()) == ["report.html", "report.json"]


def test_several_make_a_page_here(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command(runs)
    assert capsys.readouterr().out == "report.html\n"
    assert "2 compressed models of demo" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_json_is_what_the_plots_show(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    command(runs, out=page, as_json=True)
    shown = plot_data([report(run.name) for run in runs])
    assert json.loads(capsys.readouterr().out) == {"path": str(page), **shown}
    assert page.is_file()


def test_an_older_page_is_replaced(runs: list[Path]) -> None:
    (runs[0] / "report.html").write_text("old")
    command(runs[:1])
    assert "old" not in (runs[0] / "report.html").read_text(encoding="utf-8")[:20]


def test_a_report_without_the_optional_parts_is_shown(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps({key: report()[key] for key in NEEDED}))
    command([tmp_path])
    assert "demo-int4" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("part", "path"),
    [
        *(("rows[0]", ("rows", 0, key)) for key in ("layer", "option", "bits_per_weight", "error")),
        *(("quality", ("quality", key)) for key in ("perplexity", "tokens", "texts", "positions", "protocol")),
        *(("quality.protocol", ("quality", "protocol", key)) for key in ("seq_len", "stride", "bos", "documents", "dtype")),
        *(("quality.texts[0]", ("quality", "texts", 0, key)) for key in ("name", "sha256")),
        *(("quality.positions[0]", ("quality", "positions", 0, key)) for key in ("first", "last", "tokens")),
        ("tasks[0]", ("tasks", 0, "metric")),
        ("samples[0]", ("samples", 0, "reference")),
        ("verification[0]", ("verification", 0, "outcome")),
        ("speed.rows[0]", ("speed", "rows", 0, "batch")),
        ("calibration", ("calibration", "sha256")),
    ],
)
def test_a_part_that_lacks_a_key_is_named(part: str, path: tuple[str | int, ...], tmp_path: Path) -> None:
    whole = full()
    inner: Any = whole
    for step in path[:-1]:
        inner = inner[step]
    del inner[path[-1]]
    (tmp_path / "report.json").write_text(json.dumps(whole))
    with pytest.raises(OutputError) as caught:
        command([tmp_path])
    assert f"not a report of a run, {part} lacks {path[-1]}" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows": None}, "rows is no list"),
        ({"rows": ["x"]}, "rows[0] is no object"),
        ({"rows": [{"layer": "a", "option": "b", "bits_per_weight": 4, "error": "c"}]}, "rows[0].error is no number"),
        ({"size_bytes": "large"}, "size_bytes is no number"),
        ({"quality": [1]}, "quality is no object"),
        ({"tasks": {}}, "tasks is no list"),
    ],
)
def test_a_part_of_another_type_is_named(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(report(**changes)))
    with pytest.raises(OutputError) as caught:
        command([tmp_path])
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no report.json here; it is written by `compress quantize` and `compress run`"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not UTF-8 text"),
        (b"[1]", "holds a JSON list where an object is needed"),
        (b'{"model": "demo"}', "7 of 8 needed keys are missing (path, out, rows"),
    ],
)
def test_what_is_no_report_is_refused(content: bytes | None, words: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(OutputError) as caught:
        command([tmp_path])
    assert words in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_nothing_is_written_if_one_of_several_is_bad(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(CompressorError):
        command([*runs, tmp_path], out=tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_place_that_cannot_be_written_to_is_refused(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        command(runs, out=tmp_path / "nowhere" / "page.html")
