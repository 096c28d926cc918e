"""Regular expressions from files and recipes, matched in bounded time.

Python's `re` tries one path through an expression after another, and some expressions have exponentially many: `([\\w.]+)+!`
on a name of 40 characters takes hours. Here all paths are followed at once: each step of the parsed expression maps a set of
positions in the text, one bit each, to the next set (Thompson, "Regular expression search algorithm", 1968). The parser and
the character classes are those of `re`, and so are the answers. Constructs that need a memory of how they matched
(backreferences, conditions, atomic groups and possessive repeats) are refused.
"""

import functools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from re import _compiler, _parser  # type: ignore[attr-defined]  # no public interface gives the parsed expression
from typing import Any

from compressor.errors import RecipeError
from compressor.reading import elide

MAX_LENGTH = 20_000  # characters of one expression
MAX_TOTAL = 100_000  # characters of all expressions of one file; parsing them takes seconds at most
MAX_STEPS = 10_000  # steps in one text; an ordinary expression takes about a hundred, and this many take 50 ms at most
MAX_FILE_STEPS = 1_000_000  # steps of all expressions of one file in all texts
Step = Callable[["_Run", int], int]  # positions before -> positions after, as bits
REPEATS = ("MAX_REPEAT", "MIN_REPEAT")
SINGLE = ("ANY", "IN", "LITERAL", "NOT_LITERAL")  # nodes that match one character


class Expression:
    """A parsed expression. It matches the same texts as `re.compile(pattern)`, but returns only truth values.

    Args:
        pattern: Regular expression in the syntax of `re`.
        budget: Steps allowed in all texts, shared with other expressions; None allows `MAX_STEPS` in each text.

    Raises:
        ValueError: not a regular expression, or one that cannot be matched in bounded time.
    """

    def __init__(self, pattern: str, budget: "Budget | None" = None) -> None:
        self.pattern, self.budget = pattern, budget
        try:
            if len(pattern) > MAX_LENGTH:
                raise re.error(f"{len(pattern):,} characters where {MAX_LENGTH:,} are allowed")
            compiled, parsed = re.compile(pattern), _parser.parse(pattern)
            self._plain = compiled if _is_plain(parsed) else None
            self._step = _sequence(parsed, ())
        except (re.error, RecursionError, OverflowError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise ValueError(
                f"{elide(pattern)}: not a regular expression that can be matched ({reason}); correct it"
            ) from error

    def match(self, text: str) -> bool:
        """Return whether the beginning of a text matches.

        Raises:
            RecipeError: matching takes more steps than allowed.
        """
        if self._plain is not None:
            return self._plain.match(text) is not None
        return bool(self._step(_Run(self.pattern, text, self.budget or Budget(MAX_STEPS)), 1))

    def search(self, text: str) -> bool:
        """Return whether anything in a text matches; errors are those of `match`."""
        if self._plain is not None:
            return self._plain.search(text) is not None
        return bool(self._step(_Run(self.pattern, text, self.budget or Budget(MAX_STEPS)), (2 << len(text)) - 1))


@dataclass
class Budget:
    """Number of steps that one or several expressions may still take."""

    left: int


def expressions(patterns: Iterable[str]) -> dict[str, Expression]:
    """Parse the expressions of a file; return them by their text.

    Raises:
        ValueError: one of them is refused, or their total length is too large.
    """
    distinct = dict.fromkeys(patterns)
    if (total := sum(map(len, distinct))) > MAX_TOTAL:
        raise ValueError(f"expressions of {total:,} characters together; at most {MAX_TOTAL:,} are read")
    budget = Budget(MAX_FILE_STEPS)
    return {pattern: Expression(pattern, budget) for pattern in distinct}


@functools.lru_cache
def expression(pattern: str) -> Expression:
    """Return the `Expression` of a pattern, parsed once."""
    return Expression(pattern)


@dataclass
class _Run:
    """State of matching one text with one expression."""

    pattern: str
    text: str
    budget: Budget

    def count(self) -> None:
        self.budget.left -= 1
        if self.budget.left < 0:
            raise RecipeError(
                f"{elide(self.pattern)}: matching this expression with `{elide(self.text)}` takes too many steps; "
                "write a shorter one, with fewer repeats"
            )


def _is_plain(parsed: Any) -> bool:
    """Return whether `re` itself takes few steps: a sequence of characters, at most two of them repeated."""
    kinds = [(str(kind), value) for kind, value in parsed]
    repeats = [value[2] for kind, value in kinds if kind in REPEATS]
    return (
        len(repeats) <= 2
        and all(len(body) == 1 and str(body[0][0]) in SINGLE for body in repeats)
        and all(kind in (*SINGLE, *REPEATS, "AT") for kind, _ in kinds)
    )


def _sequence(parsed: Any, scopes: tuple[tuple[int, int], ...]) -> Step:
    """Return the step of a parsed sequence; `scopes` are the flags that the enclosing groups set and unset."""
    steps = [_item(parsed.state, str(kind), value, (kind, value), scopes) for kind, value in parsed]

    def run(text: _Run, places: int) -> int:
        for step in steps:
            if not places:
                break
            text.count()
            places = step(text, places)
        return places

    return run


def _item(state: Any, kind: str, value: Any, item: Any, scopes: tuple[tuple[int, int], ...]) -> Step:
    if kind == "LITERAL" and not scopes and not state.flags & re.IGNORECASE:
        return _character(chr(value).__eq__)
    if kind in SINGLE:
        single = _compiled(state, item, scopes)
        return _character(functools.lru_cache(maxsize=256)(lambda character: single.match(character) is not None))
    if kind == "AT":
        return _where(_test(_compiled(state, item, scopes)))
    if kind == "SUBPATTERN":
        return _sequence(value[3], (*scopes, (value[1], value[2])))
    if kind == "BRANCH":
        branches = [_sequence(branch, scopes) for branch in value[1]]
        return lambda text, places: functools.reduce(lambda found, branch: found | branch(text, places), branches, 0)
    if kind in REPEATS:
        return _repeat(_sequence(value[2], scopes), int(value[0]), int(value[1]))
    if kind in ("ASSERT", "ASSERT_NOT"):
        return _where(_around(_sequence(value[1], scopes), value, kind == "ASSERT"))
    if kind == "FAILURE":  # `(?!)`
        return lambda text, places: 0
    raise re.error(f"{kind.lower().replace('_', ' ')} is not supported")


def _compiled(state: Any, item: Any, scopes: tuple[tuple[int, int], ...]) -> re.Pattern[str]:
    """Compile one item of an expression as an expression of its own, with the flags of the enclosing groups."""
    parsed = _parser.SubPattern(state, [item])
    for add, remove in reversed(scopes):
        parsed = _parser.SubPattern(state, [(_parser.SUBPATTERN, (None, add, remove, parsed))])
    compiled: re.Pattern[str] = _compiler.compile(parsed)
    return compiled


def _character(fits: Callable[[str], bool]) -> Step:
    def run(text: _Run, places: int) -> int:
        return sum(2 << n for n, character in enumerate(text.text) if places >> n & 1 and fits(character))

    return run


def _where(holds: Callable[[_Run, int], bool]) -> Step:
    """Return a step that keeps the positions where a predicate holds."""
    return lambda text, places: sum(1 << n for n in range(len(text.text) + 1) if places >> n & 1 and holds(text, n))


def _test(pattern: re.Pattern[str]) -> Callable[[_Run, int], bool]:
    return lambda text, place: pattern.match(text.text, place) is not None


def _around(step: Step, value: Any, wanted: bool) -> Callable[[_Run, int], bool]:
    """Return the predicate of a lookahead or lookbehind assertion."""
    direction, parsed = value
    width = int(parsed.getwidth()[0]) if direction < 0 else 0

    def holds(text: _Run, place: int) -> bool:
        found = step(text, 1 << place - width) if place >= width else 0
        return bool(found) == wanted

    return holds


def _repeat(step: Step, least: int, most: int) -> Step:
    def run(text: _Run, places: int) -> int:
        for _ in range(least):
            before, places = places, step(text, places)
            if places in (0, before):
                break
        found = new = places
        for _ in range(most - least):
            if not new:
                break
            new = step(text, new) & ~found
            found |= new
        return found

    return run
