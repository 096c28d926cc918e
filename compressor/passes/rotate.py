"""Rotations: turn the residual stream, and each head's values, so that no channel stands out, and fold that into the weights.

    embedding E -> E R      writer W -> Rᵀ W      reader, head W -> W diag(g) R      g: the gains of the norm before, now 1

R is orthogonal, so a norm without a mean computes the same from x R as from x, once its gains g have moved into the layers
that read it. In a head, values are written turned by another rotation that the output projection takes back. Nothing is left
to do at run time. The rotated model is rounded to the checkpoint's dtype, as if it had been stored so.

Source: Ashkboos et al., "QuaRot", NeurIPS 2024, section 4, stage 1a and 1b without the online parts; Liu et al., "SpinQuant",
ICLR 2025 (R1 and R2).

An embedding that is also the head has to be stored twice afterwards: only the head takes up the gains of the norm before it.

Shape suffixes: O out_features, I in_features, D hidden, S sequence.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from compressor.errors import RecipeError
from compressor.model.feeds import Feed, gain_offset, products, run_norms, some_hidden
from compressor.model.rewritten import Rewriting
from compressor.model.source import ModelSource
from compressor.passes._rotation import Rotation
from compressor.registry import node
from compressor.types import Accumulator, Block, Format, Outcome, Stats

Change = Callable[[Tensor], Tensor]
SAME = 0.05  # relative difference of a block's output that rounding to the checkpoint's dtype can make


@node
class Rotate:
    """Rotate the model before its blocks are compressed; to be the first pass.

    Args:
        residual: Rotate the residual stream, which folds the norms' gains into the layers that read them.
        heads: Rotate the values of each head.
        seed: Of the rotations.
    """

    residual: bool = True
    heads: bool = True
    seed: int = 0
    needs: ClassVar[tuple[type[Accumulator], ...]] = ()
    options: ClassVar[tuple[Format, ...]] = ()
    chooses: ClassVar[bool] = False
    two_streams: ClassVar[bool] = False
    together: ClassVar[bool] = False
    sensitivity: ClassVar[bool] = False

    def units(self, block: Block) -> Mapping[str, tuple[str, ...]]:
        """None: a block is rotated already when it is read."""
        return {}

    def apply(self, block: Block, stats: Stats, choice: Mapping[str, Format]) -> Outcome:
        return Outcome({}, {})

    def rewriting(self, source: ModelSource) -> Rewriting:
        """What is different in the rotated model.

        Raises:
            RecipeError: the architecture does not allow it.
        """
        width = int(source.model.config.get_text_config().hidden_size)
        changes = Changes(source)
        turn = Rotation.random(width, self.seed) if self.residual else None
        if turn is not None:
            changes.outside(turn)
        norms = residual_norms(source, width)
        for index in range(len(source.layers)):
            block = source.block(index, load=False)
            for feed in (feed for feed in products(block) if self.heads and feed.run > 1):
                changes.head(block, feed, Rotation.random(feed.run, self.seed + 1 + index))
            if turn is not None:
                changes.residual(block, norms, turn)
        if not changes.steps:
            raise RecipeError(f"rotate: nothing in {source.path} can be rotated as asked; leave the pass out")
        rewriting = changes.rewriting()
        check(source, rewriting, width, turn)
        return rewriting


class Changes:
    """What happens to each tensor of a model, step by step.

    Args:
        source: The model.
    """

    def __init__(self, source: ModelSource) -> None:
        self.source = source
        self.steps: dict[str, list[Change]] = {}  # by name on disk
        self.untied: dict[str, str] = {}

    def rewriting(self) -> Rewriting:
        """All of them."""
        tensors = {name: partial(_in_turn, tuple(steps)) for name, steps in self.steps.items()}
        return Rewriting(tensors, self.untied, {"tie_word_embeddings": False} if self.untied else {})

    def outside(self, turn: Rotation) -> None:
        """The embedding, the last norm and the head.

        Raises:
            RecipeError: there is something else.
        """
        model, names = self.source.model, {module: name for name, module in self.source.model.named_modules()}
        embedding, head = (f"{names[m]}.weight" for m in (model.get_input_embeddings(), model.get_output_embeddings()))
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
        self._add(embedding, turn)
        self._add(head, self._gain(norm))
        self._add(head, turn)
        self._flatten(norm)

    def residual(self, block: Block, norms: Mapping[str, Sequence[str]], turn: Rotation) -> None:
        """What reads the residual stream through a norm, and what writes to it."""
        readers = {reader for readers in norms.values() for reader in readers}
        for norm, readers_of in norms.items():
            for reader in readers_of:
                self._layer(block, reader, self._gain(f"{block.prefix}.{norm}"))
                self._layer(block, reader, turn)
            self._flatten(f"{block.prefix}.{norm}")
        for name in block.layers:
            if name not in readers and block.shape(name)[0] == len(turn.signs_N):
                self._writer(block, name, turn)

    def head(self, block: Block, feed: Feed, turn: Rotation) -> None:
        """What writes the values of heads, and what reads the mixture of them."""
        self._writer(block, feed.writer, turn)
        for reader in feed.readers:
            self._layer(block, reader, turn)

    def _writer(self, block: Block, layer: str, turn: Rotation) -> None:
        self._layer(block, layer, turn.transposed)
        if f"{layer}.bias" in block.dtypes:
            self._add(f"{block.prefix}.{layer}.bias", turn)

    def _layer(self, block: Block, layer: str, change: Change) -> None:
        """A change to a weight as [O, I]."""
        kind = block.layers[layer]
        self._add(f"{block.prefix}.{layer}.weight", lambda w: kind.parameter(change(kind.parameter(w))))

    def _gain(self, norm: str) -> Change:
        """Multiply columns by what a norm multiplies channels by."""
        return lambda w_OI: w_OI * (self.source.read(f"{norm}.weight").float() + self._offset(norm))

    def _flatten(self, norm: str) -> None:
        """Have a norm multiply by one."""
        self._add(f"{norm}.weight", lambda gain_D: torch.full_like(gain_D, 1 - self._offset(norm)))

    def _offset(self, norm: str) -> float:
        return gain_offset(self.source.model.get_submodule(norm))

    def _add(self, name: str, change: Change) -> None:
        self.steps.setdefault(self.source.names.get(name, name), []).append(change)


def _in_turn(steps: Sequence[Change], tensor: Tensor) -> Tensor:
    for step in steps:
        tensor = step(tensor)
    return tensor


def residual_norms(source: ModelSource, width: int) -> dict[str, list[str]]:
    """The norms of a block that are as wide as the residual stream, with the layers that read them."""
    block = source.block(0)
    norms, _ = run_norms(block, some_hidden(block, width))
    found = {norm: readers for norm, readers in norms.items() if len(block.module.get_parameter(f"{norm}.weight")) == width}
    source.release(block)
    return found


@torch.no_grad()
def check(source: ModelSource, rewriting: Rewriting, width: int, turn: Rotation | None) -> None:
    """See that the first block computes the same, rotated.

    Raises:
        RecipeError: it does not.
    """
    outputs = []
    for change, ahead in ((None, None), (rewriting, turn)):
        one = ModelSource(source.path, source.device, torch.float32, change)
        block = one.block(0)
        hidden = some_hidden(block, width)
        start = hidden if ahead is None else ahead(hidden.cpu()).to(hidden)
        outputs.append((block.forward(start) - start).cpu())
        one.release(block)
    expected = outputs[0] if turn is None else turn(outputs[0])
    missed = float((outputs[1] - expected).norm() / expected.norm())
    if not missed <= SAME:
        raise RecipeError(
            f"rotate: a block of `{source.model.config.model_type}` is off by {missed:.0%} when rotated: a norm in it takes "
            "a mean, or stands where no linear layer reads it; set residual: false, or leave the pass out"
        )


EXPORT = Rotate
