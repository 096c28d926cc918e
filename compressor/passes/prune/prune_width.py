"""Narrower blocks: channels of the MLPs and groups of attention heads go, the same number in every block, and what adds up
the rest is fitted to the model's own outputs.

The result is of the same architecture with smaller numbers in its config, which stock software loads. Which units go, and the
fit, are in compressor/passes/prune/order.py; of the shapes that are small enough (compressor/passes/prune/shapes.py), the one
is taken with which the model's predictions stay nearest to what they were.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

from compressor.assets import DECILM_CODE
from compressor.errors import RecipeError
from compressor.model.edited import Rewriting
from compressor.model.hf_config import decilm
from compressor.model.source import ModelSource
from compressor.model.surgery.skip_sublayers import ATTENTION, MLP
from compressor.passes.prune.allocation import allocated, called, ladders
from compressor.passes.prune.prunable import find_all
from compressor.passes.prune.searching import compared
from compressor.passes.prune.shapes import Shape, going
from compressor.passes.prune.width_pass import Tried, WidthPass, nearest
from compressor.passes.prune.widths import Way
from compressor.pipeline.prune_stage import Pruned, Work
from compressor.recipe.registry import node


@node
class PruneWidth(WidthPass):
    """Args as of `WidthPass`, and

    score: Score that ranks units: `obs`, their cost once the rest is refitted; wanda, flap, cfsp and magnitude score each by
        itself.
    refit: Fit the rest to the model's own outputs; false only with scores.
    layout: `uniform`: every block has the same shape, which stock software reads; `per-layer`: every block gets widths of its
        own by search, which loses less and only our loader reads; `block-configs`: every MLP does, of a Llama, which vLLM and
        transformers read with trust_remote_code (compressor/model/hf_config/decilm.py).
    search: How to search, too.
    """

    score: Literal["obs", "wanda", "flap", "cfsp", "magnitude"] = "obs"
    refit: bool = True
    layout: Literal["uniform", "per-layer", "block-configs"] = "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score == "cfsp" and self.heads and self.of != "mlp":
            raise ValueError(
                "score: cfsp looks at channels of the MLP alone; set heads: false (--no-heads), or another score"
            )
        if not self.refit and self.score == "obs":
            raise ValueError(
                "refit: `obs` chooses units by what they cost after the fit; name another score to do without it"
            )

    @property
    def label(self) -> str:
        """File-name safe."""
        return super().label if self.layout == "uniform" or not self.ratio else f"{super().label}-{self.layout}"

    @property
    def alone(self) -> tuple[str, ...]:
        """Kinds of parts that get widths of their own in every block."""
        return {"uniform": (), "per-layer": (ATTENTION, MLP), "block-configs": (MLP,)}[self.layout]

    @property
    def stock(self) -> bool:
        """Whether the model type has to take the number of heads."""
        return self.layout != "per-layer"

    def said(self, source: ModelSource, shape: Shape, keep: Mapping[str, int]) -> Rewriting:
        """Return the change to the config that states how many units of each part are kept, by full name. A part that is not
        named keeps all its units.

        Raises:
            RecipeError: not of this model type.
        """
        if self.layout == "uniform":
            return super().said(source, shape, keep)
        if self.layout == "per-layer":
            return Rewriting({}, widths=keep)
        if source.raw_config["model_type"] != "llama":
            raise RecipeError(
                f"{source.path}: layout block-configs is for models of type `llama`, this one's is "
                f"`{source.raw_config['model_type']}`; take per-layer, which our loader reads, or uniform"
            )
        counts = [keep.get(name, part.count) for name, (_, part) in find_all(source).items() if part.name == MLP]
        config = {**shape.config, **decilm.changes({**source.raw_config, **shape.config}, counts)}
        return Rewriting({}, config=config, files={DECILM_CODE.name: DECILM_CODE})

    def prune(self, work: Work) -> Pruned:
        """Narrow the model: first in more widths than it will have, then in the best of them by themselves."""
        if not self.ratio:
            return self.untouched(work)
        found, way = self.shapes(work.source), Way(self.score, self.refit, self.damp)
        if self.layout == "block-configs":  # all have as many heads as in the best of the uniform shapes
            best = nearest(self.compared(work, way, found))
            found = [shape for shape in found if called(shape.keep) == best.name]
        tried = self._allocated(work, way, found) if self.alone else self.compared(work, way, found)
        return self.narrowed(work, way, found, tried)

    def _allocated(self, work: Work, way: Way, found: Sequence[Shape]) -> list[Tried]:
        """Every choice of widths, block by block, on the way to the best one."""
        wanted = ladders(work.source, found, self.ratio, self.multiple, self.alone)
        text = work.text(self.search.tokens)
        with self.made(work, way, wanted, "ladders") as widths, compared(work, widths, self.search, text) as fitness:
            ways = allocated(work, widths, found, going(work.source, self.ratio, self.of), self.search, fitness)
            return [Tried(one.name, widths.keep(one.choice), one.kl) for one in ways]


EXPORT = PruneWidth
