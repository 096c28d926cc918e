"""Tasks of our own, which need no network, and suites: names for lists of tasks.

knowledge   facts from memory, beside the answer, and in long texts
quick       facts from memory, and grammar
standard    all that needs no network
full        and the usual ones of the hub
"""

from collections.abc import Callable

from compressor.errors import RecipeError
from compressor.evaluation.tasks import arithmetic, facts, grammar
from compressor.evaluation.tasks.encode import Encoder
from compressor.evaluation.tasks.questions import Questions
from compressor.recipe.registry import suggestion

OWN: dict[str, Callable[[str, Encoder, int], Questions]] = {
    "facts-choice": lambda name, encoder, seed: facts.choices(name, seed),
    "facts-cloze": lambda name, encoder, seed: facts.from_memory(name),
    "facts-in-context": facts.in_context,
    "facts-long-25": lambda name, encoder, seed: facts.in_long_context(name, encoder, seed, 0.25),
    "facts-long-50": lambda name, encoder, seed: facts.in_long_context(name, encoder, seed, 0.5),
    "facts-long-100": lambda name, encoder, seed: facts.in_long_context(name, encoder, seed, 1.0),
    "grammar-pairs": lambda name, encoder, seed: grammar.pairs(name, seed),
    "arithmetic-sums": lambda name, encoder, seed: arithmetic.sums(name, seed),
}
MEMORY = ("facts-choice", "facts-cloze")
READING = ("facts-in-context", "facts-long-25", "facts-long-50", "facts-long-100")
HUB = ("arc_easy", "arc_challenge", "piqa", "hellaswag", "winogrande", "boolq", "mmlu", "lambada_openai", "gsm8k")
SUITES: dict[str, tuple[str, ...]] = {
    "knowledge": (*MEMORY, *READING),
    "quick": (*MEMORY, "grammar-pairs"),
    "standard": (*MEMORY, *READING, "grammar-pairs", "arithmetic-sums"),
    "full": (*MEMORY, *READING, "grammar-pairs", "arithmetic-sums", *HUB),
}


def tasks_of(suite: str) -> list[str]:
    """Names of a suite's tasks.

    Raises:
        RecipeError: no such suite.
    """
    if suite not in SUITES:
        raise RecipeError(f"suite: none is named `{suite}`; {suggestion(suite, list(SUITES))}")
    return list(SUITES[suite])
