"""Depth pruning: remove the blocks, or the attention and MLP layers, whose absence changes the model's predictions least.

If entire blocks are dropped, the result is of the same architecture, which stock software loads. Single attention and MLP
layers give the search more candidates, but only our loader supports the result. The search (successive integer programmes and
evolution, compressor/pipeline/search) starts from the better of two rules, which can also be used alone.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Literal

from torch import Tensor

from compressor.model.source import ModelSource
from compressor.passes.prune.depth import STAYS, Depth, Parts, even, least, turns
from compressor.passes.prune.searching import BRIEF, compared, comparing, searched
from compressor.passes.prune.shapes import going, parameters
from compressor.pipeline.memory_estimate import collecting
from compressor.pipeline.prune_stage import Pruned, PruningPass, Sketch, Work
from compressor.pipeline.search.find import Contestant
from compressor.recipe.registry import node, over
from compressor.recipe.schema import Search


@node
class PruneDepth(PruningPass):
    """Drop the blocks, or the attentions and MLPs, whose absence changes the model's predictions least.

    Args:
        ratio: Minimum fraction of the parameters to drop.
        of: Parameters that the ratio refers to: those of the entire model, embeddings included, or of its blocks.
        parts: Kind of unit to drop: `blocks`, or `sublayers` (single attentions and MLPs), which only our loader supports.
        by: Method of choice: `search`; `cosine`, the units that change their input least; `even`, evenly spaced units.
        search: Settings of the search; `minutes` has no effect here.
    """

    ratio: float
    of: Literal["model", "blocks"] = "model"
    parts: Parts = "blocks"
    by: Literal["search", "cosine", "even"] = "search"
    search: Annotated[Search, over(BRIEF)] = BRIEF

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio: {self.ratio} is not from 0 up to, without, 1")

    @property
    def label(self) -> str:
        """Return a label that is safe in file names."""
        return f"shorten{100 * self.ratio:g}" if self.ratio else ""

    def sketch(self, source: ModelSource) -> Sketch:
        """Predict the shapes from the evenly spaced choice that is small enough."""
        if not self.ratio:
            return Sketch(None)
        levels, wanted = Depth(source, self.parts), going(source, self.ratio, self.of)
        choice = levels.enough(wanted, lambda count: even(len(levels.units), count))
        gone = sum(unit.weights for unit, level in zip(levels.units, choice, strict=True) if level != STAYS)
        alike = len({unit.weights for unit in levels.units}) == 1
        return Sketch(levels.without(choice), alike, 0 if alike else gone - wanted)

    def expected_memory(self, source: ModelSource, tokens: int, batch: int) -> int:
        """Return the peak memory in bytes of measuring cosines and of comparing candidates."""
        turning = collecting(source, tokens, batch) if self.ratio and self.by != "even" else 0
        return max(turning, comparing(source, self.search, batch) if self.ratio and self.by == "search" else 0)

    def prune(self, work: Work) -> Pruned:
        """Drop blocks, or attentions and MLPs."""
        source, before = work.source, parameters(work.source)
        if not self.ratio:
            return Pruned(None, {"pass": "prune_depth", "parameters": [before, before]})
        levels, wanted = Depth(source, self.parts), going(source, self.ratio, self.of)
        text = work.text(self.search.tokens) if self.by == "search" else None
        ways = {"even": levels.enough(wanted, lambda count: even(len(levels.units), count))}
        if self.by != "even":
            turned = turns(work.job, work.stream(), self.parts, work.tell)
            ways["cosine"] = levels.enough(wanted, lambda count: least(turned, count))
        contestants = self._searched(work, levels, wanted, ways, text) if text is not None else []
        choice = min(contestants, key=lambda one: one.kl).choice if contestants else ways[self.by]
        rewriting = levels.without(choice)
        gone = [unit for unit, level in zip(levels.units, choice, strict=True) if level != STAYS]
        report = {
            "pass": "prune_depth",
            "parameters": [before, parameters(source.rewritten(rewriting))],
            "gone": [unit.block if self.parts == "blocks" else unit.name for unit in gone],
            "tried": [{"name": one.name, "kl": one.kl} for one in contestants],
        }
        return Pruned(rewriting, report)

    def _searched(
        self, work: Work, levels: Depth, wanted: int, ways: Mapping[str, tuple[int, ...]], text_NS: Tensor
    ) -> list[Contestant]:
        """Return the choices that the search went through."""
        costs = [[0, unit.weights] for unit in levels.units]
        limit = sum(unit.weights for unit in levels.units) - wanted
        with compared(work, levels, self.search, text_NS) as fitness:
            return searched(work, fitness, ways, costs, limit, replace(self.search, radii=(1,)))


EXPORT = PruneDepth
