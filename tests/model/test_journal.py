"""A journal is what a run wrote, or it is refused; a line that a kill has cut short does not count."""

import json
from pathlib import Path

import pytest
import torch

from compressor.errors import OutputError
from compressor.model.journal import JOURNAL, Journal, read_journal, sealed

FINGERPRINT = {"recipe": "a", "model": "b"}


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """A journal with two parts."""
    made = Journal(tmp_path, FINGERPRINT)
    made.start()
    made.add("block-0", {"a": torch.zeros(2)}, rows=[{"layer": "a", "error": 0.1}], text="U+2028: \u2028")
    made.add("block-1", {"a": torch.ones(2)}, rows=[])
    return tmp_path / JOURNAL


def resumed(place: Path) -> list[str]:
    again = Journal(place, FINGERPRINT)
    again.resume(place, "start again")
    return list(again.finished)


def test_lines_are_read_as_they_were_written(journal: Path) -> None:
    first, *parts = read_journal(journal)
    assert first == FINGERPRINT
    assert parts[0] == {"part": "block-0", "rows": [{"layer": "a", "error": 0.1}], "text": "U+2028: \u2028"}
    assert resumed(journal.parent) == ["block-0", "block-1"]


def test_a_last_line_cut_anywhere_does_not_count(journal: Path) -> None:
    whole = journal.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for end in range(last, len(whole)):
        journal.write_bytes(whole[:end])
        assert resumed(journal.parent) == ["block-0"], end


def test_a_changed_number_is_noticed(journal: Path) -> None:
    journal.write_text(journal.read_text().replace("0.1", "0.2"))
    with pytest.raises(OutputError, match=r"journal\.jsonl:2: is not as a run of this version wrote it"):
        resumed(journal.parent)


@pytest.mark.parametrize(
    "line", ["5", "null", "[]", "{}", '{"part": 1}', '{"part": "../outside"}', "[" * 10**5, "x", "\ud800"]
)
def test_a_line_that_no_run_wrote_is_named(line: str, journal: Path) -> None:
    journal.write_bytes(journal.read_bytes() + line.encode("utf-8", "surrogatepass") + b"\n")
    with pytest.raises(OutputError, match=r"journal\.jsonl:4: ") as caught:
        resumed(journal.parent)
    assert len(str(caught.value)) <= 300


def test_a_second_fingerprint_is_no_part(journal: Path) -> None:
    with journal.open("a") as file:
        file.write(sealed(FINGERPRINT))
    with pytest.raises(OutputError, match="names no part"):
        resumed(journal.parent)


def test_every_line_is_plain_json(journal: Path) -> None:
    assert all("seal" in json.loads(line) for line in journal.read_text().splitlines())
