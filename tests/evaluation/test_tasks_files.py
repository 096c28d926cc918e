"""Local task files: their forms, against scorers of a few lines, and what is wrong with them."""

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from compressor.assets import DEMO_MODEL
from compressor.errors import RecipeError
from compressor.evaluation.tasks import files
from compressor.evaluation.tasks.files import read
from compressor.evaluation.tasks.harness import run_tasks
from compressor.evaluation.tasks.results import TaskResult
from compressor.evaluation.tasks.subject import Place
from compressor.model.tokenizer import load_tokenizer

PLACE = Place(torch.device("cpu"), torch.float32, False, lambda device: 2**40)
Row = dict[str, Any]

WORDS = ["import os", "def f(x):", "return None", "class A:", "raise ValueError", "for i in range(3):", "print(x)", "x = 1"]
CHOICES: list[Row] = [
    {
        "question": f"What comes after {WORDS[n]}?",
        "choices": [WORDS[n - 1], WORDS[n - 2], f"{WORDS[n - 3]} {n}"],
        "label": n % 3,
    }
    for n in range(8)
]
PAIRS: list[Row] = [{"good": f"{word} # it is", "bad": f"{word} # it are"} for word in WORDS]
BLANKS: list[Row] = [
    {"sentence": f"{word} because _ is not {number}", "choices": ["it", "the import"], "answer": "AB"[number % 2]}
    for number, word in enumerate(WORDS)
]
CLOZE: list[Row] = [
    *({"text": text} for text in ("def f(self): return self", "import os, sys\nimport os.path as path", "if x is not None")),
    *({"context": "if x is not", "target": target} for target in ("None", " None:", "zebra")),
]
SUMS: list[Row] = [{"question": f"What is {n} and {n}?", "answer": f"Twice {n}.\n#### {2 * n:,}"} for n in range(990, 1010)]


def write(path: Path, rows: list[Row]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.fixture(scope="module")
def likelihood() -> Callable[[str, str], tuple[float, bool]]:
    """By transformers alone: the log-likelihood of a continuation, and whether it is the greedy one."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32), load_tokenizer(DEMO_MODEL)

    @torch.no_grad()
    def of(context: str, continuation: str) -> tuple[float, bool]:
        ids = torch.tensor([tokenizer.encode(context + continuation) if context else [0, *tokenizer.encode(continuation)]])
        first = len(tokenizer.encode(context)) if context else 1
        logp = model(ids).logits[0, first - 1 : -1].log_softmax(-1)
        return float(logp.gather(-1, ids[0, first:, None]).sum()), bool((logp.argmax(-1) == ids[0, first:]).all())

    return of


def run(path: Path, **options: Any) -> dict[str, TaskResult]:
    return {row.metric: row for row in run_tasks(DEMO_MODEL, [str(path)], PLACE, **options)}


def best(scores: list[float]) -> int:
    return scores.index(max(scores))


def test_multiple_choice(tmp_path: Path, likelihood: Callable[[str, str], tuple[float, bool]]) -> None:
    right, right_by_length = [], []
    for row in CHOICES:
        scores = [likelihood(f"Question: {row['question']}\nAnswer:", f" {choice}")[0] for choice in row["choices"]]
        right.append(best(scores) == row["label"])
        right_by_length.append(best([s / len(c) for s, c in zip(scores, row["choices"], strict=True)]) == row["label"])
    found = run(write(tmp_path / "choices.jsonl", CHOICES))
    assert 0 < sum(right) < len(right)  # else it shows little
    assert found["acc"].value == sum(right) / len(right)
    assert found["acc_norm"].value == sum(right_by_length) / len(right)
    share, n = sum(right) / len(right), len(right)
    assert found["acc"].stderr == pytest.approx((share * (1 - share) / (n - 1)) ** 0.5)
    assert found["acc"].samples == n


def test_minimal_pairs(tmp_path: Path, likelihood: Callable[[str, str], tuple[float, bool]]) -> None:
    right = [likelihood("", f" {row['good']}")[0] > likelihood("", f" {row['bad']}")[0] for row in PAIRS]
    found = run(write(tmp_path / "pairs.jsonl.gz", PAIRS))
    assert found.keys() == {"acc"}
    assert found["acc"].value == sum(right) / len(right)


def test_blanks(tmp_path: Path, likelihood: Callable[[str, str], tuple[float, bool]]) -> None:
    right = []
    for row in BLANKS:
        before, after = row["sentence"].split("_")
        scores = [likelihood(before + choice, after)[0] for choice in row["choices"]]
        right.append(best(scores) == "AB".index(row["answer"]))
    assert 0 < sum(right) < len(right)
    assert run(write(tmp_path / "blanks.jsonl", BLANKS))["acc"].value == sum(right) / len(right)


def test_cloze(tmp_path: Path, likelihood: Callable[[str, str], tuple[float, bool]]) -> None:
    right = []
    for row in CLOZE:
        context, target = (row["context"], row["target"]) if "target" in row else row["text"].rsplit(" ", 1)
        right.append(likelihood(context, f" {target.lstrip()}")[1])
    assert 0 < sum(right) < len(right)
    assert run(write(tmp_path / "cloze.jsonl", CLOZE))["acc"].value == sum(right) / len(right)


def test_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two of twenty are the examples; of what is written, the last number before the next question counts."""
    seen: list[str] = []

    def answer(model: Any, tokenizer: Any, prompts: list[list[int]], stops: list[str], max_tokens: int) -> list[str]:
        texts = [tokenizer.decode(ids) for ids in prompts]
        seen.extend(texts)
        asked = [int(re.findall(r"What is (\d+)", text)[-1]) for text in texts]
        assert stops == ["Question:"]
        return [f"Of 7, it is ${2 * n:,}.00." if n % 3 else "I do not know" if n % 2 else f"{2 * n} or {n}" for n in asked]

    monkeypatch.setattr("compressor.evaluation.tasks.adapter.continuations", answer)
    found = run(write(tmp_path / "sums.jsonl", SUMS))
    assert found["exact_match"].samples == 18
    assert found["exact_match"].value == sum(n % 3 > 0 for n in range(992, 1010)) / 18
    examples = "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in SUMS[:2])
    assert sorted(seen) == sorted(f"{examples}Question: {row['question']}\nAnswer:" for row in SUMS[2:])


def test_a_limit_draws_over_the_whole_file() -> None:
    questions = files.Questions("x", "cloze", [{"context": str(n), "target": "x"} for n in range(1000)])
    drawn = [int(row["context"]) for row in questions.drawn(50, seed=0).rows]
    assert drawn == sorted(set(drawn)) and len(drawn) == 50 and max(drawn) > 900
    assert questions.drawn(50, seed=0) == questions.drawn(50, seed=0) != questions.drawn(50, seed=1)
    assert questions.drawn(None, seed=0) == questions.drawn(1000, seed=0) == questions


@pytest.mark.parametrize(
    ("row", "context"),
    [
        ({"question": "Why?"}, "Question: Why?\nAnswer:"),
        ({"question": "A story.\nQuestion: Why?"}, "A story.\nQuestion: Why?\nAnswer:"),
        ({"goal": "Question: Why?\nAnswer:"}, "Question: Why?\nAnswer:"),
        ({"query": "He went"}, "He went"),
        ({"context": "He went"}, "He went"),
        ({"question": "The group S_5 has_ which order?"}, "Question: The group S_5 has_ which order?\nAnswer:"),
    ],
)
def test_questions_are_asked_and_beginnings_continued(tmp_path: Path, row: Row, context: str) -> None:
    made = read(write(tmp_path / "one.jsonl", [{**row, "choices": ["to", "fro"], "label": 1}]))
    assert made.kind == "choice"
    assert made.rows == [{"context": context, "choices": ["to", "fro"], "label": 1}]


def test_blanks_count_only_if_every_row_has_one(tmp_path: Path) -> None:
    asked = [{"question": text, "choices": ["to", "fro"], "label": 1} for text in ("What does _ mean?", "Why?")]
    mixed, alone = (read(write(tmp_path / f"{len(rows)}.jsonl", rows)) for rows in (asked, asked[:1]))
    assert (mixed.kind, alone.kind) == ("choice", "blank")
    assert [row["context"] for row in mixed.rows] == ["Question: What does _ mean?\nAnswer:", "Question: Why?\nAnswer:"]
    assert alone.rows == [{"contexts": ["What does to", "What does fro"], "rest": "mean?", "label": 1}]


@pytest.mark.parametrize("label", [2, "2", "C", "the third"])
def test_a_label_is_an_index_a_letter_or_a_text(tmp_path: Path, label: Any) -> None:
    row = {"question": "Which?", "choices": ["one", "two", "the third"], "answer": label}
    assert read(write(tmp_path / "one.jsonl", [row])).rows[0]["label"] == 2


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "holds no questions"),
        ('{"question": "a"\n', ":1: not valid JSON"),
        ('{"text": "a b"}\n\n[1]\n', ":3: a list where an object"),
        ('{"prompt": "a", "reply": "b"}\n', ":1: no known form of question has the keys prompt, reply; known are"),
        ('{"question": "a", "choices": ["x", "y"], "label": 2}\n', r":1: label 2 is none of 0 … 1; correct this line"),
        ('{"question": "a", "choices": ["x", "y"], "label": "C"}\n', r":1: label 2 is none of 0 … 1; correct this line"),
        ('{"question": "a", "choices": ["x", "y"], "label": true}\n', ":1: label True is none of"),
        ('{"question": "a", "choices": ["x", ""], "label": 0}\n', ":1: choices are not a list of two or more texts"),
        ('{"question": "a", "choices": ["x", "y"]}\n', r":1: question, choices do not make a question like the first line's"),
        ('{"text": "a b"}\n{"good": "a", "bad": "b"}\n', r":2: good, bad do not make a question like the first line's"),
        ('{"text": "a b"}\n{"text": 5}\n', ":2: `text` is no text"),
        ('{"text": "alone"}\n', ":1: a text of one word"),
        ('{"question": "a", "answer": "four"}\n', ":1: the answer does not end in `#### ` and a number"),
    ],
)
def test_what_is_wrong_is_named_by_its_line(tmp_path: Path, lines: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(lines)
    with pytest.raises(RecipeError, match=f"bad.jsonl.*{message}"):
        read(path)


def test_a_file_that_is_not_there_or_no_gzip(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such task file"):
        read(tmp_path / "none.jsonl")
    (tmp_path / "plain.jsonl.gz").write_text("{}")
    with pytest.raises(RecipeError, match="cannot be read"):
        read(tmp_path / "plain.jsonl.gz")


SHARED = Path(__file__).parents[3] / "shared/data/tasks"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the usual tasks as files are not on this machine")
@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [
        ("arc-c.jsonl", "choice", 295),
        ("boolq.jsonl", "choice", 3270),
        ("copa.jsonl", "choice", 100),
        ("mmlu.jsonl", "choice", 14042),
        ("obqa.jsonl", "choice", 500),
        ("piqa.jsonl", "choice", 1838),
        ("winogrande.jsonl", "blank", 1267),
        ("blimp_pairs.jsonl.gz", "pair", 67000),
        ("lambada.jsonl", "cloze", 5153),
        ("gsm8k-test.jsonl", "generation", 1319 - files.SHOTS),
    ],
)
def test_the_usual_tasks_fit_the_forms(name: str, kind: str, count: int) -> None:
    questions = read(SHARED / name)
    assert (questions.kind, len(questions.rows)) == (kind, count)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_byte_order_mark_line_ends_of_windows_and_separators_in_texts_are_read(tmp_path: Path, name: str) -> None:
    rows = [{"context": "one\u2028two\x85", "target": "three"}] * 2
    content = ("\ufeff" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)).encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert list(read(path).rows) == rows


DAMAGED_ARCHIVES = {
    "zeros": b"\x1f\x8b\x08" + bytes(40),
    "cut": gzip.compress(b"{}" * 99)[:-9],
    "plain": b"plain",
}


@pytest.mark.parametrize("content", DAMAGED_ARCHIVES.values(), ids=DAMAGED_ARCHIVES)
def test_a_damaged_archive_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    with pytest.raises(RecipeError, match=r"a.jsonl.gz: cannot be read \(.*\); check the file"):
        read(tmp_path / "a.jsonl.gz")


def test_an_archive_that_grows_beyond_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_BYTES", 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b" " * 1001))
    with pytest.raises(RecipeError, match="more than 1,000 bytes"):
        read(tmp_path / "a.jsonl.gz")


def test_a_row_of_deeply_nested_lists_is_named_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one two"}\n' + "[" * 100_000)
    with pytest.raises(RecipeError, match=r"a.jsonl:2: not valid JSON \(nested too deeply\)"):
        read(tmp_path / "a.jsonl")
