"""Base class of passes that drop hidden channels: number of channels, basis, and the new shapes."""

from typing import ClassVar, Literal

from compressor.model.edited import Rewriting
from compressor.model.source import ModelSource
from compressor.passes.prune.basis import Basis, apart
from compressor.passes.prune.residual import Residual, fitting
from compressor.passes.prune.shapes import going, parameters
from compressor.pipeline.memory_estimate import collecting, hidden_size
from compressor.pipeline.prune_stage import Pruned, PruningPass, Sketch, Work
from compressor.recipe.registry import node


@node
class HiddenPass(PruningPass):
    """Base class of passes that drop channels of the hidden state.

    Args:
        ratio: Minimum fraction of the parameters to drop.
        of: Parameters that the ratio refers to: those of the entire model, embeddings included, or of its blocks.
        basis: Basis in which channels are dropped: `pca`, principal components of the hidden state, or `channels`, the
            model's own. With `pca` an embedding that is also the head is stored twice.
        multiple: Divisor of the hidden size. Null is 256 for wide models, down to 16 for small ones.
    """

    ratio: float
    of: Literal["model", "blocks"] = "model"
    basis: Basis = "pca"
    multiple: int | None = None
    changes_hidden_basis: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio: {self.ratio} is not from 0 up to, without, 1")
        if self.multiple is not None and self.multiple < 1:
            raise ValueError(f"multiple: {self.multiple} is not a positive number")

    @property
    def label(self) -> str:
        """Return a label that is safe in file names."""
        return f"slim{100 * self.ratio:g}" if self.ratio else ""

    def sketch(self, source: ModelSource) -> Sketch:
        """Predict the shapes, which are exact."""
        if not self.ratio:
            return Sketch(None)
        twice = apart(source, self.basis)
        return Sketch(twice.then(self.narrower(source, source.rewritten(twice)).sketch))

    def expected_memory(self, source: ModelSource, tokens: int, batch: int) -> int:
        """Return the peak memory in bytes of the refit: two streams, a block of each, and moments of hidden states."""
        return 2 * collecting(source, tokens, batch) + 4 * 8 * hidden_size(source) ** 2 if self.ratio else 0

    def narrower(self, source: ModelSource, whole: ModelSource) -> Residual:
        """Return the widest stream that meets the ratio. The parameters of an embedding stored twice have to be saved too.

        Args:
            source: The model.
            whole: The model in the basis, before channels are dropped.
        """
        most = parameters(source, self.of) - going(source, self.ratio, self.of)
        return fitting(whole, most, self.of, self.multiple)

    def done(self, work: Work, rewriting: Rewriting | None, **more: object) -> Pruned:
        """Return the result of the pass, and its report."""
        before = parameters(work.source)
        name = type(self).__module__.rpartition(".")[2]
        if rewriting is None:
            return Pruned(None, {"pass": name, "parameters": [before, before]})
        after = parameters(work.source.rewritten(rewriting))
        keep = {"hidden": rewriting.config["hidden_size"]}
        return Pruned(rewriting, {"pass": name, "parameters": [before, after], "keep": keep, **more})
