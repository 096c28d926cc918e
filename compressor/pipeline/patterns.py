"""Check that the patterns of layer names in a recipe match something in the model at hand.

A pattern given for this run only (on the command line, as an API argument, or by `--set`) that matches nothing is an error:
it is a typo, or a name from another architecture. A recipe file is written for many model families, so an unmatched pattern
there is only a warning, in the report and in the dry run.

* `layers` must match a linear layer of a decoder block: passes work on nothing else.
* `ignore` may also match any other module with parameters, such as the embedding or a norm: it is indeed left unchanged.
"""

import difflib
from collections.abc import Sequence

from compressor.errors import RecipeError
from compressor.model.architecture import matches
from compressor.model.source import ModelSource
from compressor.pipeline.contract import Pass
from compressor.reading import elide

ALWAYS = ("*", "lm_head")  # default patterns: the head is outside all blocks and left unchanged, whatever its name


def check_patterns(source: ModelSource, passes: Sequence[Pass], required: Sequence[str] = ()) -> list[str]:
    """Return a warning for each pattern of the passes that matches nothing.

    Args:
        source: The model in the shape in which its blocks are compressed.
        passes: Passes of the recipe.
        required: Patterns given for this run, which must match.

    Raises:
        RecipeError: a pattern in `required` matches nothing.
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
    """Return a hint with the names that the user may have meant."""
    if not pattern.startswith("re:") and any(matches(name, (f"{pattern}.*",)) for name in layers):
        return f"a pattern names layers, so write `{elide(pattern, 60)}.*`"
    inside = dict.fromkeys(name.removeprefix(prefix).partition(".")[2] for name in layers)
    leaves = dict.fromkeys(name.rpartition(".")[2] for name in inside)
    wanted = pattern.removeprefix("re:").strip("*.^$").removesuffix(".weight").lower()
    near = difflib.get_close_matches(wanted, [*leaves, *inside, *layers], n=3)
    if near:
        return f"did you mean {' or '.join(f'`{name}`' for name in near)}?"
    return elide(f"a block has {', '.join(leaves)}", 150)
