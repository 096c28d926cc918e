"""Questions of one task in the kinds that there are, whether read from a file or generated.

choice      {context, choices, label}   the likeliest continuation of the context is taken for the answer
blank       {contexts, rest, label}     the context after which the rest is likeliest is taken for the answer
cloze       {context, target}           right if greedy decoding writes exactly the target
generation  {context, target}           right if the last number of what is written is the target
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

Kind = Literal["choice", "pair", "blank", "cloze", "generation"]

NUMBER = r"-?\$?\d[\d,]*(?:\.\d+)?"
IGNORED = (",", r"\$", r"\.0+$")  # in a number, when it is compared
STOP = "Question:"  # a model that writes this has begun with the next question
LONGEST_ANSWER = 256  # tokens


@dataclass(frozen=True)
class Questions:
    """A task."""

    name: str
    kind: Kind
    rows: Sequence[Mapping[str, Any]]
    max_tokens: int = LONGEST_ANSWER  # of a generated answer

    def drawn(self, limit: int | None, seed: int) -> "Questions":
        """At most so many of them, drawn over all: files are often sorted by subject."""
        if limit is None or limit >= len(self.rows):
            return self
        chosen = sorted(random.Random(seed).sample(range(len(self.rows)), limit))
        return replace(self, rows=[self.rows[number] for number in chosen])


def prompt(question: str) -> str:
    """A question as text whose continuation, after a space, is the answer."""
    asked = question if any(line.startswith(STOP) for line in question.splitlines()) else f"{STOP} {question}"
    return asked if asked.endswith("Answer:") else f"{asked}\nAnswer:"
