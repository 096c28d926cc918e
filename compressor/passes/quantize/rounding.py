"""Base class of passes that round weights: the formats on offer and the layers to round."""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

import torch
from torch import Tensor

from compressor.formats.base import Contextual, Format, Grid, OneOf
from compressor.formats.numerics.activations import Seen
from compressor.model.architecture import check_pattern, fused_groups, matches
from compressor.model.block import Block
from compressor.pipeline.calibration.stats import Spread
from compressor.pipeline.contract import Accumulator, Outcome, Pass, Stats
from compressor.recipe.registry import named, node


@node
class WeightRounding(Pass):
    """Base class of passes that round weights.

    Args:
        options: Formats on offer. With more than one, the plan chooses.
        layers: Patterns of layer names to round (`*.down_proj`, or `re:` and a regular expression).
        ignore: Patterns of layer names not to round.
        search: Choose scales by least error. False derives them from the range of the weights.
    """

    options: tuple[Annotated[Format, named("format")], ...]
    layers: tuple[str, ...] = ("*",)
    ignore: tuple[str, ...] = ("lm_head",)
    search: bool = True

    def __post_init__(self) -> None:
        if not self.options:
            raise ValueError("options: empty; name at least one format")
        for pattern in (*self.layers, *self.ignore):
            check_pattern(pattern)

    @property
    def offers(self) -> tuple[Format, ...]:
        return self.options

    @property
    def looks(self) -> tuple[type[Accumulator], ...]:
        """Return the statistics of layer inputs that options with static rounding of inputs need."""
        return (Spread,) if any(isinstance(fmt, Contextual) and fmt.static_inputs for fmt in self.options) else ()

    def units(self, block: Block) -> Mapping[str, tuple[str, ...]]:
        """Return the units of a block. Layers that are fused when served form one unit, since they need the same format."""
        return units(block, self.layers, self.ignore)

    def formats(self, block: Block, stats: Stats, choice: Mapping[str, Format | OneOf]) -> dict[str, tuple[Format, ...]]:
        """Return the formats on offer for each layer of the chosen units: one, unless the pass chooses itself."""
        units = self.units(block)
        found: dict[str, tuple[Format, ...]] = {}
        for unit, option in choice.items():
            offered = option.formats if isinstance(option, OneOf) else (option,)
            found |= dict.fromkeys(units[unit], tuple(_within(fmt, block, stats, units[unit]) for fmt in offered))
        return found


def units(block: Block, layers: Sequence[str], ignore: Sequence[str]) -> Mapping[str, tuple[str, ...]]:
    """Return the layers that match `layers` but not `ignore`, grouped by what is fused when served."""
    full = {name: f"{block.prefix}.{name}" for name in block.layers}
    return fused_groups(name for name in block.layers if matches(full[name], layers) and not matches(full[name], ignore))


def _within(fmt: Format, block: Block, stats: Stats, layers: Sequence[str]) -> Format:
    """Return a format adapted to fused layers: to their largest weight and, if needed, their input."""
    if not isinstance(fmt, Contextual):
        return fmt
    weights = [block.weight(name) for name in layers]
    seen = None
    if fmt.static_inputs:
        energy = torch.stack([w.float().square().sum(0) for w in weights]).sum(0)
        seen = Seen(stats[layers[0], Spread].value, energy)
    return fmt.within(max(float(w.abs().max()) for w in weights), seen)


def rounded(block: Block, formats: Mapping[str, tuple[Format, ...]], fit: Callable[[Format, Tensor], Grid]) -> Outcome:
    """Round layers to the nearest values of their grids.

    Args:
        block: Block with the layers.
        formats: One format for each layer.
        fit: Function that fits the grid of a format to a weight, fp32 [O, I].

    Returns:
        The packed weights, with errors relative to the weights.
    """
    edits, errors = {}, {}
    for name, (fmt,) in formats.items():
        weight = block.weight(name).float()
        grid = fit(fmt, weight)
        edits[name] = grid.pack(grid.round(weight, 0))
        errors[name] = relative(edits[name].dequantize().sub_(weight), weight)
    return Outcome(edits, errors)


def relative(missed: Tensor, weight: Tensor) -> float:
    """Return the squared norm of an error relative to that of the weight; zero for an all-zero weight."""
    part, whole = (float(torch.linalg.vector_norm(rows, dim=1).double().square().sum()) for rows in (missed, weight))
    return part / whole if whole else 0.0
