"""Check that the patterns of layer names in a recipe match something in the model at hand.

A pattern that was given for this one run (an option of the command line, an argument of the API, `--set`) and that matches
nothing is an error: it is a typo, or a name of another architecture. A recipe file is written for many families, so there
it is a warning, in the report and in the dry run.

* `layers` must match a linear layer of a decoder block: passes work on nothing else.
* `ignore` may also match any other module with parameters, such as the embedding or a norm: it does stay as it is.
"""

import difflib
from collections.abc import Sequence

from compressor.errors import RecipeError
from compressor.model.architecture import matches
from compressor.model.source import ModelSource
from compressor.pipeline.contract import Pass
from compressor.reading import elide

ALWAYS = ("*", "lm_head")  # defaults: whatever a model calls its head, it lies in no block and stays as it is


def check_patterns(source: ModelSource, passes: Sequence[Pass], required: Sequence[str] = ()) -> list[str]:
    """Return a warning for each pattern of the passes that matches nothing.

    Args:
        source: Model as it is when its blocks are compressed.
        passes: Passes of the recipe.
        required: Patterns that were given for this run, which must match.

    Raises:
        RecipeError: one of `required` matches nothing.
    """
    prefix = f"{source.prefix}."
    blocks = [source.block(index, load=False) for index in range(len(source.layers))]
    layers = [f"{block.prefix}.{name}" for block in blocks for name in block.layers]
    modules = [name for name, module in source.model.named_modules() if module._parameters]
    warnings: list[str] = []
    for step in passes:
        for key, names in (("layers", layers), ("ignore", [*layers, *modules])):
            for pattern in getattr(step, key, ()):
                if pattern in ALWAYS or any(matches(name, (pattern,)) for name in names):
                    continue
                message = f"{key} `{elide(pattern, 60)}`: matches no layer of the model; {_hint(pattern, layers, prefix)}"
                if pattern in required:
                    raise RecipeError(message)
                warnings.append(message)
    return list(dict.fromkeys(warnings))


def _hint(pattern: str, layers: Sequence[str], prefix: str) -> str:
    """Return the names that a pattern may have meant."""
    if not pattern.startswith("re:") and any(matches(name, (f"{pattern}.*",)) for name in layers):
        return f"a pattern names layers, so write `{elide(pattern, 60)}.*`"
    inside = dict.fromkeys(name.removeprefix(prefix).partition(".")[2] for name in layers)
    leaves = dict.fromkeys(name.rpartition(".")[2] for name in inside)
    wanted = pattern.removeprefix("re:").strip("*.^$").removesuffix(".weight").lower()
    near = difflib.get_close_matches(wanted, [*leaves, *inside, *layers], n=3)
    if near:
        return f"did you mean {' or '.join(f'`{name}`' for name in near)}?"
    return elide(f"a block has {', '.join(leaves)}", 150)
