"""Text, JSON and YAML of others: plain data within limits, or one short sentence with file, cause and remedy."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compressor import reading
from compressor.errors import MAX_MESSAGE, CompressorError, SourceError

WHERE = "config.json"


def of_json(text: str) -> Any:
    return reading.parse_json(text, WHERE, SourceError, "download it again")


def of_yaml(text: str) -> Any:
    return reading.parse_yaml(text, WHERE, SourceError, "correct it")


def refusal(read: Callable[[], object]) -> str:
    """The sentence with which something is refused, in time."""
    started = time.perf_counter()
    with pytest.raises(SourceError) as refused:
        read()
    assert time.perf_counter() - started < 5
    assert len(str(refused.value)) <= MAX_MESSAGE and str(refused.value).isprintable()
    return str(refused.value)


@pytest.mark.parametrize(
    "text", ['{"a": [1, 2.5, null, true, "é"]}', "NaN", '"2020-01-01"', "[" * 64 + "]" * 64, str(2**64 - 1)]
)
def test_json_within_the_limits_is_what_the_standard_library_makes_of_it(text: str) -> None:
    assert repr(of_json(text)) == repr(json.loads(text))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting property name"),
        ("[" * 65 + "]" * 65, "nested more than 64 deep"),
        ("[" * 10**6, "nested too deeply"),
        ('{"a":' * 10**5, "nested too deeply"),
        ("9" * 5000, "a number of thousands of digits"),
        (str(2**64), "beyond 64 bits"),
        (str(-(2**64)), "beyond 64 bits"),
        ('"\\ud800"', "half a surrogate pair"),
        ('{"\\ud800": 1}', "half a surrogate pair"),
        ("", "Expecting value"),
    ],
)
def test_json_beyond_the_limits_is_refused_with_the_reason(text: str, reason: str) -> None:
    sentence = refusal(lambda: of_json(text))
    assert sentence.startswith("config.json: not valid JSON (") and sentence.endswith("; download it again")
    assert reason in sentence


def test_json_that_is_too_long_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_JSON_BYTES", 10)
    assert of_json("[1,2,3,45]") == [1, 2, 3, 45]
    assert "longer than 10 bytes" in refusal(lambda: of_json("[1,2,3,456]"))


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("a: 2020-01-01", {"a": "2020-01-01"}),
        ("2020-01-01: 1", {"2020-01-01": 1}),
        ("a: &x [1]\nb: *x", {"a": [1], "b": [1]}),
        ("a: 1:30", {"a": 90}),
        ("a: 1.5", {"a": 1.5}),
        ("", None),
    ],
)
def test_yaml_is_plain_data(text: str, data: object) -> None:
    assert of_yaml(text) == data


SIXTIES = "1:" * 10**5
MERGED = "a0: &b0 {k: v}\n" + "\n".join(f"a{n}: &b{n + 1} {{<<: [{', '.join([f'*b{n}'] * 10)}]}}" for n in range(12))
ALIASED = "\n".join(["x0: &y0 [1]", *(f"x{n + 1}: &y{n + 1} [{', '.join([f'*y{n}'] * 10)}]" for n in range(12))])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: [", "line 1"),
        ("[" * 10**5, "nested too deeply"),
        ("- " * 10**4 + "x", "nested too deeply"),
        ("a: &x [*x]", "nested more than 64 deep"),
        (ALIASED, "more than 1,000,000 values"),
        (MERGED, "more than 1,000,000 values"),
        ("1: 2", "the key 1 is no text"),
        ("? [1]\n: 2", "unhashable key"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("!!set {a, b}", "type set"),
        ("!!timestamp 2020-01-01", "type date"),
        ("!!timestamp x", "NoneType"),
        ("!!int ''", "index"),
        ("!!bool x", "x"),
        ("9" * 5000, "a number of 5,000 characters"),
        ("0x" + "f" * 300, "beyond 64 bits"),
        (SIXTIES + "1", "a number of 200,001 characters"),
        (SIXTIES + "1.0", "a number of 200,003 characters"),
        ("a\0b", "special characters"),
    ],
)
def test_yaml_beyond_the_limits_is_refused_with_the_reason(text: str, reason: str) -> None:
    sentence = refusal(lambda: of_yaml(text))
    assert sentence.startswith("config.json: not valid YAML (") and sentence.endswith("; correct it")
    assert reason in sentence


def test_yaml_that_is_too_long_is_not_parsed() -> None:
    assert "longer than" in refusal(lambda: of_yaml("- a\n" * 10**6))


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbf{}")
    assert reading.read_json(tmp_path / "a", SourceError) == {}


def test_other_encodings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes("{}".encode("utf-16"))
    assert "not UTF-8 text (byte 0 is 0xff)" in refusal(lambda: reading.read_text(tmp_path / "a", SourceError))


@pytest.mark.parametrize("name", ["missing", "n" * 300, "a\0b", "\ud800", "."])
def test_a_file_that_cannot_be_read_is_named(name: str, tmp_path: Path) -> None:
    assert "cannot be read" in refusal(lambda: reading.read_bytes(tmp_path / name, SourceError))


@pytest.mark.parametrize("text", ["[]", "3", "null"])
def test_what_is_no_object_is_refused_where_one_is_needed(text: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_text(text)
    assert "where an object is needed" in refusal(lambda: reading.read_json_object(tmp_path / "a", SourceError))


@pytest.mark.parametrize("limit", [2, 3, 40, 41])
def test_elided_values_keep_their_ends_and_the_limit(limit: int) -> None:
    found = reading.elide("a" + "x" * 1000 + "z", limit)
    assert len(found) == limit and found[0] == "a" and "…" in found
    assert reading.elide("short", 5) == "short"
    assert reading.elide([1, 2]) == "[1, 2]"


def test_messages_are_short_and_keep_place_and_remedy() -> None:
    text = str(CompressorError("DIR: " + "x" * 10**6 + "; do this"))
    assert len(text) == MAX_MESSAGE and text.startswith("DIR: x") and text.endswith("; do this")


def test_messages_hold_nothing_that_steers_a_terminal() -> None:
    assert str(CompressorError("a\nb\x1b[2Jc\u202ed\0")) == "a b [2Jc d "
