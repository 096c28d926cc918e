"""Files of rows: what separates the rows, what a row holds, and how one that cannot be read is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from compressor.errors import CalibrationError
from compressor.pipeline.calibration import data
from compressor.pipeline.calibration.chat import Conversation

SEPARATORS = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"


def texts(path: Path) -> list[Any]:
    return list(data.documents(str(path), 0, "all"))


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[[str], Path]:
    """A file with this content."""

    def write(content: str) -> Path:
        path = tmp_path / "data.jsonl"
        path.write_bytes(content.encode())
        return path

    return write


@pytest.mark.parametrize("separator", ["\x85", "\u2028", "\u2029"])
def test_line_separators_of_unicode_stand_in_texts(jsonl: Callable[[str], Path], separator: str) -> None:
    rows = [f"one {n}{separator}two" for n in range(3)]
    content = "".join(json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows)
    assert separator in content
    assert texts(jsonl(content)) == rows


@pytest.mark.parametrize("separator", SEPARATORS)
def test_a_line_separator_between_rows_is_not_one(jsonl: Callable[[str], Path], separator: str) -> None:
    path = jsonl(f'{{"text": "a"}}{separator}{{"text": "b"}}\n')
    with pytest.raises(CalibrationError, match=r"data.jsonl:1: not valid JSON"):
        texts(path)


def test_control_characters_that_separate_lines_stand_in_texts_as_escapes(jsonl: Callable[[str], Path]) -> None:
    assert texts(jsonl(json.dumps({"text": SEPARATORS}, ensure_ascii=False))) == [SEPARATORS]


def test_separators_stand_in_turns_of_a_conversation_too(jsonl: Callable[[str], Path]) -> None:
    turns = [{"role": "user", "content": "one\u2028two\u2029three\x85four"}]
    (read,) = texts(jsonl(json.dumps({"messages": turns}, ensure_ascii=False)))
    assert read.turns == turns


@pytest.mark.parametrize("form", ["\ufeff{}\n{}\n", "{}\r\n{}\r\n", "\n{}\n\n{}\n\n \t\n", "{}\n{}", "\ufeff\r\n{}\r\n{}"])
def test_byte_order_marks_line_ends_of_windows_and_blank_lines_are_no_data(jsonl: Callable[[str], Path], form: str) -> None:
    assert texts(jsonl(form.format('{"text": "a\\r\\nb"}', '{"text": "c"}'))) == ["a\r\nb", "c"]


def test_a_plain_text_loses_its_byte_order_mark_and_the_line_ends_of_windows(tmp_path: Path) -> None:
    path = tmp_path / "text.TXT"
    path.write_bytes("\ufeffone\r\ntwo\u2028three\r\n\r\nfour".encode())
    assert texts(path) == ["one\ntwo\u2028three\n\nfour"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not valid JSON"),
        ('{"text": "a"} {"text": "b"}', "not valid JSON"),
        ('{"text": "' + "a" * 1000 + '"', "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"text": ' + "[" * 99 + "]" * 99 + "}", "nested more than 64 deep"),
        ('{"text": ' + "1" * 5000 + "}", "thousands of digits"),
        ('{"text": "\\ud800"}', "half a surrogate pair"),
        ("null", "is null where an object with text is needed"),
        ("5", "is a number where"),
        ('[{"role": "user", "content": "a"}]', "is a list where"),
        ('{"text": 5}', "`text` is a number where text"),
        ('{"text": true}', "`text` is a boolean"),
        ('{"text": ["a"]}', "`text` is a list of text"),
        ('{"text": {"a": 1}}', "`text` is an object"),
        ('{"text": null}', "`text` is null where text is needed"),
        ('{"title": "a"}', "has title; rename the column"),
        ("{}", "has none; rename the column"),
        ('{"' + "a" * 100_000 + '": 1}', "rename the column"),
    ],
)
def test_a_row_that_cannot_be_read_is_named_by_line_and_reason(jsonl: Callable[[str], Path], line: str, reason: str) -> None:
    path = jsonl(f'{{"text": "a"}}\n\n{line}\n{{"text": "b"}}\n')
    with pytest.raises(CalibrationError) as caught:
        texts(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert reason in str(caught.value)
    assert len(str(caught.value)) <= 300
    assert "\n" not in str(caught.value)


def test_rows_whose_text_is_empty_are_left_out(jsonl: Callable[[str], Path]) -> None:
    assert texts(jsonl('{"text": ""}\n{"text": "a"}\n""\n{"text": ""}\n')) == ["a"]


def test_texts_and_conversations_may_stand_in_one_file(jsonl: Callable[[str], Path]) -> None:
    turns = [{"role": "user", "content": "b"}]
    rows = [
        {"text": "a", "messages": turns},
        {"text": None, "messages": turns},
        {"text": "", "messages": turns},
        {"text": "c", "messages": None},
        "d",
    ]
    path = jsonl("".join(json.dumps(row) + "\n" for row in rows))
    read = [one.turns if isinstance(one, Conversation) else one for one in texts(path)]
    assert read == ["a", turns, turns, "c", "d"]


def test_a_row_of_a_parquet_file_is_named_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "", None]}), path)
    with pytest.raises(CalibrationError, match=r"data.parquet: row 2: `text` is null where text is needed"):
        texts(path)


def test_a_row_of_a_hub_data_set_is_named_by_its_number_and_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    class Rows(list[Any]):
        def shuffle(self, **options: Any) -> "Rows":
            return self

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: Rows([{"text": "a"}, {"text": 5}]))
    with pytest.raises(CalibrationError, match=r"hf:owner/name: row 1: `text` is a number"):
        list(data.documents("hf:owner/name", 7, "all"))
    with pytest.raises(CalibrationError, match=r"hf:owner/name: row 1 \(in the order of seed 7\): `text` is a number"):
        list(data.documents("hf:owner/name", 7, "calibration"))


@pytest.mark.parametrize("suffix", [".jsonl", ".txt"])
@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_a_file_in_another_encoding_is_refused(tmp_path: Path, suffix: str, encoding: str) -> None:
    path = tmp_path / f"data{suffix}"
    path.write_bytes('{"text": "ü"}'.encode(encoding))
    with pytest.raises(CalibrationError, match=r"not UTF-8 text \(byte \d+ is 0x..\); store it as UTF-8"):
        texts(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".parquet"])
def test_a_file_that_must_not_be_read_is_named_with_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    path = tmp_path / f"data{suffix}"
    path.write_text("")

    def refuse(*args: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(pyarrow.parquet, "read_table", refuse)
    with pytest.raises(CalibrationError, match=r"^[^:]*: cannot be read.*\(permission denied\)"):
        texts(path)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "is a directory"),
        ("a" * 300 + ".jsonl", "file name too long"),
        ("a\0.txt", "no such file|null"),
        ("none.jsonl", "no such file"),
    ],
)
def test_a_path_that_is_no_file_is_answered_in_a_sentence(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(CalibrationError, match=f"(?i){reason}") as caught:
        texts(tmp_path / name)
    assert len(str(caught.value)) <= 300
