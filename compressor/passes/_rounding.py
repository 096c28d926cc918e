"""What all passes that round weights have in common: the formats on offer and the layers they are for."""

from collections.abc import Mapping
from typing import Annotated

import torch
from torch import Tensor

from compressor.model.architecture import check_pattern, fused_groups, matches
from compressor.registry import named, node
from compressor.types import Block, Format


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

    def __post_init__(self) -> None:
        if not self.options:
            raise ValueError("options: empty; name at least one format")
        for pattern in (*self.layers, *self.ignore):
            check_pattern(pattern)

    def units(self, block: Block) -> Mapping[str, tuple[str, ...]]:
        """Units of a block: layers that are fused when served are stored alike."""
        full = {name: f"{block.prefix}.{name}" for name in block.layers}
        return fused_groups(
            name for name in block.layers if matches(full[name], self.layers) and not matches(full[name], self.ignore)
        )


def relative(missed: Tensor, weight: Tensor) -> float:
    """Squared norm of an error over that of what it is an error of; zero for an all-zero weight."""
    part, whole = (float(torch.linalg.vector_norm(rows, dim=1).double().square().sum()) for rows in (missed, weight))
    return part / whole if whole else 0.0
