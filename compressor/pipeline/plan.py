"""Plan a run before any weight is read: the option of every unit, and the name, dtype and shape of every output tensor."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from compressor.errors import RecipeError
from compressor.formats.base import Format, Kept, OneOf, Option, QuantizedTensor
from compressor.model.block import Block
from compressor.model.checkpoint import Header
from compressor.model.edited import Progress, silent
from compressor.model.source import ModelSource
from compressor.model.surgery.kv_cache import KEYS, SCALE_DTYPE, VALUES, CacheRounding, attentions
from compressor.pipeline.contract import Pass, Plan, check_passes
from compressor.recipe import registry


def rewritten(
    source: ModelSource, passes: Sequence[Pass], tell: Progress = silent, *, sizes_only: bool = False
) -> ModelSource:
    """Return the model after the pass that changes its checkpoint, if there is one. For the arguments see `Pass.rewriting`.

    Raises:
        RecipeError: such a pass is not the first or cannot be applied, or a pass that trains the model is not the last.
    """
    check_passes(passes)
    for number, step in enumerate(passes[:-1]):
        if step.trains_model:
            raise RecipeError(f"passes.{number}: it trains the whole model once all blocks are compressed; put it last")
    for number, step in enumerate(passes):
        if step.rewrites:
            if number:
                raise RecipeError(f"passes.{number}: it changes the whole model before any block is read; put it first")
            rewriting = step.rewriting(source, tell, sizes_only=sizes_only)
            return source.rewritten(rewriting)
    return source


def make_plan(source: ModelSource, passes: Sequence[Pass], given: Plan | None = None) -> Plan:
    """Return the option of every unit.

    Args:
        source: The model.
        passes: Passes of the recipe.
        given: Plan that selects one of several options per unit. Each pass then works on the units whose option it offers.

    Raises:
        RecipeError: a layer's shape does not fit its format, several options are left without a choice, no layer matches,
            two passes work on one unit, or the given plan does not suit the passes or the model.
    """
    plan: dict[str, Option] = {}
    for step in (step for step in passes if step.offers):
        for index in range(len(source.layers)):
            block = source.block(index, load=False)
            for unit, layers in step.units(block).items():
                full = f"{block.prefix}.{unit}"
                option = _option(step, block, layers) if given is None or step.chooses else _given(step, full, given)
                if option is None:
                    continue
                if given is not None:
                    for name in layers:
                        _check_fit(option, block, name)
                if plan.setdefault(full, option) is not option:
                    raise RecipeError(f"passes: two of them work on {full}; keep them apart with `layers`")
    if given is not None:
        _check_given(given, plan)
    if not plan and not any(step.prunes for step in passes):
        known = ", ".join(source.block(0, load=False).layers)
        raise RecipeError(f"passes: their `layers` and `ignore` leave no layer to work on; a block has {known}")
    if plan and all(isinstance(option, CacheRounding) for option in plan.values()):
        raise RecipeError("passes: kv_cache rounds no weight, and nothing else does; put `rtn` or `gptq` before it")
    return plan


def _given(step: Pass, unit: str, given: Plan) -> Option | None:
    """Return the option that a given plan assigns to a unit for a pass; None if another pass works on the unit."""
    if unit in given:
        return next((option for option in step.offers if option == given[unit]), None)
    if len(step.offers) == 1 and not isinstance(step.offers[0], Format):
        only: Option = step.offers[0]
        return only
    raise RecipeError(f"plan: has no entry for {unit}; it was made for another model or other passes")


def _check_given(given: Plan, plan: Plan) -> None:
    """Refuse a plan with a unit that no pass works on."""
    left = [unit for unit in given if unit not in plan]
    if left:
        raise RecipeError(
            f"plan: gives {left[0]} {given[left[0]].label}, which no pass of the recipe offers for it; add it to a pass's "
            "`options`, or see that the plan was made for this model"
        )


def _option(step: Pass, block: Block, layers: Sequence[str]) -> Option:
    """Return the option of a unit. If the pass chooses, return all options that can hold every layer of the unit."""
    fitting = able(step, block, layers)
    suited = [option for option in step.offers if step.suits(option, block, layers)]
    if not suited:
        found = sorted({str(block.dtypes[f"{name}.weight"]).removeprefix("torch.") for name in layers})
        raise RecipeError(
            f"{block.prefix}.{layers[0]}: stored as {' and '.join(found)}, for which the pass has no option among "
            f"{', '.join(option.label for option in step.offers)}"
        )
    if not fitting:
        for name in layers:
            _check_fit(suited[0], block, name)
    picked = _picked(step, fitting, block, layers) if len(step.offers) > 1 else None
    if picked is not None:
        return picked
    if len(suited) > 1 and not step.chooses:
        raise RecipeError(
            f"passes: {len(suited)} options ({', '.join(option.label for option in suited)}) and nothing that chooses among "
            "them; name one, give a `target` (compress fit), or --plan"
        )
    return OneOf(fitting) if step.chooses else suited[0]


def _picked(step: Pass, fitting: Sequence[Any], block: Block, layers: Sequence[str]) -> Option | None:
    """Return the option that a pass picks for a unit; None if it leaves the choice to the plan."""
    try:
        picked: Option | None = step.pick(fitting, block, layers)
    except ValueError as error:
        raise RecipeError(f"{block.prefix}.{layers[0]}: {error}") from error
    return picked


def able(step: Pass, block: Block, layers: Sequence[str]) -> tuple[Any, ...]:
    """Return the options of a pass that can hold all layers of a unit."""
    return tuple(
        option
        for option in step.offers
        if all(fits(option, block, name) for name in layers) and step.suits(option, block, layers)
    )


def fits(option: Option, block: Block, name: str) -> bool:
    """Return whether an option can hold a layer. An option that is not a format always can."""
    try:
        return not isinstance(option, Format) or option.stored_bits(block.shape(name)) > 0
    except ValueError:
        return False


def _check_fit(option: Option, block: Block, name: str) -> None:
    if isinstance(option, Format):
        try:
            option.stored_bits(block.shape(name))
        except ValueError as error:
            axis = str(error).partition(" ")[0]  # the axis that groups run along
            sizes = sorted({block.shape(layer)[axis == "in_features"] for layer in block.layers})
            across = "wide" if axis == "in_features" else "high"
            common = f"; every layer here is {' or '.join(map(str, sizes))} {across}, a multiple of {math.gcd(*sizes)}"
            raise RecipeError(f"{block.prefix}.{name}: {error}{common if len(sizes) > 1 else ''}") from error


def choose(step: Pass, block: Block, plan: Plan) -> Mapping[str, Any]:
    """Return the plan's option for each unit of a block that a pass works on; empty if the pass offers no options."""
    if not step.offers:
        return {}
    planned = {unit: plan[f"{block.prefix}.{unit}"] for unit in step.units(block) if f"{block.prefix}.{unit}" in plan}
    return {unit: option for unit, option in planned.items() if isinstance(option, OneOf) or option in step.offers}


def layer_formats(passes: Sequence[Pass], block: Block, plan: Plan) -> dict[str, Format]:
    """Return the format of each layer of a block that will be packed. Where a pass chooses, return the largest format."""
    formats: dict[str, Format] = {}
    for step in passes:
        units = step.units(block)
        for unit, option in choose(step, block, plan).items():
            if isinstance(option, OneOf):
                formats |= {name: option.largest(block.shape(name)) for name in units[unit]}
            elif isinstance(option, Format):
                formats |= dict.fromkeys(units[unit], option)
        chosen = [name for unit in choose(step, block, plan) for name in units[unit] if name in formats]
        formats |= step.shared(block, {name: formats[name] for name in chosen})
    return formats


def model_formats(source: ModelSource, passes: Sequence[Pass], plan: Plan) -> dict[str, Format]:
    """Return the format of each layer of the model that will be packed, by full layer name; see `layer_formats`."""
    blocks = [source.block(index, load=False) for index in range(len(source.layers))]
    return {f"{b.prefix}.{name}": fmt for b in blocks for name, fmt in layer_formats(passes, b, plan).items()}


def describe_stored(block: Block) -> dict[str, Any]:
    """Describe the format of each packed layer of a finished block, by full name, for the journal."""
    packed = {name: new.format for name, new in block.installed.items() if isinstance(new, QuantizedTensor)}
    return {f"{block.prefix}.{name}": registry.describe(packed[name]) for name in block.layers if name in packed}


def stored_formats(finished: Mapping[str, Mapping[str, Any]]) -> dict[str, Format]:
    """Return the format of each packed layer, by full name, from the journal's records of finished parts."""
    specs = {layer: spec for record in finished.values() for layer, spec in record.get("formats", {}).items()}
    distinct = {str(spec): spec for spec in specs.values()}
    built: dict[str, Format] = {key: registry.build("format", spec) for key, spec in distinct.items()}
    return {layer: built[str(spec)] for layer, spec in specs.items()}


def output_headers(source: ModelSource, passes: Sequence[Pass], plan: Plan) -> dict[str, Header]:
    """Return the name, dtype and shape of every tensor of the result, in the order of writing."""
    headers: dict[str, Header] = {}
    for index in range(len(source.layers)):
        block = source.block(index, load=False)
        formats = layer_formats(passes, block, plan)
        for name, stored in block_names(source, block).items():
            layer = name.removesuffix(".weight")
            if name.endswith(".weight") and layer in formats:
                base = stored.removesuffix(".weight")
                for part, (dtype, shape) in formats[layer].checkpoint_parts(block.shape(layer)).items():
                    headers[f"{base}.{part}"] = Header(dtype, shape)
            else:
                headers[stored] = source.checkpoint.headers[stored]
        for scale in (KEYS, VALUES):
            for module in cache_roundings(plan, block):
                headers[source.beside(f"{block.prefix}.{module}.{scale}")] = Header(SCALE_DTYPE, (1,))
    return headers | {name: source.checkpoint.headers[name] for name in rest_names(source, plan)}


def cache_roundings(plan: Plan, block: Block) -> dict[str, CacheRounding]:
    """Return the rounding of keys and values, by the name of the attention module inside a block."""
    planned = {name: plan.get(f"{block.prefix}.{name}") for name in attentions(block.module)}
    return {name: option for name, option in planned.items() if isinstance(option, CacheRounding)}


def block_names(source: ModelSource, block: Block) -> dict[str, str]:
    """Return the tensors of a block: name inside the block -> name in the checkpoint, in the checkpoint's order."""
    prefix = f"{block.prefix}."
    return {m.removeprefix(prefix): stored for m, stored in source.names.items() if m.startswith(prefix)}


def rest_names(source: ModelSource, plan: Plan) -> list[str]:
    """Return the names of tensors outside the blocks, including tensors that the model does not use.

    Scales of a quantized cache are left out if the plan makes new ones, because an engine could read either.
    """
    inside = {stored for m, stored in source.names.items() if m.startswith(f"{source.prefix}.")}
    if any(isinstance(option, CacheRounding) for option in plan.values()):
        inside |= source.unused.cache_scales
    return [name for name in source.checkpoint if name not in inside]


def total_bits(source: ModelSource, formats: Mapping[str, Format]) -> tuple[int, int]:
    """Return the stored bits and the number of weights of packed layers. `formats` is by full layer name."""
    bits = weights = 0
    for layer, fmt in formats.items():
        index, _, name = layer.removeprefix(f"{source.prefix}.").partition(".")
        shape = source.block(int(index), load=False).shape(name)
        bits, weights = bits + fmt.stored_bits(shape), weights + shape[0] * shape[1]
    return bits, weights


def describe_plan(plan: Plan) -> dict[str, Any]:
    """Return the plan as plain data. Where a pass chooses, list all formats that it may choose."""
    return {unit: describe_option(option) for unit, option in plan.items()}


def describe_option(option: Option) -> Any:
    """Return one option as plain data."""
    if isinstance(option, CacheRounding):
        return {"kv_cache": option.kv_cache}
    if isinstance(option, Kept):
        return asdict(option)
    return registry.describe(option.formats if isinstance(option, OneOf) else option)


def read_option(spec: Any) -> Format | Kept:
    """Invert `describe_option` for a format or a Kept.

    Raises:
        RecipeError: the data describes neither.
    """
    if isinstance(spec, Mapping) and set(spec) == {"keep", "of"}:
        return Kept(**spec)
    found: Format = registry.build("format", spec)
    return found


def settled(plan: Plan, source: ModelSource, passes: Sequence[Pass], stored: Mapping[str, Format]) -> Plan:
    """Return the plan with the formats that the passes chose.

    If the layers of a unit got different formats, they are listed one by one. `stored` is the format by full layer name.
    """
    layers_of = {
        f"{block.prefix}.{unit}": [f"{block.prefix}.{name}" for name in layers]
        for block in (source.block(index, load=False) for index in range(len(source.layers)))
        for step in passes
        for unit, layers in step.units(block).items()
    }
    found: dict[str, Option] = {}
    for unit, option in plan.items():
        taken = {layer: stored[layer] for layer in layers_of[unit]} if isinstance(option, OneOf) else {unit: option}
        found |= {unit: next(iter(taken.values()))} if len(set(taken.values())) == 1 else taken
    return found
