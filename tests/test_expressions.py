"""Expressions are matched as `re` matches them, and in bounded time where `re` would take hours."""

import random
import re
import time

import pytest

from compressor.errors import RecipeError
from compressor.model.architecture import check_pattern, matches
from compressor.recipe import expressions as module
from compressor.recipe.expressions import MAX_TOTAL, Expression, expressions

NAME = "model.layers.10.self_attn.q_proj"
NAMES = (NAME, "model.layers.0.mlp.up_proj", "lm_head", "", "aab", "aaab", "abcd", "q_proj\n", "Q_proj", "x\nq_proj")
PATTERNS_OF_ALL_KINDS = (
    *(r".*self_attn.*", r"(?i)Q_PROJ", r"(?!.*lm_head).*", r"^model\.layers\.(1|0)\..*(q|k)_proj$", r"(?<=q)_proj", r"\bq"),
    *(r"a{2,3}b", r"(a?){3}b", r"(?i:Q)_(?-i:p)", r"[^.]+\.[0-9]+", r"(?<!q)_proj", r"q_proj\Z", r"(a|ab)(c|bcd)(d*)"),
    *(r"x*?y", r"(?s:.)*$", r"(?m)^q", r"", r"(?!)", r"\d+$|^m", r"(?x) q _ proj # c", r"(?P<a>q)_", r"[\w.]+\Bo"),
)


@pytest.mark.parametrize("pattern", PATTERNS_OF_ALL_KINDS)
def test_answers_are_those_of_re(pattern: str) -> None:
    for name in NAMES:
        assert Expression(pattern).match(name) == bool(re.match(pattern, name))
        assert Expression(pattern).search(name) == bool(re.search(pattern, name))


def drawn(draw: random.Random, depth: int) -> str:
    """A random expression of every kind of item."""
    if depth == 0 or draw.random() < 0.2:
        return draw.choice(("a", "b", "[ab]", ".", "^", "$", r"\b", "[^a]"))
    inner, other = drawn(draw, depth - 1), drawn(draw, depth - 1)
    repeat = draw.choice(("*", "+", "?", "{2}", "{1,2}", "*?", "{0,3}"))
    kinds = (inner + other, f"({inner}|{other})", f"(?:{inner}){repeat}", f"(?={inner})", f"(?!{inner})", f"(?i:{inner})")
    return draw.choice(kinds)


def test_answers_to_random_expressions_are_those_of_re() -> None:
    draw = random.Random(0)
    for _ in range(1000):
        pattern, text = drawn(draw, 4), "".join(draw.choice("abA") for _ in range(draw.randrange(7)))
        found = Expression(pattern).match(text), Expression(pattern).search(text)
        assert found == (bool(re.match(pattern, text)), bool(re.search(pattern, text))), (pattern, text)


@pytest.mark.parametrize(
    "pattern", [r"([\w.]+)+!", r"(a|a|\w)*(.*)*!", r"((((.*)*)*)*)*!", r"(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)!"]
)
def test_an_expression_with_exponentially_many_ways_is_matched_at_once(pattern: str) -> None:
    started = time.process_time()
    assert not any(matches(f"{NAME}.{number}", [f"re:{pattern}"]) for number in range(100))
    assert time.process_time() - started < 2


def test_an_expression_that_takes_too_many_steps_is_refused_with_the_remedy() -> None:
    with pytest.raises(RecipeError, match="takes too many steps; write a shorter one, with fewer repeats"):
        Expression(".?" * 6000 + "!").search(NAME)


def test_expressions_of_a_file_share_their_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_FILE_STEPS", 1000)
    found = expressions(("(a|b)*x", "(a|c)*x"))
    with pytest.raises(RecipeError, match="too many steps"):
        for number in range(1000):
            found["(a|b)*x"].search(f"{NAME}{number}")
            found["(a|c)*x"].search(f"{NAME}{number}")


@pytest.mark.parametrize(
    "pattern", ["[", "(", "a{5,2}", "a{99999999999999}", r"(a)\1", "(?>a)", "a*+", "(" * 5000 + ")" * 5000, "a" * 20_001]
)
def test_what_cannot_be_matched_is_refused_when_it_is_read(pattern: str) -> None:
    with pytest.raises(ValueError, match="not a regular expression that can be matched"):
        check_pattern(f"re:{pattern}")


def test_expressions_of_a_file_are_bounded_together() -> None:
    with pytest.raises(ValueError, match=f"at most {MAX_TOTAL:,} are read"):
        expressions(f"{number:06}" + "a" * 994 for number in range(101))
