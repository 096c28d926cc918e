"""What will be done, as data, before a weight is read: every unit's option, every output tensor, the memory it takes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from compressor import registry
from compressor.errors import RecipeError
from compressor.model.checkpoint import Header
from compressor.model.source import ModelSource
from compressor.types import Block, Format, Option, Pass, Plan


def make_plan(source: ModelSource, passes: Sequence[Pass]) -> Plan:
    """The option of every unit.

    Raises:
        RecipeError: a layer's shape does not fit its format, nothing chooses among options, or no layer matches.
    """
    plan: dict[str, Option] = {}
    for step in passes:
        labels = [option.label for option in step.options]
        if len(labels) > 1:
            raise RecipeError(
                f"passes: {len(labels)} options ({', '.join(labels)}) and nothing that chooses among them; name one"
            )
        for index in range(len(source.layers)):
            block = source.block(index, load=False)
            for unit, layers in step.units(block).items():
                for name in layers:
                    _check_fit(step.options[0], block, name)
                if plan.setdefault(f"{block.prefix}.{unit}", step.options[0]) is not step.options[0]:
                    raise RecipeError(f"passes: two of them work on {block.prefix}.{unit}; keep them apart with `layers`")
    if not plan:
        known = ", ".join(source.block(0, load=False).layers)
        raise RecipeError(f"passes: their `layers` and `ignore` leave no layer to work on; a block has {known}")
    return plan


def _check_fit(option: Option, block: Block, name: str) -> None:
    if isinstance(option, Format):
        try:
            option.stored_bits(block.shape(name))
        except ValueError as error:
            widths = sorted({block.shape(layer)[1] for layer in block.layers})
            common = f"; every layer here is {' or '.join(map(str, widths))} wide, a multiple of {math.gcd(*widths)}"
            raise RecipeError(f"{block.prefix}.{name}: {error}{common if len(widths) > 1 else ''}") from error


def choose(step: Pass, block: Block, plan: Plan) -> Mapping[str, Any]:
    """The plan's option for each unit of a block that a pass works on."""
    return {unit: plan[f"{block.prefix}.{unit}"] for unit in step.units(block)}


def layer_formats(passes: Sequence[Pass], block: Block, plan: Plan) -> dict[str, Format]:
    """The format in which each layer of a block ends up, for those that are packed."""
    formats: dict[str, Format] = {}
    for step in passes:
        for unit, option in choose(step, block, plan).items():
            if isinstance(option, Format):
                formats |= dict.fromkeys(step.units(block)[unit], option)
    return formats


def model_formats(source: ModelSource, passes: Sequence[Pass], plan: Plan) -> dict[str, Format]:
    """The same for the whole model, by full layer name."""
    blocks = [source.block(index, load=False) for index in range(len(source.layers))]
    return {f"{b.prefix}.{name}": fmt for b in blocks for name, fmt in layer_formats(passes, b, plan).items()}


def output_headers(source: ModelSource, passes: Sequence[Pass], plan: Plan) -> dict[str, Header]:
    """Name, dtype and shape of every tensor of the result, in the order of writing."""
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
    return headers | {name: source.checkpoint.headers[name] for name in rest_names(source)}


def block_names(source: ModelSource, block: Block) -> dict[str, str]:
    """Parameters of a block: name inside it -> name in the checkpoint, in the checkpoint's order."""
    prefix = f"{block.prefix}."
    return {m.removeprefix(prefix): stored for m, stored in source.names.items() if m.startswith(prefix)}


def rest_names(source: ModelSource) -> list[str]:
    """Tensors of the checkpoint outside the blocks, and those that the model does not know."""
    inside = {stored for m, stored in source.names.items() if m.startswith(f"{source.prefix}.")}
    return [name for name in source.checkpoint if name not in inside]


def planned_bits(source: ModelSource, passes: Sequence[Pass], plan: Plan) -> tuple[int, int]:
    """Stored bits and number of weights of the layers that get packed."""
    bits = weights = 0
    for layer, fmt in model_formats(source, passes, plan).items():
        index, _, name = layer.removeprefix(f"{source.prefix}.").partition(".")
        shape = source.block(int(index), load=False).shape(name)
        bits, weights = bits + fmt.stored_bits(shape), weights + shape[0] * shape[1]
    return bits, weights


def describe_plan(plan: Plan) -> dict[str, Any]:
    """The plan as plan.yaml holds it."""
    return {unit: registry.describe(option) for unit, option in plan.items()}


def expected_memory(source: ModelSource, passes: Sequence[Pass], *, tokens: int, judged: int, batch: int) -> int:
    """Estimate of the peak resident bytes of a run, beyond the interpreter and its libraries: that of its largest stage.

    Args:
        source: The model.
        passes: Of the recipe.
        tokens: That calibration sends through; 0 without.
        judged: That the result is compared on; 0 without.
        batch: That go through a block together.
    """
    return max(_compressing(source, passes, tokens, batch), _judging(source, judged, batch) if judged else 0)


def _compressing(source: ModelSource, passes: Sequence[Pass], tokens: int, batch: int) -> int:
    """Peak of what comes before the comparison, in the dtype of computation."""
    block, size = source.block(0, load=False), source.dtype.itemsize
    shapes = {name: block.shape(name) for name in block.layers}
    read_first = {layers[0] for step in passes if step.needs for layers in step.units(block).values()}
    hessians = [shapes[layer][1] ** 2 for layer in read_first]
    solved = max(hessians, default=0)
    largest = max(rows * columns for rows, columns in shapes.values())
    outside = max((source.checkpoint.headers[name].nbytes for name in rest_names(source)), default=0)
    hidden = tokens * _hidden_size(source) * size
    kept = _parameters(block) * size + 8 * sum(hessians)
    return hidden + max(
        2 * outside,  # as stored, and as it is computed with
        kept + _activations(block, min(tokens, batch), size),  # collecting
        kept + (4 + 4 + 8) * solved,  # factorising: a Hessian, the same in visiting order, its factor in fp64
        kept + (4 + 4) * solved + 3 * 4 * largest,  # rounding: the Hessian, its factor, the weight thrice
    )


def _judging(source: ModelSource, tokens: int, batch: int) -> int:
    """Peak of the comparison: hidden states of both models in fp32, with a block, or with both heads and their logits."""
    block, once = source.block(0, load=False), min(tokens, batch)
    head = source.vocab_size * (_hidden_size(source) + once)
    return 2 * tokens * _hidden_size(source) * 4 + max(4 * _parameters(block) + _activations(block, once, 4), 2 * 4 * head)


def _activations(block: Block, tokens: int, size: int) -> int:
    """Bytes while tokens go through a gated MLP: three times its width, and once in fp32 for a statistic."""
    return tokens * max(max(block.shape(name)) for name in block.layers) * (3 * size + 4)


def _parameters(block: Block) -> int:
    return sum(parameter.numel() for parameter in block.module.parameters())


def _hidden_size(source: ModelSource) -> int:
    return int(source.model.config.get_text_config().hidden_size)
