"""Sums, differences and products whose result is to be written: exact, and different for every seed."""

import random

from compressor.evaluation.tasks.questions import Questions, prompt

ASKED = 100
EXAMPLES = 4
MAX_TOKENS = 16


def sums(name: str, seed: int) -> Questions:
    """ASKED different questions, each after the same worked examples."""
    draw = random.Random(seed)
    found: dict[str, int] = {}
    while len(found) < EXAMPLES + ASKED:
        question, result = _sum(draw)
        found[question] = result
    texts = [(prompt(question), str(result)) for question, result in found.items()]
    examples = "".join(f"{asked} {result}\n\n" for asked, result in texts[:EXAMPLES])
    rows = [{"context": examples + asked, "target": result} for asked, result in texts[EXAMPLES:]]
    return Questions(name, "generation", rows, MAX_TOKENS)


def _sum(draw: random.Random) -> tuple[str, int]:
    sign = draw.choice("+-*")
    a, b = (draw.randint(2, 12), draw.randint(2, 12)) if sign == "*" else (draw.randint(10, 99), draw.randint(10, 99))
    if sign == "-" and b > a:
        a, b = b, a
    words = {"+": "plus", "-": "minus", "*": "times"}[sign]
    return f"What is {a} {words} {b}?", {"+": a + b, "-": a - b, "*": a * b}[sign]
