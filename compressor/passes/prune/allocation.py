"""Per-block widths: the search for bits (compressor/pipeline/search), applied to widths.

One sweep computes every part in a ladder of widths. A choice of widths is scored by how far its predictions are from the
unpruned model's. The search starts from the uniform shapes, so the result is at least as good as those. The chosen widths are
then computed again, each part on the output of the final parts before it.

Source: "Týr-the-Pruner", NeurIPS 2025, for a search among nested widths. Allocation by successive integer programmes around
the current choice is compressor/pipeline/search/successive.py.
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

WIDTHS = 8  # number of widths of a part, in addition to those of uniform shapes
REACH = 3  # units dropped in the narrowest, relative to the average
LEAST = 1 / 8  # minimum fraction of units kept in the narrowest


def ladders(
    source: ModelSource, found: Sequence[Shape], ratio: float, multiple: int | None, alone: Collection[str] = ()
) -> dict[str, list[int]]:
    """Return the candidate numbers of units of every part that may lose some, by full name.

    Args:
        source: The model.
        found: Uniform shapes.
        ratio: Fraction of the parameters to drop.
        multiple: Divisor of every number of channels. None derives it from the number of channels.
        alone: Kinds of parts whose widths differ between blocks. Others get the widths of the uniform shapes only.
    """
    made, parts = {}, find_all(source)
    for name, (_, part) in parts.items():
        step = (multiple or multiple_of(part.count)) if part.name == MLP else 1
        more = _evenly(part.count, ratio, step) if part.name in alone else set()
        made[name] = sorted({*more, *(shape.keep[part.name] for shape in found)})
    return {name: counts for name, counts in made.items() if counts != [parts[name][1].count]}


def _evenly(count: int, ratio: float, step: int) -> set[int]:
    """Return numbers of units from all downwards, at nearly equal distances."""
    far = min(1 - LEAST, REACH * ratio) * count
    spaced = [count - far * i / (WIDTHS - 1) for i in range(1, WIDTHS)]
    return {count, *(min(count, max(1, round(kept / step)) * step) for kept in spaced)}


def allocated(
    work: Work, widths: Widths, found: Sequence[Shape], going: int, settings: Search, fitness: Fitness
) -> list[Contestant]:
    """Search per-block widths, and return the choices along the way.

    Args:
        work: Context, as in `searched`.
        widths: Computed widths of the parts, from `ladders`.
        found: Uniform shapes to start from.
        going: Number of parameters to drop.
        settings: Settings of the search.
        fitness: Loss of a choice.
    """
    each = {name: part.parameters(block) for name, (block, part) in find_all(work.source).items()}
    costs = [[each[u.name] * o.keep for level in u.levels if isinstance(o := level.option, Kept)] for u in widths.units]
    ways = {called(shape.keep): widths.uniform(shape.keep) for shape in found}
    whole = sum(unit.weights for unit in widths.units)  # in full, also of parts with a single, smaller width
    return searched(work, fitness, ways, costs, whole - going, settings)


def called(keep: Mapping[str, int]) -> str:
    """Return the name of a uniform shape."""
    return ", ".join(f"{count} of {part}" for part, count in keep.items())
