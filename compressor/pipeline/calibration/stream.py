"""The calibration stream: the hidden states of this rank's batches between two blocks. Nothing else survives a block.

Shape suffixes: B samples of a batch, S sequence, D hidden, T tokens, I in_features.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import CalibrationError
from compressor.model.block import Block
from compressor.model.source import return_freed_memory
from compressor.pipeline.calibration.hidden import Hidden, Keep, shapes
from compressor.pipeline.contract import Accumulator, NoNotes, Notes, PairedAccumulator
from compressor.pipeline.ranks import Ranks


@dataclass(frozen=True)
class BlockStats:
    """Accumulators by layer, those that read the same tensor (a tap) sharing them, and what concerns the whole block."""

    by_leader: Mapping[str, Mapping[type[Any], Accumulator | PairedAccumulator]]
    leader_of: Mapping[str, str]
    ranks: Ranks
    inputs: Sequence[Tensor]
    targets: Sequence[Tensor]
    metric: Tensor | None
    told: Callable[[int, int], None]
    notes: Notes = field(default_factory=NoNotes)

    def __getitem__(self, key: tuple[str, type[Any]]) -> Any:
        layer, kind = key
        return self.by_leader[self.leader_of[layer]][kind]

    def progress(self, done: int, total: int) -> None:
        """Tell whoever waits how far a long pass has come."""
        self.told(done, total)

    def taps(self, layers: Iterable[str]) -> list[tuple[str, ...]]:
        """The layers, grouped by the tensor they read."""
        groups: dict[str, tuple[str, ...]] = {}
        for layer in layers:
            leader = self.leader_of.get(layer, layer)
            groups[leader] = (*groups.get(leader, ()), layer)
        return list(groups.values())


class CalibrationStream:
    """`hidden[i]`, [B, S, D] on the CPU, is the next block's input for batch i of this rank.

    With two streams, `dense[i]` is the same in the dense model, and `targets[i]` what the dense block makes of it.

    Args:
        hidden: Hidden states that the first block receives; the stream overwrites them.
        ranks: The ranks that share the batches.
        device: To compute on.
        two_streams: Some pass compares with the dense model.
        metrics: [D, D] of each block, if some pass weighs errors of its output: see
            compressor/pipeline/calibration/sensitivity.py.
        keep: Puts hidden states where they are to lie.
    """

    def __init__(
        self,
        hidden: Hidden,
        ranks: Ranks,
        device: torch.device,
        *,
        two_streams: bool = False,
        metrics: Sequence[Tensor] = (),
        keep: Keep = list,
    ) -> None:
        self.ranks, self.device, self.metrics, self.keep = ranks, device, metrics, keep
        self.hidden = hidden
        self.dense: Hidden = hidden if two_streams else []  # up to the first block the two streams are one
        self.targets: Hidden = []

    @property
    def tokens(self) -> int:
        """Tokens that this rank sends through a block."""
        return sum(shape[0] * shape[1] for shape in shapes(self.hidden))

    @torch.no_grad()
    def enter(self, block: Block) -> None:
        """Before the first pass on a block: what the dense one makes of the dense stream, where there is one."""
        self.targets = self.keep(self._sound(block, hidden) for hidden in self.dense)

    @torch.no_grad()
    def collect(
        self,
        block: Block,
        layers: Sequence[str],
        needs: Sequence[type[Accumulator | PairedAccumulator]],
        tell: Callable[[int, int], None] = lambda done, total: None,
    ) -> BlockStats:
        """Run the block on every batch and return what a pass needs to know of its layers' inputs, over all ranks."""
        stats: dict[str, dict[type[Any], Accumulator | PairedAccumulator]] = {}
        leader_of: dict[str, str] = {}
        metric = self.metrics[block.index].to(self.device) if self.metrics else None
        found = BlockStats(stats, leader_of, self.ranks, self.hidden, self.targets, metric, tell)
        if not needs:
            return found
        paired = any(issubclass(kind, PairedAccumulator) for kind in needs)
        for i, hidden in enumerate(self.hidden):
            inputs = read_inputs(block, layers, block.forward, hidden.to(self.device))
            twins = read_inputs(block, layers, block.dense_forward, self.dense[i].to(self.device)) if paired else {}
            live: list[tuple[Tensor, str]] = []
            for name, x in inputs.items():
                leader_of[name] = next((leader for tensor, leader in live if tensor is x), name)
                if leader_of[name] != name:
                    continue
                live.append((x, name))
                if name not in stats:
                    stats[name] = {kind: kind(x.shape[-1], self.device) for kind in needs}
                for accumulator in stats[name].values():
                    _update(accumulator, x, twins.get(name))
        unseen = [name for name in layers if name not in leader_of]
        if unseen:
            raise CalibrationError(
                f"{block.prefix}.{unseen[0]}: no calibration token reached this layer; leave it out with `ignore`"
            )
        for name in sorted(stats):
            for accumulator in stats[name].values():
                accumulator.merge(self.ranks)
        return_freed_memory()  # the activations': a pass now needs the space
        return found

    @torch.no_grad()
    def advance(self, block: Block) -> None:
        """Replace every hidden state by the block's output.

        Raises:
            CalibrationError: the output is not finite.
        """
        for i, hidden in enumerate(self.hidden):
            self.hidden[i] = self._sound(block, hidden)
        self.dense, self.targets = self.targets, []

    def _sound(self, block: Block, hidden: Tensor) -> Tensor:
        """The block's output, on the CPU; finite."""
        out = block.forward(hidden.to(self.device))
        if not torch.isfinite(out).all():
            raise CalibrationError(
                f"{block.prefix}: its output is not finite on the calibration text; compute in a wider dtype, "
                "or check that the model is sound"
            )
        return out.cpu()


def read_inputs(
    block: Block, layers: Iterable[str], forward: Callable[[Tensor], Tensor], hidden_BSD: Tensor
) -> dict[str, Tensor]:
    """Return the input of each of some layers, in the order of reading; the same object where two read the same tensor."""
    inputs: dict[str, Tensor] = {}
    waiting = set(layers)

    def see(name: str, x: Tensor) -> None:
        inputs[name] = x
        waiting.discard(name)
        if not waiting:
            raise _Enough

    with watching(block, layers, see), suppress(_Enough):
        forward(hidden_BSD)
    return inputs


def _update(accumulator: Accumulator | PairedAccumulator, x: Tensor, dense: Tensor | None) -> None:
    """Count the tokens of one batch in."""
    if isinstance(accumulator, PairedAccumulator):
        assert dense is not None
        accumulator.update_pair(x.flatten(0, -2), dense.flatten(0, -2))
    else:
        accumulator.update(x.flatten(0, -2))


class _Enough(Exception):  # noqa: N818 - a signal, not an error
    """Ends a forward once every watched layer has been reached: the rest of the block would be computed for nothing."""


@contextmanager
def watching(block: Block, names: Iterable[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `see(name, input)` for each named layer while the context is open; no hook outlives it."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: see(name, args[0])

    handles = [block.module.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
