"""Reports that are read and added to."""

from pathlib import Path
from typing import Any

import pytest

from compressor.report import Report
from compressor.results import amend, read_report, written


@pytest.fixture
def report() -> dict[str, Any]:
    return Report(
        model="m", path="/m", out="o", version="0", fingerprint={}, recipe={}, calibration=None, versions={}
    ).to_dict()  # fmt: skip


def test_what_is_added_stands_in_both_files_and_the_rest_stays(tmp_path: Path, report: dict[str, Any]) -> None:
    for name, text in written(report).items():
        (tmp_path / name).write_text(text)
    before = read_report(tmp_path)
    amend(tmp_path, warnings=["a new warning"])
    assert read_report(tmp_path) == {**before, "warnings": ["a new warning"]}
    assert "a new warning" in (tmp_path / "report.html").read_text()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report.html", "report.json"]
