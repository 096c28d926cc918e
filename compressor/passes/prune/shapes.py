"""Model shapes for a fraction of parameters to drop: the same for every block, so that stock software loads the result."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch

from compressor.errors import RecipeError, SourceError
from compressor.model.source import ModelSource, skeleton
from compressor.model.surgery.skip_sublayers import ATTENTION, MLP
from compressor.passes.prune.prunable import Part, find_parts

Of = Literal["model", "blocks", "mlp"]
MULTIPLES = (
    (8192, 256),
    (4096, 128),
    (1024, 64),
    (512, 32),
    (0, 16),
)  # from this number of channels on -> divisor of the number


@dataclass(frozen=True)
class Shape:
    """Number of units of each part kept in every block, and the resulting model size."""

    keep: Mapping[str, int]
    config: Mapping[str, Any]  # changed entries of config.json
    parameters: int  # of the entire model


def parameters(source: ModelSource, of: Of = "model", new: Mapping[str, tuple[int, ...]] = MappingProxyType({})) -> int:
    """Return the number of parameters of the model, of its blocks, or of their MLPs.

    Shapes in `new`, by name in the checkpoint, replace those of the checkpoint.
    """
    starts = {"model": ("",), "blocks": (f"{source.prefix}.",), "mlp": (f"{source.prefix}.",)}[of]
    names = {stored: name for name, stored in source.names.items() if name.startswith(starts)}
    counted = {stored for stored, name in names.items() if of != "mlp" or f".{MLP}." in name}
    return sum(math.prod(new.get(stored, source.checkpoint.headers[stored].shape)) for stored in counted)


def going(source: ModelSource, ratio: float, of: Of) -> int:
    """Return the number of parameters to drop."""
    return math.ceil(ratio * parameters(source, of))


def multiple_of(channels: int) -> int:
    """Return the default divisor for a number of channels."""
    return next(step for size, step in MULTIPLES if channels >= size)


def shapes(
    source: ModelSource, ratio: float, of: Of, *, heads: bool, multiple: int | None, stock: bool = True
) -> list[Shape]:
    """Return the largest allowed shape for each number of head groups, the most heads first.

    Args:
        source: The model.
        ratio: Fraction of the parameters to drop.
        of: Parameters that the ratio refers to.
        heads: Allow dropping groups of heads.
        multiple: Divisor of the number of channels. None derives it from the number of channels.
        stock: Require that the model class supports the shape. Otherwise the shape is not stated in the config.

    Raises:
        RecipeError: No shape is that small, or the model class supports none of them.
    """
    blocks = [source.block(index, load=False) for index in range(len(source.layers))]
    found = [find_parts(source, block) for block in blocks]
    counts = [{part.name: part.count for part in parts} for parts in found]
    if any(count != counts[0] for count in counts) or source.widths:
        raise RecipeError(
            f"{source.path}: its blocks have widths of their own; only models whose blocks are alike can be pruned"
        )
    attention, mlp = found[0]
    cost = {part.name: len(blocks) * part.parameters(blocks[0]) for part in (attention, mlp)}
    step = multiple or multiple_of(mlp.count)
    whole, wanted = parameters(source), going(source, ratio, of)
    allowed, refused, smallest = [], "", 0
    for groups in range(attention.count, 0, -1) if heads and of != "mlp" else [attention.count]:
        rest = wanted - (attention.count - groups) * cost[ATTENTION]
        channels = mlp.count if rest <= 0 else (mlp.count * cost[MLP] - rest) // cost[MLP] // step * step
        config = changes(source, attention, groups, max(channels, min(step, mlp.count))) if stock else {}
        try:
            skeleton(source.path, torch.float32, {**source.config_changes, **config})
        except SourceError as error:
            refused = str(error).rpartition(": ")[2]
            continue
        smallest = (attention.count - groups) * cost[ATTENTION] + (mlp.count - min(step, mlp.count)) * cost[MLP]
        if channels > 0:
            gone = (attention.count - groups) * cost[ATTENTION] + (mlp.count - channels) * cost[MLP]
            allowed.append(Shape({ATTENTION: groups, MLP: channels}, config, whole - gone))
        if rest <= 0:
            break
    if not allowed:
        most = math.floor(1000 * smallest / parameters(source, of)) / 1000
        raise RecipeError(
            f"prune_width: ratio {ratio:g} of the parameters of the {of} cannot be taken from width alone, the most is "
            f"{most} in steps of {step} channels; give a smaller ratio or multiple, or take blocks away too with prune_depth"
            + (f"; `{source.raw_config['model_type']}` takes no other number of heads: {refused}" if refused else "")
        )
    return allowed


def changes(source: ModelSource, attention: Part, groups: int, channels: int) -> dict[str, Any]:
    """Return the entries of config.json for a number of heads and channels."""
    found = {"intermediate_size": channels} if channels != source.raw_config["intermediate_size"] else {}
    if groups != attention.count:
        width = attention.rows[f"{ATTENTION}.k_proj"]
        repeats = attention.columns // width
        found |= {"num_attention_heads": groups * repeats, "num_key_value_heads": groups, "head_dim": width}
    return found
