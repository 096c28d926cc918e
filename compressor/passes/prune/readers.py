"""Refit the layers that read the residual stream through norms to a narrower stream.

A reader's output from its new input z is fitted to its output from the old input x. The blocks before it are refitted
already:

    W' = W_S + W E[(x - z) zᵀ] (E[z zᵀ] + damping)⁻¹

where W_S are its columns for the kept channels, and x - z has zeros in z for dropped channels. This minimises ‖W x - W' z‖²,
damped towards W_S.

Shape suffixes: O out_features, D hidden, S kept channels, B samples, T tokens.
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

Norms = Mapping[str, Sequence[str]]  # norm of a block -> layers that read it


@torch.no_grad()
def moment(work: Work, norms: Norms) -> Tensor:
    """Compute the second moment [D, D] of the outputs of the residual stream's norms, averaged over all norms."""
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
    """Refit of the readers of a narrower stream, block after block, each on the outputs of the refitted blocks before it.

    Args:
        work: Context: the text, and the directory for results.
        whole: The model before channels were dropped.
        narrow: The model whose readers are refitted.
        keep_S: Channels of `whole` that `narrow` keeps.
        norms: Norms of a block, with their readers.
        damp: Damping added to the diagonal, as a fraction of its mean.
    """

    work: Work
    whole: ModelSource
    narrow: ModelSource
    keep_S: Tensor
    norms: Norms
    damp: float

    @torch.no_grad()
    def tensors(self, settings: object) -> dict[str, Callable[[Tensor], Tensor]]:
        """Return the new weights by name in the checkpoint. Stored results are reused; `settings` is that of `Work.once`."""
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
        if not self.narrow.tied:  # a head that is also the embedding is not refitted
            file = self.work.once("readers-head", settings, partial(self._head, before, after))
            made |= stored(file, read_tensors(file)).tensors
        return made

    def _block(
        self, old: Block, new: Block, before: CalibrationStream, after: CalibrationStream, unfinished: Path
    ) -> dict[str, Tensor]:
        """Refit the readers of a block, norm by norm, so that later ones see the effect of earlier ones."""
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
        """Refit the head."""
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
    """Moments, up to a factor, of a reader's inputs from the full and the narrower stream.

    Args:
        keep_S: Channels of the full stream that the narrower one keeps.
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
        """Return the weight for the narrower stream, [O, S], fp64, from the weight for the full one."""
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
