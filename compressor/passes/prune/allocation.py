"""Widths of each block by itself: the search (compressor/pipeline/search) among widths as it is done among bits.

Every part is made in a ladder of widths in one sweep; what the model predicts with a choice of them is compared with what it
predicts whole. The search begins with the shapes that are the same in every block, so it can only be better than those.
What is found is then made once more, each part behind the very ones that come before it.

Source: "Týr-the-Pruner", NeurIPS 2025, for a search among nested widths; allocation by successive integer programmes around
the choice at hand is compressor/pipeline/search/successive.py.
"""

from collections.abc import Collection, Mapping, Sequence

from compressor.formats.base import Kept
from compressor.model.source import ModelSource
from compressor.model.surgery.skip_sublayers import MLP
from compressor.passes.prune.prunable import find_all
from compressor.passes.prune.searching import searched
from compressor.passes.prune.shapes import Shape, multiple_of
from compressor.passes.prune.widths import Widths
from compressor.pipeline.prune_stage import Work
from compressor.pipeline.search.find import Contestant
from compressor.pipeline.search.fitness import Fitness
from compressor.recipe.schema import Search

WIDTHS = 8  # of a part, besides those of uniform shapes
REACH = 3  # how far they go down, in parts of what goes on average
LEAST = 1 / 8  # of the units, that stay in the narrowest


def ladders(
    source: ModelSource, found: Sequence[Shape], ratio: float, multiple: int | None, alone: Collection[str] = ()
) -> dict[str, list[int]]:
    """Numbers of units of every part that may lose some, by full name, that are tried.

    Args:
        source: The model.
        found: Uniform shapes.
        ratio: Share of the parameters that goes.
        multiple: Divisor of every number of channels; None takes what suits their number.
        alone: Kinds of parts that get numbers of their own in every block; others have those of the shapes only.
    """
    made, parts = {}, find_all(source)
    for name, (_, part) in parts.items():
        step = (multiple or multiple_of(part.count)) if part.name == MLP else 1
        more = _evenly(part.count, ratio, step) if part.name in alone else set()
        made[name] = sorted({*more, *(shape.keep[part.name] for shape in found)})
    return {name: counts for name, counts in made.items() if counts != [parts[name][1].count]}


def _evenly(count: int, ratio: float, step: int) -> set[int]:
    """From all units down, at nearly equal distances."""
    far = min(1 - LEAST, REACH * ratio) * count
    spaced = [count - far * i / (WIDTHS - 1) for i in range(1, WIDTHS)]
    return {count, *(min(count, max(1, round(kept / step)) * step) for kept in spaced)}


def allocated(
    work: Work, widths: Widths, found: Sequence[Shape], going: int, settings: Search, fitness: Fitness
) -> list[Contestant]:
    """Everything on the way to the best choice of widths that the search found.

    Args:
        work: The context, as for `searched`.
        widths: Widths of the parts, from `ladders`.
        found: Uniform shapes to begin with.
        going: Parameters that have to go.
        settings: How to search.
        fitness: Loss of a choice.
    """
    each = {name: part.parameters(block) for name, (block, part) in find_all(work.source).items()}
    costs = [[each[u.name] * o.keep for level in u.levels if isinstance(o := level.option, Kept)] for u in widths.units]
    ways = {called(shape.keep): widths.uniform(shape.keep) for shape in found}
    whole = sum(unit.weights for unit in widths.units)  # also of parts whose number is settled, and less than that
    return searched(work, fitness, ways, costs, whole - going, settings)


def called(keep: Mapping[str, int]) -> str:
    """The name of a uniform shape."""
    return ", ".join(f"{count} of {part}" for part, count in keep.items())
