"""The basis in which hidden channels are dropped: the model's own, or the principal components of the residual stream.

Rotating the stream into its principal components does not change the model, and dropping the last channels then loses its
weakest components. The gains of its norms move into the layers that follow, as in the pass `rotate`.

Source: Ashkboos et al., "SliceGPT", ICLR 2024. Difference: one basis for the entire model, so that no matrix products are
needed between blocks.

Shape suffixes: D hidden.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from compressor.errors import RecipeError
from compressor.model.edited import Rewriting
from compressor.model.source import ModelSource
from compressor.passes.prune.readers import moment
from compressor.passes.prune.residual import hidden_size
from compressor.passes.transform.rotate import SAME, Changes, Norms, off, residual_norms
from compressor.passes.transform.rotation import Rotation
from compressor.pipeline.prune_stage import Work, read_tensors

Basis = Literal["pca", "channels"]
STRENGTH, VECTORS = "strength", "vectors"


@dataclass(frozen=True)
class Turned:
    """A model rotated into a basis.

    Args:
        rewriting: Change to the checkpoint that rotates it.
        norms: Norms of a block, with the layers that read them.
        strength_D: Mean square of each channel after the norms.
    """

    rewriting: Rewriting
    norms: Norms
    strength_D: Tensor

    def strongest(self, size: int) -> Tensor:
        """Return the strongest `size` channels, in ascending order."""
        return self.strength_D.argsort(descending=True, stable=True)[:size].sort().values


def apart(source: ModelSource, basis: Basis) -> Rewriting:
    """Return the change to names and shapes by a basis: with `pca` an embedding that is also the head is stored twice."""
    hidden_size(source)
    changes = Changes(source)
    if basis == "pca":
        changes.outside()
    return replace(changes.rewriting(), tensors={})


def turned(work: Work, basis: Basis) -> Turned:
    """Rotate the model into a basis.

    Raises:
        RecipeError: The architecture does not allow it.
    """
    source = work.source
    norms = residual_norms(source, hidden_size(source))
    if not norms:
        raise RecipeError(
            f"{source.path}: no layer of a `{source.raw_config['model_type']}` reads the hidden state through a norm, "
            "which would tell how strong its channels are; blocks may be narrowed with prune_width, or go with prune_depth"
        )
    if basis == "channels":
        file = work.once("channels", (), lambda _: {STRENGTH: moment(work, norms).diagonal()})
        return Turned(Rewriting({}), norms, read_tensors(file)[STRENGTH])
    try:
        return _components(work, norms)
    except RecipeError as error:
        raise RecipeError(f"the hidden state cannot be turned into another basis, set basis: channels ({error})") from error


def _components(work: Work, norms: Norms) -> Turned:
    """Rotate the model into the basis of principal components, the strongest first."""
    source, width = work.source, hidden_size(work.source)
    blocks = [source.block(index, load=False) for index in range(len(source.layers))]
    changes = Changes(source)
    changes.outside()
    for block in blocks:
        changes.fold(block, norms)
    _check(source, changes.rewriting(), width, None)
    folded = replace(work, source=source.rewritten(changes.rewriting()))
    found = read_tensors(work.once("components", (), lambda _: _eigen(moment(folded, norms))))
    turn = Rotation(torch.ones(width, dtype=torch.float64), (found[VECTORS],))
    changes.turn_outside(turn)
    for block in blocks:
        changes.residual(block, norms, turn)
    _check(source, changes.rewriting(), width, turn)
    return Turned(changes.rewriting(), norms, found[STRENGTH])


def _check(source: ModelSource, rewriting: Rewriting, width: int, turn: Rotation | None) -> None:
    """Check that the first block computes the same in another basis.

    Raises:
        RecipeError: It does not.
    """
    missed = off(source, rewriting, width, turn)
    if not missed <= SAME:
        raise RecipeError(
            f"a block of `{source.model.config.model_type}` is off by {missed:.0%} in it: a norm takes a mean, or stands "
            "where no linear layer reads it"
        )


def _eigen(moment_DD: Tensor) -> dict[str, Tensor]:
    """Return principal components, as columns, and their mean squares, the strongest first."""
    values_D, vectors_DD = torch.linalg.eigh(moment_DD)
    return {STRENGTH: values_D.flip(0), VECTORS: vectors_DD.flip(1)}
