"""Base class of width pruning passes: target size, choice of a shape, and the change to the checkpoint."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Annotated

from compressor.model.edited import Rewriting
from compressor.model.source import ModelSource
from compressor.passes.prune.allocation import called, ladders
from compressor.passes.prune.prunable import find_all
from compressor.passes.prune.searching import BRIEF, compared, comparing
from compressor.passes.prune.shapes import Of, Shape, going, parameters, shapes
from compressor.passes.prune.widths import Narrows, Widths, sweep
from compressor.pipeline.memory_estimate import collecting
from compressor.pipeline.prune_stage import ANEW, Pruned, PruningPass, Sketch, Work, named
from compressor.pipeline.search.levels import LevelDB
from compressor.recipe.registry import node, over
from compressor.recipe.schema import Search

SQUARES = 4 + 3 * 8  # bytes per element of a Hessian: one in fp32 as collected, and three such matrices in fp64


@dataclass(frozen=True)
class Tried:
    """A candidate choice of widths and its score.

    Args:
        name: Readable name.
        keep: Number of units kept of each part, by full name.
        kl: Divergence of its predictions from the model's, in nats per token. 0 if it is the only candidate.
    """

    name: str
    keep: Mapping[str, int]
    kl: float


@node
class WidthPass(PruningPass):
    """Base class of width pruning passes.

    Args:
        ratio: Fraction of the parameters to drop.
        of: Parameters that the ratio refers to: those of the entire model, embeddings included, of its blocks, or of their
            MLPs. With `mlp` only MLPs are pruned.
        heads: Also drop groups of heads where that loses less, which shrinks the key-value cache.
        multiple: Divisor of the number of channels. Null is 256 for wide models, down to 16 for small ones.
        damp: Damping of the refit, added to the diagonal of the second moments as a fraction of its mean.
        search: Settings of the search for the shape. `tokens` are in addition to calibration; `minutes` has no effect here.
    """

    ratio: float
    of: Of = "model"
    heads: bool = True
    multiple: int | None = None
    damp: float = 0.01
    search: Annotated[Search, over(BRIEF)] = BRIEF

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio: {self.ratio} is not from 0 up to, without, 1")
        if self.multiple is not None and self.multiple < 1:
            raise ValueError(f"multiple: {self.multiple} is not a positive number")
        if not 0 < self.damp < math.inf:
            raise ValueError(f"damp: {self.damp} is not a positive number")

    @property
    def label(self) -> str:
        """Return a label that is safe in file names."""
        return f"prune{100 * self.ratio:g}" if self.ratio else ""

    @property
    def alone(self) -> tuple[str, ...]:
        """Return the kinds of parts whose widths differ between blocks."""
        return ()

    @property
    def stock(self) -> bool:
        """Return whether the model class must support the number of heads."""
        return True

    def shapes(self, source: ModelSource) -> list[Shape]:
        """Return the uniform shapes that are small enough."""
        return shapes(source, self.ratio, self.of, heads=self.heads, multiple=self.multiple, stock=self.stock)

    def sketch(self, source: ModelSource) -> Sketch:
        """Predict the shapes: the largest ones that are small enough."""
        if not self.ratio:
            return Sketch(None)
        found, new, keep = self.shapes(source), {}, {}
        largest = max(found, key=lambda shape: shape.parameters)
        for name, (block, part) in find_all(source).items():
            keep[name] = largest.keep[part.name]
            for parameter, rows in part.rows.items():
                at = f"{block.prefix}.{parameter}"
                stored = source.names[at if at in source.names else f"{at}.weight"]
                new[stored] = (keep[name] * rows, *source.checkpoint.headers[stored].shape[1:])
            stored = source.names[f"{block.prefix}.{part.writer}.weight"]
            new[stored] = (source.checkpoint.headers[stored].shape[0], keep[name] * part.columns)
        most = parameters(source) - going(source, self.ratio, self.of) if self.alone else largest.parameters
        rewriting = replace(self.said(source, largest, keep), shapes=new)
        return Sketch(rewriting, len(found) == 1 and not self.alone, most - largest.parameters)

    def expected_memory(self, source: ModelSource, tokens: int, batch: int) -> int:
        """Return the peak memory in bytes of ranking and refitting (square matrices as wide as a writer) and of comparing."""
        if not self.ratio:
            return 0
        shape = max((block.shape(part.writer) for block, part in find_all(source).values()), key=lambda shape: shape[1])
        fitting = SQUARES * shape[1] ** 2 + 3 * 8 * math.prod(shape)
        several = bool(self.alone) or len(self.shapes(source)) > 1
        return max(collecting(source, tokens, batch) + fitting, comparing(source, self.search, batch) if several else 0)

    def said(self, source: ModelSource, shape: Shape, keep: Mapping[str, int]) -> Rewriting:
        """Return the change to the config that states how many units of each part are kept, by full name. A part that is not
        named keeps all its units.
        """
        return Rewriting({}, config=shape.config)

    def compared(self, work: Work, way: Narrows, found: Sequence[Shape]) -> list[Tried]:
        """Score the shapes, with units chosen in the given way. A single shape is not scored."""
        if len(found) == 1:
            keep = {name: found[0].keep[part.name] for name, (_, part) in find_all(work.source).items()}
            return [Tried(called(found[0].keep), keep, 0.0)]
        wanted = ladders(work.source, found, self.ratio, self.multiple)
        text = work.text(self.search.tokens)
        with self.made(work, way, wanted, "shapes") as widths, compared(work, widths, self.search, text) as fitness:
            choices = [widths.uniform(shape.keep) for shape in found]
            losses = fitness(choices, range(fitness.samples))
            return [Tried(called(s.keep), widths.keep(c), kl) for s, c, kl in zip(found, choices, losses, strict=True)]

    def untouched(self, work: Work) -> Pruned:
        """Return the result for ratio 0."""
        count = parameters(work.source)
        return Pruned(None, {"pass": named(self), "parameters": [count, count]})

    def narrowed(self, work: Work, way: Narrows, found: Sequence[Shape], tried: Sequence[Tried]) -> Pruned:
        """Apply the best candidate, with units chosen in the given way."""
        best, parts, before = nearest(tried), find_all(work.source), parameters(work.source)
        shape = next((shape for shape in found if called(shape.keep) == best.name), found[0])
        narrower = {part: count for part, count in best.keep.items() if count < parts[part][1].count}
        with self.made(work, way, {part: [count] for part, count in narrower.items()}, "widths") as widths:
            choice, said = tuple(0 for _ in widths.units), self.said(work.source, shape, narrower)
            rewriting = replace(widths.rewriting(choice), config=said.config, widths=said.widths, files=said.files)
            report = {
                "pass": named(self),
                "parameters": [before, parameters(work.source.rewritten(rewriting))],
                "keep": dict(best.keep if self.alone else shape.keep),
                "tried": [{"name": one.name, "kl": one.kl} for one in tried] if len(tried) > 1 else [],
                "parts": widths.describe(choice),
            }
            return Pruned(rewriting, report)

    @contextmanager
    def made(self, work: Work, way: Narrows, wanted: Mapping[str, Sequence[int]], name: str) -> Iterator[Widths]:
        """Compute every part in the wanted widths, with the directory locked, and yield them."""
        known = {**work.known, "widths": hashlib.sha256(repr((way, sorted(wanted.items()))).encode()).hexdigest()}
        levels = LevelDB(work.place / name, known, ANEW)
        with levels.open() if work.ranks.first else nullcontext():
            sweep(work.job, work.stream, way, wanted, levels, work.tell)
            yield Widths(work.source, levels)


def nearest(tried: Sequence[Tried]) -> Tried:
    """Return the candidate that loses least."""
    return min(tried, key=lambda one: one.kl)
