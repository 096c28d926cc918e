"""Base class of passes that round weights: the formats on offer and the layers they are for."""

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
    """Fields of every rounding pass.

    Args:
        options: The formats on offer; more than one leaves the choice to the plan.
        layers: Patterns of layer names to work on (`*.down_proj`, or `re:` and a regular expression).
        ignore: Patterns of layer names to leave as they are.
        search: Choose scales by least error; False takes them from the range of the weights.
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
        """Return the statistics of layers' inputs that are needed because of how some option rounds them."""
        return (Spread,) if any(isinstance(fmt, Contextual) and fmt.static_inputs for fmt in self.options) else ()

    def units(self, block: Block) -> Mapping[str, tuple[str, ...]]:
        """Units of a block: layers that are fused when served are stored alike."""
        return units(block, self.layers, self.ignore)

    def formats(self, block: Block, stats: Stats, choice: Mapping[str, Format | OneOf]) -> dict[str, tuple[Format, ...]]:
        """The formats that each layer of the chosen units may have: one, unless the pass chooses by itself."""
        units = self.units(block)
        found: dict[str, tuple[Format, ...]] = {}
        for unit, option in choice.items():
            offered = option.formats if isinstance(option, OneOf) else (option,)
            found |= dict.fromkeys(units[unit], tuple(_within(fmt, block, stats, units[unit]) for fmt in offered))
        return found


def units(block: Block, layers: Sequence[str], ignore: Sequence[str]) -> Mapping[str, tuple[str, ...]]:
    """The layers that some patterns name and others do not, those together that are fused when served."""
    full = {name: f"{block.prefix}.{name}" for name in block.layers}
    return fused_groups(name for name in block.layers if matches(full[name], layers) and not matches(full[name], ignore))


def _within(fmt: Format, block: Block, stats: Stats, layers: Sequence[str]) -> Format:
    """A format for layers that are fused."""
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
        block: Holds the layers.
        formats: One for each layer.
        fit: Makes the grid of a format for a weight, fp32 [O, I].

    Returns: errors are relative to the weights.
    """
    edits, errors = {}, {}
    for name, (fmt,) in formats.items():
        weight = block.weight(name).float()
        grid = fit(fmt, weight)
        edits[name] = grid.pack(grid.round(weight, 0))
        errors[name] = relative(edits[name].dequantize().sub_(weight), weight)
    return Outcome(edits, errors)


def relative(missed: Tensor, weight: Tensor) -> float:
    """Squared norm of an error over that of what it is an error of; zero for an all-zero weight."""
    part, whole = (float(torch.linalg.vector_norm(rows, dim=1).double().square().sum()) for rows in (missed, weight))
    return part / whole if whole else 0.0
