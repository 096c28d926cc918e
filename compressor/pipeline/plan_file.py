"""plan.yaml: the option of each unit. Every run writes it next to the weights, and `--plan` reads it."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml

from compressor.access import check_readable
from compressor.errors import RecipeError
from compressor.formats.base import GONE, Format, Kept
from compressor.pipeline.contract import Pass, Plan, check_passes
from compressor.pipeline.plan import describe_plan, read_option
from compressor.reading import elide, read_yaml
from compressor.recipe.schema import Recipe


def to_text(plan: Plan) -> str:
    """Return the content of plan.yaml."""
    return str(yaml.safe_dump(describe_plan(plan), sort_keys=False))


def read_plan(path: Path) -> Plan:
    """Read the formats of a plan's units and the sub-layers to drop. Entries for the KV cache are left to the pass.

    Raises:
        RecipeError: the file cannot be read or is not a plan.
    """
    check_readable([path], RecipeError)
    data = read_yaml(path, RecipeError, "`compress search` writes such a file")
    if not isinstance(data, Mapping) or not data:
        raise RecipeError(f"{path}: not a plan; a plan maps units such as model.layers.0.mlp.down_proj to formats")
    return {unit: _option(spec, f"{path}: {elide(unit)}") for unit, spec in data.items() if not _is_cache(spec)}


def _is_cache(spec: Any) -> bool:
    return isinstance(spec, Mapping) and set(spec) == {"kv_cache"}


def _option(spec: Any, where: str) -> Format | Kept:
    if isinstance(spec, list):
        raise RecipeError(f"{where}: several formats, among which a pass would choose; name one")
    try:
        found = read_option(spec)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error
    if isinstance(found, Kept) and found != GONE:
        raise RecipeError(f"{where}: keeps {found.keep!r} of {found.of!r}; an attention or MLP that goes has keep: 0, of: 1")
    return found


def offering(recipe: Recipe, plan: Plan) -> Recipe:
    """Return the recipe for a plan: without a target, and with all formats of the plan among its passes' options.

    A format that no pass offers is added to the first pass that can take it.

    Raises:
        RecipeError: no pass can take a missing format.
    """
    check_passes(recipe.passes)
    recipe = replace(recipe, target=None)
    offered = {option for step in recipe.passes for option in step.offers}
    missing = [option for option in dict.fromkeys(plan.values()) if isinstance(option, Format) and option not in offered]
    if not missing:
        return recipe
    place = next((number for number, step in enumerate(recipe.passes) if _takes(step)), None)
    if place is None:
        raise RecipeError(f"plan: {missing[0].label} is offered by no pass of the recipe; add it to the `options` of one")
    used = [option for option in recipe.passes[place].offers if option in set(plan.values())]
    passes: Sequence[Pass] = [
        replace(step, options=(*used, *missing)) if number == place else step for number, step in enumerate(recipe.passes)
    ]
    return replace(recipe, passes=tuple(passes))


def _takes(step: Pass) -> bool:
    """Return whether formats can be added to a pass's `options`."""
    free = any(field.name == "options" for field in fields(step))
    return free and bool(step.offers) and not step.chooses and all(isinstance(option, Format) for option in step.offers)
