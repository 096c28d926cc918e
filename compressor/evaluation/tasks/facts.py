"""Facts that a model may know, asked from memory, beside the answer, and with the answer far away in a long text.

Where a model still answers when it has read the fact a moment ago but no longer from memory, it has lost knowledge; where
it fails at both, it has lost the ability to read. All but `choices` are cloze: the answer must be written, not picked.
"""

import json
import random
from bisect import bisect_right
from dataclasses import dataclass
from importlib.resources import files

from compressor.errors import RecipeError
from compressor.evaluation.tasks.encode import Encoder
from compressor.evaluation.tasks.questions import Questions

CHOICES = 4
BESIDE = 12  # sentences that the fact stands among, itself included
LONGEST = 4096  # tokens of a long text
DEPTHS = 5  # places of a fact in a long text, from its beginning to its end
SHORTEST = 8  # tokens of a sentence about nothing: its words and the full stop
LONG_FACTS = 40  # that are asked in long texts: those cost the most

BEGINNINGS = {
    "capital": "The capital of {} is",
    "symbol": "The chemical symbol of {} is",
    "author": "The author of {} is",
    "currency": "The currency of {} is the",
    "year": "The year in which {} is",
    "scientist": "The scientist famous for {} is",
}
WHO = ("The baker", "A tall man", "My neighbour", "The old sailor", "Her cousin", "A young nurse", "The gardener", "His aunt")
DID = ("walked to", "waited near", "asked about", "returned from", "talked about", "drove past", "painted", "looked at")
WHAT = (
    "the harbour",
    "a wooden bridge",
    "the market",
    "the red barn",
    "an empty house",
    "the small garden",
    "the mill",
    "a lake",
)
WHEN = ("on Monday", "before the rain", "in the early morning", "after lunch", "at the end of the week", "late at night")


@dataclass(frozen=True)
class Fact:
    """One row of the table."""

    relation: str
    subject: str
    answer: str

    @property
    def beginning(self) -> str:
        """A sentence up to the answer."""
        return BEGINNINGS[self.relation].format(self.subject)

    @property
    def sentence(self) -> str:
        """All of it."""
        return f"{self.beginning} {self.answer}."


def table() -> list[Fact]:
    """Every fact, in the order of the file."""
    text = (files("compressor.assets") / "facts.jsonl").read_text(encoding="utf-8")
    return [Fact(**json.loads(line)) for line in text.splitlines()]


def choices(name: str, seed: int) -> Questions:
    """Each fact with answers of other facts of its relation to choose from."""
    draw, facts = random.Random(seed), table()
    rows = []
    for fact in facts:
        others = sorted({f.answer for f in facts if f.relation == fact.relation} - {fact.answer})
        offered = [fact.answer, *draw.sample(others, CHOICES - 1)]
        draw.shuffle(offered)
        rows.append({"context": fact.beginning, "choices": offered, "label": offered.index(fact.answer)})
    return Questions(name, "choice", rows)


def from_memory(name: str) -> Questions:
    """Each fact with nothing before it."""
    return Questions(name, "cloze", [{"context": fact.beginning, "target": fact.answer} for fact in table()])


def in_context(name: str, encoder: Encoder, seed: int) -> Questions:
    """Each fact after sentences that hold it, among as many others of its relation as the model has room for."""
    for beside in range(BESIDE, 1, -1):
        rows = _told(seed, beside)
        longest = max(_tokens(encoder, row["context"], row["target"]) for row in rows)
        if longest <= encoder.max_length:
            return Questions(name, "cloze", rows)
    raise RecipeError(
        f"{name}: a question takes up to {longest} tokens where the model was made for {encoder.max_length}; "
        "leave the task out"
    )


def _told(seed: int, beside: int) -> list[dict[str, str]]:
    draw, facts = random.Random(seed), table()
    rows = []
    for fact in facts:
        others = [f for f in facts if f.relation == fact.relation and f != fact]
        told = [fact, *draw.sample(others, min(beside - 1, len(others)))]
        draw.shuffle(told)
        rows.append({"context": _after([f.sentence for f in told], fact), "target": fact.answer})
    return rows


def in_long_context(name: str, encoder: Encoder, seed: int, share: float) -> Questions:
    """Some facts, each after a long text that it stands in at some depth.

    Args:
        name: Name of the task.
        encoder: Counts tokens and says how many the model takes.
        seed: Seed of the choice of facts and of the text.
        share: Share of the tokens that the model takes, at most LONGEST, that text and question fill.
    """
    draw = random.Random(seed)
    room = int(share * min(encoder.max_length, LONGEST))
    rows = []
    for number, fact in enumerate(draw.sample(table(), LONG_FACTS)):
        depth = number % DEPTHS / (DEPTHS - 1)
        filler = [_sentence(draw) for _ in range(room // SHORTEST)]
        context = _longest(encoder, fact, depth, filler, room)
        if context is None:
            raise RecipeError(
                f"{name}: {room} tokens of the {encoder.max_length} that the model was made for are no room for a long text; "
                "leave the task out"
            )
        rows.append({"context": context, "target": fact.answer})
    return Questions(name, "cloze", rows)


def _longest(encoder: Encoder, fact: Fact, depth: float, filler: list[str], room: int) -> str | None:
    """A question after as much of a text as fits; None if none does."""

    def tokens(count: int) -> int:
        return _tokens(encoder, _hidden(fact, depth, filler[:count]), fact.answer)

    count = bisect_right(range(1, len(filler)), room, key=tokens)
    return _hidden(fact, depth, filler[:count]) if count else None


def _hidden(fact: Fact, depth: float, filler: list[str]) -> str:
    """A question after a text that the fact stands in, from its beginning (0) to its end (1)."""
    place = round(depth * len(filler))
    return _after([*filler[:place], fact.sentence, *filler[place:]], fact)


def _sentence(draw: random.Random) -> str:
    """About nothing."""
    return f"{draw.choice(WHO)} {draw.choice(DID)} {draw.choice(WHAT)} {draw.choice(WHEN)}."


def _after(sentences: list[str], fact: Fact) -> str:
    return f"{' '.join(sentences)}\n\n{fact.beginning}"


def _tokens(encoder: Encoder, context: str, answer: str) -> int:
    """Return the number of tokens of a question with its answer, the begin token included even where there is none."""
    return len(encoder.ids(f"{context} {answer}")) + 1
