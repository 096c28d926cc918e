"""Hidden-size pruning: drop channels of the residual stream from every layer of the model that reads or writes them.

First the stream can be rotated into the basis of its principal components (compressor/passes/prune/basis.py), so that the
weakest components are dropped. Afterwards the layers that read it are refitted to what they read before
(compressor/passes/prune/readers.py). The result is of the same architecture with a smaller `hidden_size`, which stock
software loads.

Sources: Ashkboos et al., "SliceGPT", ICLR 2024; Muralidharan et al., "Compact Language Models via Pruning and Knowledge
Distillation", NeurIPS 2024, for `channels`. The fit is not theirs.
"""

import math
from dataclasses import replace

from compressor.passes.prune.basis import turned
from compressor.passes.prune.hidden_pass import HiddenPass
from compressor.passes.prune.readers import Refit
from compressor.pipeline.prune_stage import Pruned, Work
from compressor.recipe.registry import node


@node
class PruneHidden(HiddenPass):
    """Drop the weakest hidden channels. The other fields are those of `HiddenPass`.

    Args:
        refit: Refit the layers that read the hidden state.
        damp: Damping of the refit, added to the diagonal of the second moments as a fraction of its mean.
    """

    refit: bool = True
    damp: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.damp < math.inf:
            raise ValueError(f"damp: {self.damp} is not a positive number")

    def prune(self, work: Work) -> Pruned:
        """Change the basis, drop channels, and refit the rest."""
        if not self.ratio:
            return self.done(work, None)
        source, basis = work.source, turned(work, self.basis)
        whole = source.rewritten(basis.rewriting)
        residual = self.narrower(source, whole)
        keep_S = basis.strongest(residual.size)
        residual.check(keep_S)
        rewriting = basis.rewriting.then(residual.rewriting(keep_S))
        if self.refit:
            fit = Refit(work, whole, source.rewritten(rewriting), keep_S, basis.norms, self.damp)
            rewriting = replace(rewriting, tensors={**rewriting.tensors, **fit.tensors(self)})
        return self.done(work, rewriting)


EXPORT = PruneHidden
