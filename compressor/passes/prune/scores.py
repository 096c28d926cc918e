"""Importance scores of single units from the literature. Units with the lowest scores are dropped first.

Shape suffixes: O out_features, I in_features (columns of the writer), U units.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from compressor.model.block import Block
from compressor.model.surgery.skip_sublayers import MLP
from compressor.passes.prune.prunable import Part, values
from compressor.pipeline.calibration.stats import Hessian, Mean
from compressor.pipeline.contract import Stats


@dataclass(frozen=True, slots=True)
class Seen:
    """A part, with its writer's weight and statistics of the writer's input."""

    block: Block
    part: Part
    w_OI: Tensor  # weight of the writer
    square_I: Tensor  # mean square of each column's input
    mean_I: Tensor

    @classmethod
    def of(cls, block: Block, part: Part, stats: Stats) -> "Seen":
        """Return the data of a part from statistics of the writer's input."""
        square_I = stats[part.writer, Hessian].value.diagonal()
        return cls(block, part, block.weight(part.writer).float(), square_I, stats[part.writer, Mean].value)

    def by_unit(self, score_I: Tensor) -> Tensor:
        """Sum over the columns of each unit [U]."""
        return score_I.view(self.part.count, -1).sum(1)


def magnitude(seen: Seen) -> Tensor:
    """Score by the squared weights of the writer."""
    return seen.by_unit(seen.w_OI.square().sum(0))


def wanda(seen: Seen) -> Tensor:
    """Score by the writer's weights times the norm of their input, summed over columns.

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024.
    """
    return seen.by_unit(seen.w_OI.abs().mean(0) * seen.square_I.sqrt())


def flap(seen: Seen) -> Tensor:
    """Score by the variance of a column's input times its squared weights.

    Source: An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models", AAAI 2024, equation 5.
    """
    variance_I = (seen.square_I - seen.mean_I.square()).clamp(min=0)
    return seen.by_unit(variance_I * seen.w_OI.square().sum(0))


def cfsp(seen: Seen) -> Tensor:
    """Score an MLP channel by its fractions of the three matrices, weighted by its activation.

    Fractions are taken over the channels that contribute to the same output of down_proj, or read the same input of the
    other two. Fractions within a channel would sum to the same for all. Source: Wang et al., "CFSP: An Efficient Structured
    Pruning Framework for LLMs with Coarse-to-Fine Activation Information", COLING 2025, the fine score.
    """
    assert seen.part.name == MLP
    norm_I, down_OI = seen.square_I.sqrt(), seen.w_OI.abs()
    share_I = (down_OI / down_OI.sum(1, keepdim=True)).mean(0) * norm_I
    for name in (name for name in seen.part.rows if name in seen.block.layers):
        before = values(seen.block, name).float().abs()
        share_I = share_I + (before / before.sum(0)).mean(1)
    return share_I * norm_I


SCORES: Mapping[str, Callable[[Seen], Tensor]] = {"magnitude": magnitude, "wanda": wanda, "flap": flap, "cfsp": cfsp}
