"""A narrower residual stream: hidden channels go in the whole model at once, from every layer that reads or writes them.

Before that the stream can be turned into the basis of its principal components, so that what goes is what it is weakest in;
its norms' gains then move into the layers behind them, as in the pass `rotate`. Afterwards what reads the stream is fitted to
what it read before. The result is of the same architecture with a smaller `hidden_size`, which stock software loads.

Source: Ashkboos et al., "SliceGPT", ICLR 2024. What differs: one basis for the whole model, so that no matrix has to be
multiplied with between blocks; the fit.
"""

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from compressor.errors import RecipeError
from compressor.model.rewritten import Pruned, Rewriting
from compressor.model.source import ModelSource
from compressor.passes._rotation import Rotation
from compressor.passes.rotate import Changes, Norms, check, residual_norms
from compressor.pruning.readers import Refit, moment
from compressor.pruning.residual import Residual, fitting, hidden_size
from compressor.pruning.shapes import parameters
from compressor.pruning.stage import PruningPass, Work, read_tensors
from compressor.registry import node


@node
class PruneHidden(PruningPass):
    """Args:
    ratio: Share of the parameters that goes, at least.
    of: What it counts: the whole model, embeddings included, or its blocks.
    basis: In which channels go: `pca`, the stream's principal components; `channels`, as they are. An embedding that is the
        head too is stored twice after the former.
    multiple: Of which the hidden size stays one; null takes what suits it, 256 for wide models, down to 16 for small ones.
    refit: Fit what reads the stream to what it read.
    damp: Of the fit: added to the diagonal of the second moments, in parts of its mean.
    """

    ratio: float
    of: Literal["model", "blocks"] = "model"
    basis: Literal["pca", "channels"] = "pca"
    multiple: int | None = None
    refit: bool = True
    damp: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio: {self.ratio} is not from 0 up to, without, 1")
        if self.multiple is not None and self.multiple < 1:
            raise ValueError(f"multiple: {self.multiple} is not a positive number")
        if self.damp <= 0:
            raise ValueError(f"damp: {self.damp} is not a positive number")

    @property
    def label(self) -> str:
        """File-name safe."""
        return f"slim{100 * self.ratio:g}" if self.ratio else ""

    def sketch(self, source: ModelSource) -> tuple[Rewriting | None, bool]:
        """The shapes as they will be."""
        if not self.ratio:
            return None, True
        changes = Changes(source)
        if self.basis == "pca":
            changes.outside()
        apart = changes.rewriting()
        return apart.then(self._fitting(source, source.rewritten(apart)).sketch), True

    def prune(self, work: Work) -> Pruned:
        """Choose a basis, take channels away, fit the rest."""
        source, before = work.source, parameters(work.source)
        if not self.ratio:
            return Pruned(None, {"pass": "prune_hidden", "parameters": [before, before]})
        norms = residual_norms(source, hidden_size(source))
        if not norms:
            raise RecipeError(
                f"{source.path}: no layer of a `{source.raw_config['model_type']}` reads the hidden state through a norm, "
                "which would tell how strong its channels are; take from the blocks with prune_width or prune_depth"
            )
        turned = self._basis(work, norms) if self.basis == "pca" else Rewriting({})
        whole = source.rewritten(turned)
        residual = self._fitting(source, whole)
        keep_S = torch.arange(residual.size)
        if self.basis == "channels":
            seen = read_tensors(work.once("moment", self, lambda _: {"moment": moment(work, norms)}))["moment"].diagonal()
            keep_S = seen.argsort(descending=True, stable=True)[: residual.size].sort().values
        residual.check(keep_S)
        rewriting = turned.then(residual.rewriting(keep_S))
        if self.refit:
            fit = Refit(work, whole, source.rewritten(rewriting), keep_S, norms, self.damp)
            rewriting = replace(rewriting, tensors={**rewriting.tensors, **fit.tensors(self)})
        after = parameters(source.rewritten(rewriting))
        return Pruned(rewriting, {"pass": "prune_hidden", "parameters": [before, after], "keep": {"hidden": residual.size}})

    def _fitting(self, source: ModelSource, turned: ModelSource) -> Residual:
        """The widest stream that is narrow enough; what an embedding stored twice adds has to go too."""
        most = parameters(source, self.of) - math.ceil(self.ratio * parameters(source, self.of))
        return fitting(turned, most, self.of, self.multiple)

    def _basis(self, work: Work, norms: Norms) -> Rewriting:
        """The model with its stream in the basis of its principal components, the strongest first.

        Raises:
            RecipeError: the architecture does not allow it.
        """
        source, width = work.source, hidden_size(work.source)
        changes = Changes(source)
        blocks = [source.block(index, load=False) for index in range(len(source.layers))]
        try:
            changes.outside()
            for block in blocks:
                changes.fold(block, norms)
            check(source, changes.rewriting(), width, None)
            folded = replace(work, source=source.rewritten(changes.rewriting()))
            file = work.once("basis", self, lambda _: {"basis": components(moment(folded, norms))})
            turn = Rotation(torch.ones(width, dtype=torch.float64), (read_tensors(file)["basis"],))
            changes.turn_outside(turn)
            for block in blocks:
                changes.residual(block, norms, turn)
            check(source, changes.rewriting(), width, turn)
        except RecipeError as error:
            raise RecipeError(f"prune_hidden: the stream cannot be turned, set basis: channels ({error})") from error
        return changes.rewriting()


def components(moment_DD: Tensor) -> Tensor:
    """Principal components, as columns [D, D], the strongest first."""
    vectors_DD: Tensor = torch.linalg.eigh(moment_DD).eigenvectors.flip(1)
    return vectors_DD


EXPORT = PruneHidden
