"""Render conversations as text with the tokenizer's own chat template.

The template receives the turns unchanged, unless it cannot write their data in its present form. Then it receives the data
in its other form:

* Some templates would print Python's representation of a list of text parts, or leave the text out. They receive the parts
  joined by line breaks, as in vLLM and llama.cpp.
* A template that fails on a turn without content, or prints `None` for it, receives the empty text.
* `arguments` of a tool call are converted from JSON text (as OpenAI stores them) to an object, or from an object to JSON
  text. A tool's answer that is an object is converted to JSON text.

To find out what a template can write, a copy of the conversation is rendered in which the data is replaced by marks.
"""

import itertools
import json
from collections.abc import Iterator, Sequence, Set
from itertools import chain, combinations
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from compressor.errors import CalibrationError
from compressor.pipeline.calibration.chat import REASONING, SPEAKERS, Conversation, Turn, called_function
from compressor.reading import cause, elide, parse_json

MOST_KINDS = 8  # limit of kinds whose forms are tried, at most 2⁸ renderings; conversations have 3 or 4
LOST = {
    "parts": "the content of {} turns",
    "nothing": "{} turns without content",
    "object": "the content of {} turns",
    "argument text": "the arguments of tool calls of {} turns",
    "argument object": "the arguments of tool calls of {} turns",
}


class Kind(NamedTuple):
    """A kind of data that has two forms: the data, and the role of its turns."""

    data: str  # `parts`, `nothing`, `object`, `argument text` or `argument object`
    role: str


def render(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> str:
    """Return a conversation as text, special tokens included.

    Raises:
        CalibrationError: there is no chat template, or it cannot write the row.
    """
    where = conversation.where
    if tokenizer.chat_template is None:
        raise CalibrationError(
            f"{where}: holds a conversation, and the tokenizer has no chat template; use a data set of plain text"
        )
    changed = _choose_forms(tokenizer, conversation)
    try:
        return _apply(tokenizer, [_changed(turn, changed) for turn in conversation.turns], conversation.options)
    except Exception as error:  # a template can raise anything
        raise _refused(where, cause(error)) from error


def _refused(where: str, reason: str) -> CalibrationError:
    return CalibrationError(
        f"{where}: the tokenizer's chat template cannot write this row ({elide(reason)}); leave the row out"
    )


def _apply(tokenizer: PreTrainedTokenizerBase, turns: list[Turn], options: dict[str, Any]) -> str:
    return str(tokenizer.apply_chat_template(turns, tokenize=False, **options))


def _choose_forms(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> Set[Kind]:
    """Return the kinds of data to give in their other form: the smallest set with which the template shows the data best.

    Raises:
        CalibrationError: the template shows the data in no form, or there are more than MOST_KINDS kinds.
    """
    kinds = sorted({kind for turn in conversation.turns for kind in _kinds(turn)})
    if not kinds:
        return frozenset()
    if len(kinds) > MOST_KINDS:
        raise _refused(conversation.where, f"{len(kinds)} kinds of content where {MOST_KINDS} can be told apart")
    marked = _Marked(conversation.turns)
    best: tuple[tuple[int, int, int, int], Set[Kind], str] | None = None
    failure = ""
    for changed in map(frozenset, chain.from_iterable(combinations(kinds, size) for size in range(len(kinds) + 1))):
        try:
            text = _apply(tokenizer, [_changed(turn, changed) for turn in marked.turns], conversation.options)
        except Exception as error:  # a template can raise anything
            failure = failure or cause(error)
            continue
        score = marked.score(text)
        if best is None or score > best[0]:
            best = score, changed, text
        if score[:3] == (0, 0, 0) and all(marked.shows(kind, text) for kind in kinds):
            break
    if best is None:
        raise _refused(conversation.where, failure)
    score, chosen, text = best
    if score[0] < 0:
        raise _refused(conversation.where, "it would print lists or objects as Python writes them")
    lost = next((kind for kind in sorted(chosen) if not marked.shows(kind, text)), None)
    if lost is not None:
        raise _refused(conversation.where, f"it leaves out {LOST[lost.data].format(lost.role)}")
    return chosen


def _kinds(turn: Turn) -> Iterator[Kind]:
    """Yield the kinds of data in a turn that have two forms."""
    role = turn["role"] if turn["role"] in SPEAKERS else "other"
    content = turn.get("content")
    if not isinstance(content, str):
        yield Kind("parts" if isinstance(content, list) else "nothing" if content is None else "object", role)
    for call in turn.get("tool_calls", ()):
        arguments = called_function(call).get("arguments")
        if isinstance(arguments, dict):
            yield Kind("argument object", role)
        elif _parsed(arguments) is not None:
            yield Kind("argument text", role)


def _parsed(arguments: Any) -> dict[str, Any] | None:
    """Return the object in a JSON text; None if there is none. An empty text is an empty object, as in OpenAI's clients."""
    if not isinstance(arguments, str):
        return None
    try:
        value = parse_json(arguments, "arguments", CalibrationError, "") if arguments.strip() else {}
    except CalibrationError:
        return None
    return value if isinstance(value, dict) else None


def _changed(turn: Turn, kinds: Set[Kind]) -> Turn:
    """Return a turn with the data of some kinds in its other form."""
    changed, content = dict(turn), turn.get("content")
    named = {kind.data for kind in _kinds(turn) if kind in kinds}
    if "parts" in named:
        assert isinstance(content, list)
        changed["content"] = "\n".join(part if isinstance(part, str) else part["text"] for part in content)
    if "nothing" in named:
        changed["content"] = ""
    if "object" in named:
        changed["content"] = json.dumps(content, ensure_ascii=False)
    if named & {"argument text", "argument object"}:
        changed["tool_calls"] = [_with_arguments(call, named) for call in turn["tool_calls"]]
    return changed


def _with_arguments(call: dict[str, Any], named: Set[str]) -> dict[str, Any]:
    arguments = called_function(call).get("arguments")
    if isinstance(arguments, dict) and "argument object" in named:
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif "argument text" in named and (parsed := _parsed(arguments)) is not None:
        arguments = parsed
    return _with_function(call, arguments=arguments) if "arguments" in called_function(call) else call


def _with_function(call: dict[str, Any], **values: Any) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": {**call["function"], **values}}
    return {**call, **values}


class _Marked:
    """A copy of a conversation in which data that has two forms is replaced by marks, to be found in the rendered text."""

    def __init__(self, turns: Sequence[Turn]) -> None:
        self._numbers = itertools.count()
        self.marks: dict[Kind, list[str]] = {}
        self.representations: list[str] = []  # Python's representations of the data
        self.turns = [self._turn(turn) for turn in turns]

    def score(self, text: str) -> tuple[int, int, int, int]:
        """Return how well a text shows the data. A larger tuple is better; the most important criterion comes first."""
        escaped = sum(f'\\"{mark}' in text for marks in self.marks.values() for mark in marks)
        shown = sum(mark in text for marks in self.marks.values() for mark in marks)
        return -sum(one in text for one in self.representations), -text.count("None"), -escaped, shown

    def shows(self, kind: Kind, text: str) -> bool:
        """Return whether a text contains any data of a kind."""
        return any(mark in text for mark in self.marks[kind])

    def _mark(self, *kinds: Kind) -> str:
        mark = f"zq{next(self._numbers):05}qz"
        for kind in kinds:
            self.marks[kind].append(mark)
        return mark

    def _turn(self, turn: Turn) -> Turn:
        kinds = list(_kinds(turn))
        for kind in kinds:
            self.marks.setdefault(kind, [])
        marked, content = dict(turn), turn.get("content")
        of = {kind.data: kind for kind in kinds}
        if isinstance(content, list):
            kind = of["parts"]
            marked["content"] = [
                self._mark(kind) if isinstance(part, str) else {**part, "text": self._mark(kind)} for part in content
            ]
            self.representations += [repr(part) for part in marked["content"] if isinstance(part, dict)]
            self.representations.append(repr(marked["content"]))
        if isinstance(content, dict):
            marked["content"] = {self._mark(of["object"]): self._mark(of["object"])}
            self.representations.append(repr(marked["content"]))
        if turn.get("tool_calls"):
            marked["tool_calls"] = [self._call(call, of) for call in turn["tool_calls"]]
        elif content is None:
            marked |= {key: self._mark(of["nothing"]) for key in REASONING if turn.get(key)}
        return marked

    def _call(self, call: dict[str, Any], of: dict[str, Kind]) -> dict[str, Any]:
        """Mark the name of a tool call, which a turn without content must show, and its arguments."""
        nothing = [of["nothing"]] if "nothing" in of else []
        arguments = called_function(call).get("arguments")
        values: dict[str, Any] = {"name": self._mark(*nothing)}
        self.representations.append(f"'name': '{values['name']}'")
        if isinstance(arguments, dict):
            kind = of["argument object"]
            values["arguments"] = {self._mark(kind): self._mark(kind)}
            self.representations.append(repr(values["arguments"]))
        elif _parsed(arguments) is not None:
            kind = of["argument text"]
            made = {self._mark(kind): self._mark(kind)}
            values["arguments"] = json.dumps(made)
            self.representations.append(repr(made))
        return _with_function(call, **values)
