"""Base class of passes that scale channels: the model computes the same, but rounds with less error.

Shape suffixes: I in_features of the readers, W channels of the writer.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from compressor.errors import RecipeError
from compressor.formats.base import Format, Stored
from compressor.model.architecture import check_pattern, matches
from compressor.model.block import Block
from compressor.model.dataflow import Feed, find_feeds, rescaled
from compressor.pipeline.contract import Outcome, Pass, Stats
from compressor.recipe.registry import node


@node
class Scaling(Pass):
    """Base class of passes that scale channels.

    Args:
        layers: Patterns of the layers whose inputs to scale (`*.down_proj`, or `re:` and a regular expression).
        ignore: Patterns of layers whose inputs not to scale.
    """

    layers: tuple[str, ...] = ("*",)
    ignore: tuple[str, ...] = ()
    together: ClassVar[bool] = True
    rescales_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for pattern in (*self.layers, *self.ignore):
            check_pattern(pattern)

    def units(self, block: Block) -> Mapping[str, tuple[str, ...]]:
        """Return the layers whose inputs may be scaled, each as a unit of its own. There is nothing to plan."""
        full = {name: f"{block.prefix}.{name}" for name in block.layers}
        return {
            name: (name,)
            for name in block.layers
            if matches(full[name], self.layers) and not matches(full[name], self.ignore)
        }

    def apply(self, block: Block, stats: Stats, choice: Mapping[str, Format]) -> Outcome:
        wanted = self.units(block)
        found = [feed for feed in find_feeds(block, stats.inputs[0].shape[-1]) if wanted.keys() >= set(feed.readers)]
        if not found:
            raise RecipeError(
                f"{block.prefix}: no norm and no linear layer was found that can take up a scaling of what "
                f"{', '.join(wanted) or 'no layer'} read; leave the pass out"
            )
        edits: dict[str, Tensor] = {}
        for feed in found:
            weights = {name: edits.get(name, block.weight(name)).float() for name in feed.readers}
            edits |= rescaled(block, feed, self.factors(feed, weights, stats), edits)
        installed: dict[str, Stored] = dict(edits)
        return Outcome(installed, {})

    @abstractmethod
    def factors(self, feed: Feed, weights: Mapping[str, Tensor], stats: Stats) -> Tensor:
        """Return the factors that multiply the readers' channels and divide the writer's: positive, fp32 [W].

        Args:
            feed: The writer and its readers.
            weights: Weights of the readers, fp32 [O, I].
            stats: Statistics of the block.
        """
