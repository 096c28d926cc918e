"""Rotations of the residual stream and of each head's values, folded into the weights, so that no channel is an outlier.

    embedding E -> E R      writer W -> Rᵀ W      reader, head W -> W diag(g) R      g: the gains of the norm before, now 1

R is orthogonal, so a norm that subtracts no mean commutes with it: norm(x R) = norm(x) R. Its gains g must first move into
the layers that read it. In a head, the values are rotated by another matrix, which the output projection reverts. None of
this costs anything at run time. Inputs that are products (down_proj) can be rotated by an online Hadamard matrix only. This
package's runtime multiplies the activations by it (compressor/model/surgery/online_hadamard.py). The rotated model is
rounded to the checkpoint's dtype, as if it had been stored like that.

R is random, or learned from a random start: see compressor/passes/transform/learned_rotation.py.

Source: Ashkboos et al., "QuaRot", NeurIPS 2024, section 4, stage 1a to 1c; Liu et al., "SpinQuant", ICLR 2025 (R1, R2, R4).

An embedding that is also the head has to be stored twice afterwards: only the head absorbs the gains of the norm before it.

Shape suffixes: O out_features, I in_features, D hidden, S sequence.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import ClassVar

import torch
from torch import Tensor

from compressor.errors import RecipeError
from compressor.model.block import Block
from compressor.model.dataflow import Feed, gain_offset, products, run_norms, some_hidden
from compressor.model.edited import Progress, Rewriting, silent
from compressor.model.source import ModelSource
from compressor.model.surgery.online_hadamard import largest_block, turned
from compressor.passes.transform.learned_rotation import Vectors, batch, learned, some_vectors
from compressor.passes.transform.rotation import Rotation
from compressor.pipeline.contract import Pass
from compressor.recipe.registry import node

Change = Callable[[Tensor], Tensor]
Norms = Mapping[str, Sequence[str]]  # norm of a block -> layers that read it
SAME = 0.05  # largest relative difference of a block's output that is explained by rounding to the checkpoint's dtype


@node
class Rotate(Pass):
    """Rotate the model before its blocks are compressed. It must be the first pass.

    Args:
        residual: Rotate the residual stream. This folds the norms' gains into the layers that read them.
        heads: Rotate the values of each head.
        online: Rotate the inputs of the remaining layers, such as down_proj, at run time. Other runtimes cannot load such a
            model.
        block: Number of channels that one online rotation mixes, a power of two. 16 or 32 does not exceed the channels that
            share a scale in NVFP4 or MXFP4. 0 is the largest possible.
        learn: Number of steps to learn residual and head rotations that reduce outliers of the weights. 0 keeps them random.
        seed: Seed of the rotations.
    """

    residual: bool = True
    heads: bool = True
    online: bool = False
    block: int = 0
    learn: int = 0
    seed: int = 0
    rewrites: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.block < 0 or self.block & (self.block - 1):
            raise ValueError(f"block: {self.block} is no power of two; give 0 for the largest that a layer allows")
        if self.learn < 0:
            raise ValueError(f"learn: {self.learn} is no number of steps; give 0 for random rotations")

    def rewriting(self, source: ModelSource, tell: Progress = silent, *, sizes_only: bool = False) -> Rewriting:
        """Return the change to the checkpoint. The arguments are those of `Pass.rewriting`.

        Raises:
            RecipeError: The architecture does not allow it.
        """
        if self.learn:
            random = replace(self, learn=0).rewriting(source)  # refuses early what cannot be rotated
            if sizes_only:
                return random
        width = int(source.model.config.get_text_config().hidden_size)
        changes = Changes(source)
        norms = residual_norms(source, width)
        blocks = [source.block(index, load=False) for index in range(len(source.layers))]
        turn = self._residual(changes, blocks, norms, width, tell) if self.residual else None
        for block in blocks:
            heads = [feed for feed in products(block) if feed.run > 1]
            for feed in heads if self.heads else ():
                self._head(changes, block, feed)
            if self.online:
                readers = [*(norms.values() if self.residual else ()), *(feed.readers for feed in heads if self.heads)]
                offline = set(chain.from_iterable(readers))
                changes.online(block, [name for name in block.layers if name not in offline], self.block)
        if not changes.steps:
            raise RecipeError(f"rotate: nothing in {source.path} can be rotated as asked; leave the pass out")
        rewriting = changes.rewriting()
        check(source, rewriting, width, turn)
        return rewriting

    def _residual(self, changes: "Changes", blocks: Sequence[Block], norms: Norms, width: int, tell: Progress) -> Rotation:
        """Rotate the residual stream."""
        changes.outside()
        for block in blocks:
            changes.fold(block, norms)
        turn = Rotation.random(width, self.seed)
        if self.learn:
            turn = learned(turn, partial(changes.residual_vectors, blocks, norms, width), self.learn, tell)
        changes.turn_outside(turn)
        for block in blocks:
            changes.residual(block, norms, turn)
        return turn

    def _head(self, changes: "Changes", block: Block, feed: Feed) -> None:
        """Rotate the values of the heads of a block."""
        turn = Rotation.random(feed.run, self.seed + 1 + block.index)
        if self.learn:
            turn = learned(turn, changes.head_vectors(block, feed), self.learn)
        changes.head(block, feed, turn)


class Changes:
    """Changes to the tensors of a model, collected step by step.

    Args:
        source: Model to change.
    """

    def __init__(self, source: ModelSource) -> None:
        self.source = source
        self.steps: dict[str, list[Change]] = {}  # name in the checkpoint -> changes
        self.untied: dict[str, str] = {}
        self.hadamard: dict[str, int] = {}

    def rewriting(self) -> Rewriting:
        """Return all changes as one."""
        tensors = {name: partial(_in_turn, tuple(steps)) for name, steps in self.steps.items()}
        return Rewriting(tensors, self.untied, {"tie_word_embeddings": False} if self.untied else {}, self.hadamard)

    def outside(self) -> None:
        """Move the gains of the last norm into the head.

        Raises:
            RecipeError: The model has other tensors outside its blocks than embedding, head and one norm.
        """
        embedding, head = self.source.ends
        others = [name for name in self.source.outside if name not in (embedding, head)]
        if len(others) != 1 or not others[0].endswith(".weight"):
            raise RecipeError(
                f"rotate: {self.source.path} has {len(others)} tensors ({', '.join(others[:2])} …) outside its blocks "
                "besides embedding and head, where one norm is expected; set residual: false, or leave the pass out"
            )
        if head in self.source.tied or embedding in self.source.tied:
            stored = self.source.names.get(embedding) or self.source.names[head]
            self.untied = {name: stored for name in (embedding, head) if name not in self.source.names}
        norm = others[0].removesuffix(".weight")
        self._add(head, self._gain(norm))
        self._flatten(norm)

    def turn_outside(self, turn: Rotation) -> None:
        """Rotate the embedding and the head."""
        for name in self.source.ends:
            self._add(name, turn)

    def fold(self, block: Block, norms: Norms) -> None:
        """Move the gains of norms into the layers that read them."""
        for norm, readers in norms.items():
            for reader in readers:
                self._layer(block, reader, self._gain(f"{block.prefix}.{norm}"))
            self._flatten(f"{block.prefix}.{norm}")

    def residual(self, block: Block, norms: Norms, turn: Rotation) -> None:
        """Rotate the layers that read the residual stream through a norm, and those that write to it."""
        for reader in chain.from_iterable(norms.values()):
            self._layer(block, reader, turn)
        for name in residual_writers(block, norms, len(turn.signs_N)):
            self._writer(block, name, turn)

    def head(self, block: Block, feed: Feed, turn: Rotation) -> None:
        """Rotate the layer that writes the values of heads, and those that read their mixture."""
        self._writer(block, feed.writer, turn)
        for reader in feed.readers:
            self._layer(block, reader, turn)

    def online(self, block: Block, layers: Iterable[str], most: int) -> None:
        """Rotate the inputs of layers at run time, in blocks of at most `most` channels (0: no limit)."""
        for name in layers:
            size = largest_block(block.shape(name)[1])
            size = min(size, most) if most else size
            if size > 1:
                self._layer(block, name, partial(turned, size=size))
                self.hadamard[f"{block.prefix}.{name}"] = size

    def residual_vectors(self, blocks: Sequence[Block], norms: Norms, width: int, step: int) -> Tensor:
        """Return weight vectors [X, D] of one block: rows that read the residual stream and columns that write to it."""
        block = blocks[step % len(blocks)]
        read = [self._now(block, name) for name in chain.from_iterable(norms.values())]
        written = [self._now(block, name).T for name in residual_writers(block, norms, width)]
        return self._some(read + written, width, step)

    def head_vectors(self, block: Block, feed: Feed) -> Vectors:
        """Return a function that draws weight vectors [X, run] with which heads' values are written and read."""
        weights = [self._now(block, feed.writer).T, *(self._now(block, reader) for reader in feed.readers)]
        return partial(self._some, [weight.reshape(-1, feed.run) for weight in weights], feed.run)

    def _some(self, weights: Sequence[Tensor], size: int, seed: int) -> Tensor:
        """Draw vectors of several weights, the same number from each."""
        each = -(-batch(size) // len(weights))
        return torch.cat([some_vectors(weight, each, seed) for weight in weights]).to(self.source.device)

    def _now(self, block: Block, layer: str) -> Tensor:
        """Return the weight [O, I] of a layer after the changes so far, fp32."""
        name = f"{block.prefix}.{layer}.weight"
        stored = self.source.names[name]
        return block.layers[layer].parameter(_in_turn(self.steps.get(stored, ()), self.source.read(name).float()))

    def _writer(self, block: Block, layer: str, turn: Rotation) -> None:
        self._layer(block, layer, turn.transposed)
        if f"{layer}.bias" in block.dtypes:
            self._add(f"{block.prefix}.{layer}.bias", turn)

    def _layer(self, block: Block, layer: str, change: Change) -> None:
        """Add a change to a weight, which gets it as [O, I]."""
        kind = block.layers[layer]
        self._add(f"{block.prefix}.{layer}.weight", lambda w: kind.parameter(change(kind.parameter(w))))

    def _gain(self, norm: str) -> Change:
        """Return the change that multiplies columns by the gains of a norm."""
        return lambda w_OI: w_OI * (self.source.read(f"{norm}.weight").float() + self._offset(norm))

    def _flatten(self, norm: str) -> None:
        """Set the gains of a norm to one."""
        self._add(f"{norm}.weight", lambda gain_D: torch.full_like(gain_D, 1 - self._offset(norm)))

    def _offset(self, norm: str) -> float:
        return gain_offset(self.source.model.get_submodule(norm))

    def _add(self, name: str, change: Change) -> None:
        self.steps.setdefault(self.source.names.get(name, name), []).append(change)


def _in_turn(steps: Sequence[Change], tensor: Tensor) -> Tensor:
    for step in steps:
        tensor = step(tensor)
    return tensor


def residual_writers(block: Block, norms: Norms, width: int) -> list[str]:
    """Return the layers of a block that write to the residual stream."""
    readers = set(chain.from_iterable(norms.values()))
    return [name for name in block.layers if name not in readers and block.shape(name)[0] == width]


def residual_norms(source: ModelSource, width: int) -> Norms:
    """Return the norms of a block that are as wide as the residual stream, with the layers that read them."""
    block = source.block(0)
    norms, _ = run_norms(block, some_hidden(block, width))
    found = {norm: readers for norm, readers in norms.items() if len(block.module.get_parameter(f"{norm}.weight")) == width}
    source.release(block)
    return found


def check(source: ModelSource, rewriting: Rewriting, width: int, turn: Rotation | None) -> None:
    """Check that the first block still computes the same, up to the rotation.

    Raises:
        RecipeError: It does not.
    """
    missed = off(source, rewriting, width, turn)
    if not missed <= SAME:
        raise RecipeError(
            f"rotate: a block of `{source.model.config.model_type}` is off by {missed:.0%} when rotated: a norm in it takes "
            "a mean, or stands where no linear layer reads it; set residual: false, or leave the pass out"
        )


@torch.no_grad()
def off(source: ModelSource, rewriting: Rewriting, width: int, turn: Rotation | None) -> float:
    """Return the relative error of the rotated first block's output against the rotated original output."""
    outputs = []
    for changes, ahead in (((), None), ((rewriting,), turn)):
        one = ModelSource(source.path, source.device, torch.float32, (*source.rewritings, *changes))
        block = one.block(0)
        hidden = some_hidden(block, width)
        start = hidden if ahead is None else ahead(hidden.cpu()).to(hidden)
        outputs.append((block.forward(start) - start).cpu())
        one.release(block)
    expected = outputs[0] if turn is None else turn(outputs[0])
    return float((outputs[1] - expected).norm() / expected.norm())


EXPORT = Rotate
