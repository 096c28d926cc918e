"""Narrower blocks: channels of the MLPs and groups of attention heads go, the same number in every block, and what adds up
the rest is fitted to the model's own outputs.

The result is of the same architecture with smaller numbers in its config, which stock software loads. Which units go, and the
fit, are in compressor/pruning/order.py; of the shapes that are small enough (compressor/pruning/shapes.py), the one is taken
with which the model's predictions stay nearest to what they were.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Literal

from compressor.model.memory import available_memory
from compressor.model.rewritten import Pruned, Rewriting
from compressor.model.source import ModelSource
from compressor.pruning.parts import find_parts
from compressor.pruning.shapes import Of, Shape, parameters, shapes
from compressor.pruning.stage import PruningPass, Work
from compressor.pruning.widths import Way, Widths, sweep
from compressor.registry import node
from compressor.search.find import SHARE, fits_in_memory
from compressor.search.fitness import Fitness, opened
from compressor.search.levels import LevelDB


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
    tokens: That shapes are compared on, besides those of calibration.
    """

    ratio: float
    of: Of = "model"
    heads: bool = True
    multiple: int | None = None
    score: Literal["obs", "wanda", "flap", "cfsp", "magnitude"] = "obs"
    refit: bool = True
    damp: float = 0.01
    tokens: int = 16384

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio: {self.ratio} is not from 0 up to, without, 1")
        if self.multiple is not None and self.multiple < 1:
            raise ValueError(f"multiple: {self.multiple} is not a positive number")
        if self.damp <= 0:
            raise ValueError(f"damp: {self.damp} is not a positive number")
        if self.tokens < 1:
            raise ValueError(f"tokens: {self.tokens} is not a positive number")
        if not self.refit and self.score == "obs":
            raise ValueError(
                "refit: `obs` chooses units by what they cost after the fit; name another score to do without it"
            )

    @property
    def label(self) -> str:
        """File-name safe."""
        return f"prune{100 * self.ratio:g}" if self.ratio else ""

    def sketch(self, source: ModelSource) -> tuple[Rewriting | None, bool]:
        """The shapes of the first of those that are small enough, and whether it is the only one."""
        if not self.ratio:
            return None, True
        found = shapes(source, self.ratio, self.of, heads=self.heads, multiple=self.multiple)
        new: dict[str, tuple[int, ...]] = {}
        for block in (source.block(index, load=False) for index in range(len(source.layers))):
            for part in find_parts(source, block):
                keep = found[0].keep[part.name]
                for name, rows in part.rows.items():
                    at = f"{block.prefix}.{name}"
                    stored = source.names[at if at in source.names else f"{at}.weight"]
                    new[stored] = (keep * rows, *source.checkpoint.headers[stored].shape[1:])
                stored = source.names[f"{block.prefix}.{part.writer}.weight"]
                new[stored] = (source.checkpoint.headers[stored].shape[0], keep * part.columns)
        return Rewriting({}, config=found[0].config, shapes=new), len(found) == 1

    def prune(self, work: Work) -> Pruned:
        """Narrow the model: first in all shapes that are small enough, then in the best of them by itself."""
        before = parameters(work.source)
        if not self.ratio:
            return Pruned(None, {"pass": "prune_width", "parameters": [before, before]})
        found = shapes(work.source, self.ratio, self.of, heads=self.heads, multiple=self.multiple)
        losses = self._losses(work, found) if len(found) > 1 else [0.0]
        best = found[min(range(len(found)), key=losses.__getitem__)]
        with self._made(work, [best], "widths") as widths:
            choice = widths.uniform(best.keep)
            rewriting = replace(widths.rewriting(choice), config=best.config)
            tried = [{"keep": dict(shape.keep), "kl": kl} for shape, kl in zip(found, losses, strict=True)]
            report = {
                "pass": "prune_width",
                "parameters": [before, best.parameters],
                "keep": dict(best.keep),
                "tried": tried if len(tried) > 1 else [],
                "parts": widths.describe(choice),
            }
            return Pruned(rewriting, report)

    @contextmanager
    def _made(self, work: Work, found: Sequence[Shape], name: str) -> Iterator[Widths]:
        """Every part in the widths of some shapes, nobody else writing there."""
        way = Way(self.score, self.refit, self.damp)
        wanted = {part: sorted({shape.keep[part] for shape in found}) for part in found[0].keep}
        known = {**work.known, "widths": hashlib.sha256(repr((way, wanted)).encode()).hexdigest()}
        levels = LevelDB(work.place / name, known)
        with levels.open() if work.ranks.first else nullcontext():
            sweep(work.job, work.stream, way, wanted, levels, work.tell)
            yield Widths(work.source, levels)

    def _losses(self, work: Work, found: Sequence[Shape]) -> list[float]:
        """How far the predictions of each shape are from the model's, in nats per token."""
        text_NS, resident = work.text(self.tokens), fits_in_memory(work.job)
        kept = int(SHARE * available_memory(work.source.device)) if resident else 0
        with self._made(work, found, "shapes") as widths, opened(work.source, resident=resident) as model:
            fitness = Fitness(work.source, model, widths, text_NS, work.ranks, kept)
            return fitness([widths.uniform(shape.keep) for shape in found], range(len(text_NS)))


EXPORT = PruneWidth
