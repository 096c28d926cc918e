"""Our own tasks: the same on every machine, and the answer where it is said to be."""

import re
from collections import Counter
from collections.abc import Callable

import pytest

from compressor.assets import DEMO_MODEL
from compressor.errors import RecipeError
from compressor.evaluation.tasks import facts
from compressor.evaluation.tasks.encode import Encoder
from compressor.evaluation.tasks.questions import Questions
from compressor.evaluation.tasks.suites import HUB, OWN, SUITES, tasks_of
from compressor.model.tokenizer import load_tokenizer

LENGTH = 1024  # nothing is computed with the model


@pytest.fixture(scope="module")
def make() -> Callable[..., Questions]:
    def of(name: str, length: int = LENGTH, seed: int = 0) -> Questions:
        return OWN[name](name, Encoder(load_tokenizer(DEMO_MODEL), length), seed)

    return of


@pytest.mark.parametrize("name", OWN)
def test_a_seed_says_everything(make: Callable[..., Questions], name: str) -> None:
    assert make(name) == make(name)
    if name != "facts-cloze":  # nothing is drawn
        assert make(name, seed=1).rows != make(name).rows


def test_the_table_is_sound() -> None:
    table = facts.table()
    assert len(table) >= 150
    assert len({(f.relation, f.subject) for f in table}) == len(table)
    assert {f.relation for f in table} == set(facts.BEGINNINGS)
    assert all(len({f.answer for f in table if f.relation == name}) >= 2 * facts.CHOICES for name in facts.BEGINNINGS)


def test_one_choice_is_right_and_no_place_is_favoured(make: Callable[..., Questions]) -> None:
    answers = {fact.beginning: fact.answer for fact in facts.table()}
    rows = make("facts-choice").rows
    assert len(rows) == len(answers)
    for row in rows:
        assert row["choices"][row["label"]] == answers[row["context"]]
        assert len(set(row["choices"])) == facts.CHOICES
    places = Counter(row["label"] for row in rows)
    assert min(places.values()) > len(rows) / facts.CHOICES / 2


def test_from_memory_the_answer_is_not_given(make: Callable[..., Questions]) -> None:
    rows = make("facts-cloze").rows
    assert not [row for row in rows if re.search(rf"\b{row['target']}\b", row["context"])]
    assert {row["context"] for row in rows} == {fact.beginning for fact in facts.table()}


def test_in_context_the_answer_stands_among_others_of_its_kind(make: Callable[..., Questions]) -> None:
    answers = {fact.beginning: fact for fact in facts.table()}
    places = set()
    for row in make("facts-in-context").rows:
        told, asked = row["context"].split("\n\n")
        fact = answers[asked]
        assert told.count(fact.sentence) == 1
        assert row["target"] == fact.answer
        places.add(round(told.index(fact.sentence) / len(told), 1))
        others = [f for f in answers.values() if f.relation == fact.relation and f != fact and f.sentence in told]
        assert len(others) == facts.BESIDE - 1
    assert len(places) > 5


@pytest.mark.parametrize(("name", "share"), [("facts-long-25", 0.25), ("facts-long-50", 0.5), ("facts-long-100", 1.0)])
def test_in_a_long_text_the_answer_stands_once_at_every_depth(
    make: Callable[..., Questions], name: str, share: float
) -> None:
    tokenizer = load_tokenizer(DEMO_MODEL)
    answers = {fact.beginning: fact for fact in facts.table()}
    depths: Counter[int] = Counter()
    for row in make(name).rows:
        told, asked = row["context"].split("\n\n")
        fact = answers[asked]
        assert told.count(fact.sentence) == 1
        assert row["target"] == fact.answer
        depths[round(4 * told.index(fact.sentence) / len(told.replace(fact.sentence, "")))] += 1
        tokens = len(tokenizer.encode(f"{row['context']} {row['target']}", verbose=False))
        assert share * LENGTH - 40 < tokens < share * LENGTH
    assert set(depths) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("name", ["facts-in-context", "facts-long-25"])
def test_a_model_that_reads_too_little_is_refused(make: Callable[..., Questions], name: str) -> None:
    with pytest.raises(RecipeError, match=f"{name}: .* 64"):
        make(name, length=64)


def test_pairs_differ_and_do_not_repeat(make: Callable[..., Questions]) -> None:
    pairs = [tuple(row["choices"]) for row in make("grammar-pairs").rows]
    assert len(set(pairs)) == len(pairs) >= 200
    for good, bad in pairs:
        assert good != bad
        assert len(good.split()) == len(bad.split())


def test_sums_are_right(make: Callable[..., Questions]) -> None:
    signs = {"plus": "+", "minus": "-", "times": "*"}
    rows = make("arithmetic-sums").rows
    for row in rows:
        for a, sign, b, result in re.findall(r"What is (\d+) (\w+) (\d+)\?\nAnswer: ?(\d*)", row["context"]):
            assert (result or row["target"]) == str(eval(f"{a} {signs[sign]} {b}"))
    last = [row["context"].rpartition("Question:")[2] for row in rows]
    assert len(set(last)) == len(last) == 100
    assert not any(row["context"].count(asked) > 1 for row, asked in zip(rows, last, strict=True))


def test_suites_name_tasks_that_there_are() -> None:
    for suite in SUITES:
        assert set(tasks_of(suite)) <= {*OWN, *HUB}
    assert not set(HUB) & set(tasks_of("standard"))
    assert set(tasks_of("quick")) < set(tasks_of("standard")) < set(tasks_of("full"))
    with pytest.raises(RecipeError, match=r"`quik`; did you mean `quick`\?"):
        tasks_of("quik")
