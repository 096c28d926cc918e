"""Narrower blocks: channels of the MLPs and groups of attention heads go, the same number in every block, and what adds up
the rest is fitted to the model's own outputs.

The result is of the same architecture with smaller numbers in its config, which stock software loads. Which units go, and the
fit, are in compressor/pruning/order.py; of the shapes that are small enough (compressor/pruning/shapes.py), the one is taken
with which the model's predictions stay nearest to what they were.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Literal

from compressor.forecast import collecting
from compressor.model.rewritten import Pruned, Rewriting
from compressor.model.source import ModelSource
from compressor.pruning.allocation import allocated, called, ladders
from compressor.pruning.parts import find_all
from compressor.pruning.searching import BRIEF, compared, comparing
from compressor.pruning.shapes import Of, Shape, going, parameters, shapes
from compressor.pruning.stage import PruningPass, Work
from compressor.pruning.widths import Way, Widths, sweep
from compressor.recipe import Search
from compressor.registry import node
from compressor.search.levels import LevelDB

SQUARES = 4 + 3 * 8  # bytes for each element of a Hessian: as collected, and three such matrices in fp64


@node
class PruneWidth(PruningPass):
    """Args:
    ratio: Share of the parameters that goes.
    of: What it counts: the whole model, embeddings included, its blocks, or their MLPs, which alone are then pruned.
    heads: Take away groups of heads too, where that loses less; their part of the key-value cache goes with them.
    multiple: Of which the number of channels stays one; null takes 256 for wide models, down to 16 for small ones.
    score: Which units go first: `obs` what they cost once the rest is fitted; wanda, flap, cfsp and magnitude look at each
        by itself.
    refit: Fit the rest to the model's own outputs; false only with scores.
    damp: Of the fit: added to the diagonal of the second moments, in parts of its mean.
    layout: `uniform`: every block has the same shape, which stock software reads; `per-layer`: every block gets widths of its
        own by search, which loses less and only our loader reads.
    search: How to search, and with `tokens` on how much text, besides that of calibration, shapes are compared;
        `minutes` is of no effect here.
    """

    ratio: float
    of: Of = "model"
    heads: bool = True
    multiple: int | None = None
    score: Literal["obs", "wanda", "flap", "cfsp", "magnitude"] = "obs"
    refit: bool = True
    damp: float = 0.01
    layout: Literal["uniform", "per-layer"] = "uniform"
    search: Search = BRIEF

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio: {self.ratio} is not from 0 up to, without, 1")
        if self.multiple is not None and self.multiple < 1:
            raise ValueError(f"multiple: {self.multiple} is not a positive number")
        if self.damp <= 0:
            raise ValueError(f"damp: {self.damp} is not a positive number")
        if not self.refit and self.score == "obs":
            raise ValueError(
                "refit: `obs` chooses units by what they cost after the fit; name another score to do without it"
            )

    @property
    def label(self) -> str:
        """File-name safe."""
        return f"prune{100 * self.ratio:g}" if self.ratio else ""

    def _shapes(self, source: ModelSource) -> list[Shape]:
        """Those that are the same in every block and small enough."""
        stock = self.layout == "uniform"
        return shapes(source, self.ratio, self.of, heads=self.heads, multiple=self.multiple, stock=stock)

    def sketch(self, source: ModelSource) -> tuple[Rewriting | None, bool]:
        """The first of the shapes that are small enough, and whether there is no other."""
        if not self.ratio:
            return None, True
        found, new, keep = self._shapes(source), {}, {}
        for name, (block, part) in find_all(source).items():
            keep[name] = found[0].keep[part.name]
            for parameter, rows in part.rows.items():
                at = f"{block.prefix}.{parameter}"
                stored = source.names[at if at in source.names else f"{at}.weight"]
                new[stored] = (keep[name] * rows, *source.checkpoint.headers[stored].shape[1:])
            stored = source.names[f"{block.prefix}.{part.writer}.weight"]
            new[stored] = (source.checkpoint.headers[stored].shape[0], keep[name] * part.columns)
        sure = len(found) == 1 and self.layout == "uniform"
        return replace(self._changed(found[0], keep), shapes=new), sure

    def expected_memory(self, source: ModelSource, tokens: int, batch: int) -> int:
        """Peak of orders and fits, which take some square matrices of the width of a writer, and of comparing shapes."""
        if not self.ratio:
            return 0
        shape = max((block.shape(part.writer) for block, part in find_all(source).values()), key=lambda shape: shape[1])
        fitting = SQUARES * shape[1] ** 2 + 3 * 8 * math.prod(shape)
        several = self.layout == "per-layer" or len(self._shapes(source)) > 1
        compared = comparing(source, self.search, batch) if several else 0
        return max(collecting(source, tokens, batch) + fitting, compared)

    def _changed(self, shape: Shape, keep: Mapping[str, int]) -> Rewriting:
        """What says that so many units of every part stay: the config, or more than that."""
        return Rewriting({}, config=shape.config) if self.layout == "uniform" else Rewriting({}, widths=keep)

    def prune(self, work: Work) -> Pruned:
        """Narrow the model: first in more widths than it will have, then in the best of them by themselves."""
        before = parameters(work.source)
        if not self.ratio:
            return Pruned(None, {"pass": "prune_width", "parameters": [before, before]})
        found = self._shapes(work.source)
        parts = find_all(work.source)
        each = [{name: shape.keep[part.name] for name, (_, part) in parts.items()} for shape in found]
        tried = [(called(shape.keep), keep, 0.0) for shape, keep in zip(found, each, strict=True)]
        if len(found) > 1 or self.layout == "per-layer":
            tried = self._tried(work, found)
        name, keep, _ = min(tried, key=lambda one: one[2])
        best = next((shape for shape in found if called(shape.keep) == name), found[0])
        narrower = {part: count for part, count in keep.items() if count < parts[part][1].count}
        with self._made(work, {part: [count] for part, count in narrower.items()}, "widths") as widths:
            choice, changed = tuple(0 for _ in widths.units), self._changed(best, narrower)
            rewriting = replace(widths.rewriting(choice), config=changed.config, widths=changed.widths)
            report = {
                "pass": "prune_width",
                "parameters": [before, parameters(work.source.rewritten(rewriting))],
                "keep": dict(best.keep) if self.layout == "uniform" else keep,
                "tried": [{"name": name, "kl": kl} for name, _, kl in tried] if len(tried) > 1 else [],
                "parts": widths.describe(choice),
            }
            return Pruned(rewriting, report)

    def _tried(self, work: Work, found: Sequence[Shape]) -> list[tuple[str, dict[str, int], float]]:
        """What was compared: its name, the units of each part, how far predictions are from the model's in nats per token."""
        wanted = ladders(work.source, found, self.ratio, self.multiple, uniform=self.layout == "uniform")
        with self._made(work, wanted, "shapes") as widths, compared(work, widths, self.search) as fitness:
            if self.layout == "per-layer":
                ways = allocated(work, widths, found, going(work.source, self.ratio, self.of), self.search, fitness)
                return [(one.name, widths.keep(one.choice), one.kl) for one in ways]
            choices = [widths.uniform(shape.keep) for shape in found]
            losses = fitness(choices, range(fitness.samples))
            return [(called(s.keep), widths.keep(c), kl) for s, c, kl in zip(found, choices, losses, strict=True)]

    @contextmanager
    def _made(self, work: Work, wanted: Mapping[str, Sequence[int]], name: str) -> Iterator[Widths]:
        """Every part in some widths, nobody else writing there."""
        way = Way(self.score, self.refit, self.damp)
        known = {**work.known, "widths": hashlib.sha256(repr((way, sorted(wanted.items()))).encode()).hexdigest()}
        levels = LevelDB(work.place / name, known)
        with levels.open() if work.ranks.first else nullcontext():
            sweep(work.job, work.stream, way, wanted, levels, work.tell)
            yield Widths(work.source, levels)


EXPORT = PruneWidth
