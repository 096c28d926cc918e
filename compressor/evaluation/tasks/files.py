"""Task files, one JSON object a line (`.jsonl`, `.jsonl.gz`); the form is told by the keys of the first.

    {question | goal | query | context | sentence, choices, label | answer}   multiple choice
    {good, bad} or {sentence_good, sentence_bad}                              minimal pairs
    {context, target} or {text}                                               cloze; of a text its last word
    {question, answer: "… #### 12"}                                           a number to be worked out and written

A `question` or `goal` is asked as `Question: …` and `Answer:`; the other keys hold text that a choice continues. If each
such text has one `_` that stands alone, choices fill it. A label is a choice's index from 0, its letter or its text.
Of numbers to be worked out, the first rows, one in ten but at most SHOTS, are the worked examples before each question,
and are not asked.
"""

import gzip
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from compressor.access import check_readable, kind_of
from compressor.errors import RecipeError
from compressor.evaluation.tasks.questions import LONGEST_ANSWER, Kind, Questions, prompt
from compressor.reading import MAX_BYTES, cause, elide, parse_json_lines, read_text

SHOTS = 5
SUFFIXES = (".jsonl", ".jsonl.gz")
ASKED = ("question", "goal")
CONTINUED = ("query", "context", "sentence")
PAIRS = (("good", "bad"), ("sentence_good", "sentence_bad"))
BLANK = re.compile(r"(?<!\w)_(?!\w)")
WORKED = re.compile(r"####\s*(\S+)\s*$")

Row = dict[str, Any]


def is_file(name: str) -> bool:
    """Whether a task's name is that of a local file."""
    return "/" in name or name.endswith(SUFFIXES)


def read(path: Path, longest_answer: int = LONGEST_ANSWER) -> Questions:
    """The questions of a file.

    Args:
        path: The file.
        longest_answer: Tokens of a generated answer, at most.

    Raises:
        RecipeError: no such file, not JSON, a form that is not known, or a row that does not fit its form.
    """
    rows = list(_rows(path))
    if not rows:
        raise RecipeError(f"{path}: holds no questions; name another file")
    kind, convert = _form(path, *rows[0])
    made = []
    for line, row in rows:
        try:
            made.append(convert(row))
        except (KeyError, TypeError, AttributeError) as error:
            raise RecipeError(
                f"{path}:{line}: {elide(', '.join(row))} do not make a question like the first line's ({cause(error)}); "
                "correct this line"
            ) from error
        except ValueError as error:
            raise RecipeError(f"{path}:{line}: {cause(error)}; correct this line") from error
    name = path.name.removesuffix(".gz").removesuffix(".jsonl")
    if kind == "choice" and all(len(BLANK.findall(row["context"])) == 1 for row in made):
        return Questions(name, "blank", [_filled(row) for row in made])
    if kind == "choice":
        made = [_asked(row) for row in made]
    if kind == "generation":
        made = _with_examples(made)
    return Questions(name, kind, made, longest_answer)


def _rows(path: Path) -> Iterator[tuple[int, Row]]:
    check_readable([path], RecipeError)
    if not path.name.endswith(SUFFIXES) or kind_of(path, RecipeError) != "file":
        raise RecipeError(
            f"{elide(str(path), 150)}: no such task file; name a .jsonl or .jsonl.gz file, or a task of lm-evaluation-harness"
        )
    for line, row in parse_json_lines(_text_of(path), str(path), RecipeError, "correct this line"):
        if not isinstance(row, dict):
            raise RecipeError(
                f"{path}:{line}: a {type(row).__name__} where an object with a question is needed; correct this line"
            )
        yield line, row


def _text_of(path: Path) -> str:
    if path.suffix != ".gz":
        return read_text(path, RecipeError, "check the file")
    try:
        with gzip.open(path) as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES:,} bytes")
        return content.decode("utf-8-sig")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise RecipeError(f"{path}: cannot be read ({cause(error)}); check the file") from error


def _form(path: Path, line: int, first: Row) -> tuple[Kind, Callable[[Row], Row]]:
    if "choices" in first and any(key in first for key in (*ASKED, *CONTINUED)):
        return "choice", _choice
    if any(set(pair) <= first.keys() for pair in PAIRS):
        return "pair", _pair
    if {"question", "answer"} <= first.keys():
        return "generation", _worked
    if {"context", "target"} <= first.keys() or "text" in first:
        return "cloze", _cloze
    raise RecipeError(
        f"{path}:{line}: no known form of question has the keys {elide(', '.join(first))}; known are "
        "question, choices, label; good, bad; text; context, target; question, answer"
    )


def _choice(row: Row) -> Row:
    key = next((key for key in (*ASKED, *CONTINUED) if key in row), None)
    if key is None:
        raise ValueError(f"none of the keys {', '.join((*ASKED, *CONTINUED))}")
    choices = row["choices"]
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(one, str) and one.strip() for one in choices):
        raise ValueError("choices are not a list of two or more texts")
    given = row["label"] if "label" in row else row["answer"]
    return {"context": _text(row, key), "asked": key in ASKED, "choices": choices, "label": _index(given, choices)}


def _index(label: Any, choices: list[str]) -> int:
    """Return the index of the choice that a label names."""
    if label in choices:
        return choices.index(label)
    if isinstance(label, str) and re.fullmatch("[A-Z]", label):
        label = ord(label) - ord("A")
    elif isinstance(label, str) and label.isdecimal():
        label = int(label)
    if type(label) is not int or not 0 <= label < len(choices):
        raise ValueError(f"label {label!r} is none of 0 … {len(choices) - 1}")
    return label


def _filled(row: Row) -> Row:
    before, after = BLANK.split(row["context"])
    return {"contexts": [before + choice for choice in row["choices"]], "rest": after.strip(), "label": row["label"]}


def _asked(row: Row) -> Row:
    context = prompt(row["context"]) if row["asked"] else row["context"]
    return {"context": context, "choices": row["choices"], "label": row["label"]}


def _pair(row: Row) -> Row:
    good, bad = next(pair for pair in PAIRS if pair[0] in row)
    return {"context": "", "choices": [_text(row, good), _text(row, bad)], "label": 0}


def _cloze(row: Row) -> Row:
    if "target" in row:
        context, target = _text(row, "context"), _text(row, "target")
    else:
        context, _, target = _text(row, "text").rstrip().rpartition(" ")
    if not context.strip():
        raise ValueError("a text of one word has nothing to tell its last word by")
    return {"context": context, "target": target}


def _worked(row: Row) -> Row:
    answer = _text(row, "answer")
    found = WORKED.search(answer)
    if found is None:
        raise ValueError("the answer does not end in `#### ` and a number")
    return {"context": prompt(_text(row, "question")), "target": found[1], "worked": answer}


def _with_examples(rows: list[Row]) -> list[Row]:
    shots = min(SHOTS, len(rows) // 10)
    examples = "".join(f"{row['context']} {row['worked']}\n\n" for row in rows[:shots])
    return [{"context": examples + row["context"], "target": row["target"]} for row in rows[shots:]]


def _text(row: Row, key: str) -> str:
    if not isinstance(row[key], str) or not row[key].strip():
        raise ValueError(f"`{key}` is no text")
    return str(row[key])
