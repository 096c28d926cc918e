"""What all passes that round weights have in common: the formats on offer and the layers they are for."""

from collections.abc import Callable, Mapping
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from compressor.model.architecture import check_pattern, fused_groups, matches
from compressor.registry import named, node
from compressor.types import Block, Format, Fusable, Grid, Outcome


@node
class WeightRounding:
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
    chooses: ClassVar[bool] = False
    together: ClassVar[bool] = False
    sensitivity: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.options:
            raise ValueError("options: empty; name at least one format")
        for pattern in (*self.layers, *self.ignore):
            check_pattern(pattern)

    @property
    def two_streams(self) -> bool:
        return False

    def units(self, block: Block) -> Mapping[str, tuple[str, ...]]:
        """Units of a block: layers that are fused when served are stored alike."""
        full = {name: f"{block.prefix}.{name}" for name in block.layers}
        return fused_groups(
            name for name in block.layers if matches(full[name], self.layers) and not matches(full[name], self.ignore)
        )

    def formats(self, block: Block, choice: Mapping[str, Format]) -> dict[str, Format]:
        """The format of each layer of the chosen units."""
        units = self.units(block)
        found: dict[str, Format] = {}
        for unit, fmt in choice.items():
            alike: Format = fmt
            if isinstance(fmt, Fusable):
                alike = fmt.beside(max(float(block.weight(name).abs().max()) for name in units[unit]))
            found |= dict.fromkeys(units[unit], alike)
        return found


def rounded(block: Block, formats: Mapping[str, Format], fit: Callable[[Format, Tensor], Grid]) -> Outcome:
    """Round layers to the nearest values of their grids.

    Args:
        block: Holds the layers.
        formats: By layer.
        fit: Makes the grid of a format for a weight, fp32 [O, I].

    Returns: errors are relative to the weights.
    """
    edits, errors = {}, {}
    for name, fmt in formats.items():
        weight = block.weight(name).float()
        grid = fit(fmt, weight)
        edits[name] = grid.pack(grid.round(weight, 0))
        errors[name] = relative(edits[name].dequantize().sub_(weight), weight)
    return Outcome(edits, errors)


def relative(missed: Tensor, weight: Tensor) -> float:
    """Squared norm of an error over that of what it is an error of; zero for an all-zero weight."""
    part, whole = (float(torch.linalg.vector_norm(rows, dim=1).double().square().sum()) for rows in (missed, weight))
    return part / whole if whole else 0.0
