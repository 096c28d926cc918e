"""Reports that are read and added to."""

import json
from pathlib import Path
from typing import Any

import pytest

from compressor.errors import OutputError
from compressor.report.files import amend, completed, read_report, written
from compressor.report.record import Report


def quality(perplexity: float, kl: float | None) -> dict[str, Any]:
    figures = {"perplexity": perplexity, "kl": kl, "reference_perplexity": 10.0 if kl is not None else None}
    return {
        **figures,
        "top1_agreement": 0.75 if kl is not None else None,
        "tokens": 1000,
        "source": "notes.txt",
        "seq_len": 32,
        "protocol": {"seq_len": 32, "stride": 32, "bos": False, "documents": False, "dtype": "float32"},
        "texts": [{"name": "notes.txt", "sha256": "a" * 64, **figures}],
        "positions": [{"first": 1, "last": 1, "tokens": 4, "nll": 2.0}],
    }


@pytest.fixture
def report() -> dict[str, Any]:
    return Report(
        model="m", path="/m", out="o", version="0", fingerprint={}, recipe={}, calibration=None, versions={},
        size_bytes=300, source_size_bytes=1000,
    ).to_dict()  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, report: dict[str, Any]) -> Path:
    """A directory with a report."""
    for name, text in written(completed(report)).items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_what_is_added_stands_in_every_file_and_the_rest_stays(place: Path) -> None:
    before = read_report(place)
    amend(place, warnings=["a new warning"])
    assert read_report(place) == {**before, "warnings": ["a new warning"]}
    assert "a new warning" in (place / "report.html").read_text()
    assert "- a new warning\n" in (place / "README.md").read_text()
    assert sorted(file.name for file in place.iterdir()) == ["README.md", "report.html", "report.json"]


def test_new_quality_stands_wherever_quality_stands(place: Path) -> None:
    for perplexity, kl in ((12.0, 0.25), (15.5, 0.5)):
        amend(place, quality=quality(perplexity, kl))
        found, card = read_report(place), (place / "README.md").read_text()
        top = {"perplexity": perplexity, "kl": kl, "reference_perplexity": 10.0, "top1_agreement": 0.75}
        assert {key: found[key] for key in top} == top == {key: found["quality"][key] for key in top}
        assert [p["kl"] for p in found["plots"]["quality_size"]["points"] if not p["original"]] == [kl]
        assert f"| perplexity, this model | {perplexity:.4g} |" in card
        assert f"nats per token | {kl} |" in card
        assert "Measured on 1,000 predictions of text (`notes.txt`)" in card


def test_the_card_leaves_out_what_needs_the_original(place: Path) -> None:
    assert "was not measured" in (written_card := card(place))
    assert "perplexity" not in written_card
    amend(place, quality=quality(12.0, None))
    assert "| perplexity, this model | 12 |" in card(place)
    assert "original" not in card(place)


def card(place: Path) -> str:
    amend(place)
    return (place / "README.md").read_text()


def test_kl_is_not_lost_to_figures_without(place: Path) -> None:
    amend(place, quality=quality(12.0, None))
    amend(place, quality=quality(12.0, 0.25))
    before = (place / "report.json").read_text()
    with pytest.raises(OutputError, match="give --reference, or leave out --save"):
        amend(place, quality=quality(12.0, None))
    assert (place / "report.json").read_text() == before


def test_tasks_are_added_and_those_asked_again_replaced(place: Path) -> None:
    def row(task: str, metric: str, value: float) -> dict[str, Any]:
        return {"task": task, "metric": metric, "value": value}

    amend(place, tasks=[row("a", "acc", 0.1), row("a", "f1", 0.2)])
    amend(place, tasks=[row("b", "acc", 0.3), row("a", "acc", 0.4)])
    assert read_report(place)["tasks"] == [row("a", "acc", 0.4), row("a", "f1", 0.2), row("b", "acc", 0.3)]


def test_a_card_is_made_of_the_least_that_a_report_holds(place: Path, report: dict[str, Any]) -> None:
    from compressor.report.html.schema import NEEDED

    (place / "report.json").write_text(json.dumps({key: report[key] for key in NEEDED}))
    assert "# o\n" in card(place)
