"""Width pruning: drop MLP channels and groups of attention heads, and refit output projections to the model's own outputs.

By default every block drops the same number. The result is then of the same architecture with smaller numbers in its config,
which stock software loads. For the choice of units and the refit see compressor/passes/prune/order.py. Of the shapes that are
small enough (compressor/passes/prune/shapes.py), the one that changes the model's predictions least is chosen.
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
    """Drop channels and groups of heads in one shot. The other fields are those of `WidthPass`.

    Args:
        score: Score that ranks units: `obs`, the cost of dropping a unit once the rest is refitted; or wanda, flap, cfsp or
            magnitude, which score each unit independently.
        refit: Refit the rest to the model's own outputs. False is possible with scores other than `obs` only.
        layout: Shape of the blocks. `uniform`: the same for every block, which stock software loads. `per-layer`: widths
            found by search for every block, which loses less, but only our loader supports it. `block-configs`: widths for
            every MLP of a Llama, which vLLM and transformers load with trust_remote_code
            (compressor/model/hf_config/decilm.py).
        search: Settings of the search for per-block widths too.
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
        """Return a label that is safe in file names."""
        return super().label if self.layout == "uniform" or not self.ratio else f"{super().label}-{self.layout}"

    @property
    def alone(self) -> tuple[str, ...]:
        """Return the kinds of parts whose widths differ between blocks."""
        return {"uniform": (), "per-layer": (ATTENTION, MLP), "block-configs": (MLP,)}[self.layout]

    @property
    def stock(self) -> bool:
        """Return whether the model class must support the number of heads."""
        return self.layout != "per-layer"

    def said(self, source: ModelSource, shape: Shape, keep: Mapping[str, int]) -> Rewriting:
        """Return the change to the config that states how many units of each part are kept, by full name. A part that is not
        named keeps all its units.

        Raises:
            RecipeError: The layout does not support this model type.
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
        """Prune in two sweeps: the first computes all candidate widths, the second only the best ones."""
        if not self.ratio:
            return self.untouched(work)
        found, way = self.shapes(work.source), Way(self.score, self.refit, self.damp)
        if self.layout == "block-configs":  # the number of heads is that of the best uniform shape
            best = nearest(self.compared(work, way, found))
            found = [shape for shape in found if called(shape.keep) == best.name]
        tried = self._allocated(work, way, found) if self.alone else self.compared(work, way, found)
        return self.narrowed(work, way, found, tried)

    def _allocated(self, work: Work, way: Way, found: Sequence[Shape]) -> list[Tried]:
        """Return the choices of per-block widths that the search went through."""
        wanted = ladders(work.source, found, self.ratio, self.multiple, self.alone)
        text = work.text(self.search.tokens)
        with self.made(work, way, wanted, "ladders") as widths, compared(work, widths, self.search, text) as fitness:
            ways = allocated(work, widths, found, going(work.source, self.ratio, self.of), self.search, fitness)
            return [Tried(one.name, widths.keep(one.choice), one.kl) for one in ways]


EXPORT = PruneWidth
