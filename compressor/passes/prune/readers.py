"""Refit the layers that read the residual stream's norms to a narrower stream.

A reader of the narrower stream is fitted to what it made of the whole one, x, from what it is given now, z, in a model whose
blocks before are fitted already,

    W' = W_S + W E[(x - z) zᵀ] (E[z zᵀ] + damping)⁻¹

with W_S its columns for the channels that stay, and zeros in z for those that go: the least squares of ‖W x - W' z‖², damped
towards leaving W_S alone.

Shape suffixes: O out_features, D hidden, S channels that stay, B samples, T tokens.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from compressor.model.block import Block
from compressor.model.source import ModelSource
from compressor.passes.prune.order import damped
from compressor.pipeline.calibration.stats import Hessian
from compressor.pipeline.calibration.stream import CalibrationStream, read_inputs
from compressor.pipeline.job import Event
from compressor.pipeline.prune_stage import Work, read_tensors, stored
from compressor.pipeline.ranks import Ranks

Norms = Mapping[str, Sequence[str]]  # of a block, with the layers that read them


@torch.no_grad()
def moment(work: Work, norms: Norms) -> Tensor:
    """Second moment [D, D] of what leaves the norms of the residual stream, the mean over all of them."""
    source, stream = work.source, work.stream()
    readers = [layers[0] for layers in norms.values()]
    found = []
    for block in source.blocks():
        stats = stream.collect(block, readers, (Hessian,))
        found += [stats[name, Hessian].value.double().cpu() for name in readers]
        stream.advance(block)
        work.tell(Event("moments", block.index + 1, len(source.layers)))
    last = Hessian(len(found[0]), source.device)
    with head_inputs(source) as read:
        for hidden in stream.hidden:
            last.update(read(hidden).flatten(0, -2))
    last.merge(work.ranks)
    return sum(found, last.value.double().cpu()) / (len(found) + 1)


@dataclass(frozen=True)
class Refit:
    """Readers of a narrower stream, block after block, each with what the fitted blocks before it give.

    Args:
        work: Text, and where to put down what is made.
        whole: The model before.
        narrow: The model whose readers are fitted.
        keep_S: Channels of the former that the latter has.
        norms: Norms of a block, with their readers.
        damp: Added to the diagonal, in parts of its mean.
    """

    work: Work
    whole: ModelSource
    narrow: ModelSource
    keep_S: Tensor
    norms: Norms
    damp: float

    @torch.no_grad()
    def tensors(self, settings: object) -> dict[str, Callable[[Tensor], Tensor]]:
        """New weights by their names on disk, made unless they lie there; `settings` as of `Work.once`."""
        before, after = (replace(self.work, source=source).stream() for source in (self.whole, self.narrow))
        made: dict[str, Callable[[Tensor], Tensor]] = {}
        total = len(self.whole.layers)
        for old, new in zip(self.whole.blocks(), self.narrow.blocks(), strict=True):
            make = partial(self._block, old, new, before, after)
            file = self.work.once(f"readers-{new.index}", settings, make)
            found = read_tensors(file)
            for name in chain.from_iterable(self.norms.values()):
                new.install({name: new.layers[name].parameter(found[self.narrow.names[f"{new.prefix}.{name}.weight"]])})
            made |= stored(file, found).tensors
            before.advance(old)
            after.advance(new)
            self.work.tell(Event("readers", new.index + 1, total))
        if not self.narrow.tied:  # a head that is the embedding too stays with it
            file = self.work.once("readers-head", settings, partial(self._head, before, after))
            made |= stored(file, read_tensors(file)).tensors
        return made

    def _block(
        self, old: Block, new: Block, before: CalibrationStream, after: CalibrationStream, unfinished: Path
    ) -> dict[str, Tensor]:
        """The readers of a block, those of each norm after what is before it is fitted."""
        made = {}
        for names in self.norms.values():
            both = Both.zeros(old.shape(names[0])[1], self.keep_S, before.device)
            for x, z in zip(before.hidden, after.hidden, strict=True):
                both.update(_read(old, names[0], x.to(before.device)), _read(new, names[0], z.to(after.device)))
            both.merge(self.work.ranks)
            for name in names:
                at = self.narrow.names[f"{new.prefix}.{name}.weight"]
                fitted = both.fitted(old.weight(name), self.damp).to(self.narrow.checkpoint.headers[at].dtype)
                new.install({name: fitted})
                made[at] = new.layers[name].parameter(fitted)
        return made

    def _head(self, before: CalibrationStream, after: CalibrationStream, unfinished: Path) -> dict[str, Tensor]:
        """The head."""
        head = self.narrow.ends[1]
        w_OD, at = self.whole.read(head).to(self.whole.device), self.narrow.names[head]
        both = Both.zeros(w_OD.shape[1], self.keep_S, before.device)
        with head_inputs(self.whole) as wide, head_inputs(self.narrow) as thin:
            for x, z in zip(before.hidden, after.hidden, strict=True):
                both.update(wide(x), thin(z))
        both.merge(self.work.ranks)
        return {at: both.fitted(w_OD, self.damp).to(self.narrow.checkpoint.headers[at].dtype)}


@dataclass(frozen=True)
class Both:
    """Moments, up to a factor, of what is read of a stream before and after it is narrower.

    Args:
        keep_S: Channels of the former that the latter has.
        missing_DS: E[(x - z) zᵀ], fp64.
        moment_SS: E[z zᵀ], fp64.
    """

    keep_S: Tensor
    missing_DS: Tensor
    moment_SS: Tensor

    @classmethod
    def zeros(cls, width: int, keep_S: Tensor, device: torch.device) -> "Both":
        """Return empty statistics."""
        missing_DS, moment_SS = (torch.zeros(rows, len(keep_S)).to(device, torch.float64) for rows in (width, len(keep_S)))
        return cls(keep_S.to(device), missing_DS, moment_SS)

    def update(self, x_BTD: Tensor, z_BTS: Tensor) -> None:
        """Add some tokens."""
        x_TD, z_TS = x_BTD.flatten(0, -2).float(), z_BTS.flatten(0, -2).float()
        self.missing_DS.add_(x_TD.index_add(1, self.keep_S, z_TS, alpha=-1).T @ z_TS)
        self.moment_SS.add_(z_TS.T @ z_TS)

    def merge(self, ranks: Ranks) -> None:
        """Add the tokens of other ranks."""
        ranks.sum_([self.missing_DS, self.moment_SS])

    def fitted(self, w_OD: Tensor, damp: float) -> Tensor:
        """Return the weight that reads the narrower stream, [O, S], fp64, in place of the one that reads the full stream."""
        w_OD = w_OD.double()
        missed_OS = w_OD @ self.missing_DS
        fitted: Tensor = w_OD[:, self.keep_S] + torch.linalg.solve(damped(self.moment_SS, damp), missed_OS.T).T
        return fitted


@contextmanager
def head_inputs(source: ModelSource) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yield a function from the output of the last block to the input of the head, on the device. It works while the context
    is open.
    """
    seen: list[Tensor] = []
    handle = source.model.get_output_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0]))

    def read(hidden: Tensor) -> Tensor:
        logits(hidden.to(source.device))
        return seen.pop()

    try:
        with source.head() as logits:
            yield read
    finally:
        handle.remove()


def _read(block: Block, layer: str, hidden: Tensor) -> Tensor:
    """Return the input of a layer when hidden states enter its block."""
    return read_inputs(block, [layer], block.forward, hidden)[layer]
