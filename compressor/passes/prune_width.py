"""Narrower blocks: channels of the MLPs and groups of attention heads go, the same number in every block, and what adds up
the rest is fitted to the model's own outputs.

The result is of the same architecture with smaller numbers in its config, which stock software loads. Which units go, and the
fit, are in compressor/pruning/order.py; of the shapes that are small enough (compressor/pruning/shapes.py), the one is taken
with which the model's predictions stay nearest to what they were.
"""

from collections.abc import Sequence
from typing import Literal

from compressor.model.rewritten import Pruned
from compressor.pruning.allocation import allocated, ladders
from compressor.pruning.narrowing import Tried, WidthPass
from compressor.pruning.searching import compared
from compressor.pruning.shapes import Shape, going
from compressor.pruning.stage import Work
from compressor.pruning.widths import Way
from compressor.registry import node


@node
class PruneWidth(WidthPass):
    """Args as of `WidthPass`, and

    score: Which units go first: `obs` what they cost once the rest is fitted; wanda, flap, cfsp and magnitude look at each
        by itself.
    refit: Fit the rest to the model's own outputs; false only with scores.
    layout: `uniform`: every block has the same shape, which stock software reads; `per-layer`: every block gets widths of its
        own by search, which loses less and only our loader reads.
    search: How to search, too.
    """

    score: Literal["obs", "wanda", "flap", "cfsp", "magnitude"] = "obs"
    refit: bool = True
    layout: Literal["uniform", "per-layer"] = "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.refit and self.score == "obs":
            raise ValueError(
                "refit: `obs` chooses units by what they cost after the fit; name another score to do without it"
            )

    @property
    def uniform(self) -> bool:
        """Whether the layout is."""
        return self.layout == "uniform"

    def prune(self, work: Work) -> Pruned:
        """Narrow the model: first in more widths than it will have, then in the best of them by themselves."""
        if not self.ratio:
            return self.untouched(work)
        found, way = self.shapes(work.source), Way(self.score, self.refit, self.damp)
        tried = self.compared(work, way, found) if self.uniform else self._allocated(work, way, found)
        return self.narrowed(work, way, found, tried)

    def _allocated(self, work: Work, way: Way, found: Sequence[Shape]) -> list[Tried]:
        """Every choice of widths, block by block, on the way to the best one."""
        wanted = ladders(work.source, found, self.ratio, self.multiple, uniform=False)
        with self.made(work, way, wanted, "shapes") as widths, compared(work, widths, self.search) as fitness:
            ways = allocated(work, widths, found, going(work.source, self.ratio, self.of), self.search, fitness)
            return [Tried(one.name, widths.keep(one.choice), one.kl) for one in ways]


EXPORT = PruneWidth
