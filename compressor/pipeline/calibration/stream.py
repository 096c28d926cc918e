"""The calibration stream: the hidden states of this rank's batches between two blocks. Nothing else outlives a block.

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
    """Statistics of a block. Layers that read the same tensor (a tap) share their accumulators.

    Args:
        by_leader: Accumulators of each tap, by its first layer.
        leader_of: First layer of its tap, for each layer.
        ranks: The ranks that share the batches.
        inputs: Hidden states [B, S, D] that enter the block.
        targets: Outputs [B, S, D] of the dense block; empty with a single stream.
        metric: Metric [D, D] of the block's output error, if a pass needs one.
        told: Called with progress.
        notes: Checkpoint store of the pass.
    """

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
        """Report the progress of a long-running pass."""
        self.told(done, total)

    def taps(self, layers: Iterable[str]) -> list[tuple[str, ...]]:
        """Return the layers, grouped by the tensor that they read."""
        groups: dict[str, tuple[str, ...]] = {}
        for layer in layers:
            leader = self.leader_of.get(layer, layer)
            groups[leader] = (*groups.get(leader, ()), layer)
        return list(groups.values())


class CalibrationStream:
    """Hidden states between two blocks: `hidden[i]`, [B, S, D] on the CPU, is the next block's input for this rank's batch i.

    With two streams, `dense[i]` is the input in the dense model, and `targets[i]` is the dense block's output.

    Args:
        hidden: Hidden states that enter the first block; the stream overwrites them.
        ranks: The ranks that share the batches.
        device: Device to compute on.
        two_streams: Whether a pass compares with the dense model.
        metrics: Metric [D, D] of each block, if a pass weights errors of its output: see
            compressor/pipeline/calibration/sensitivity.py.
        keep: Function that stores hidden states, in memory or on disk.
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
        self.dense: Hidden = hidden if two_streams else []  # before the first block the two streams are equal
        self.targets: Hidden = []

    @property
    def tokens(self) -> int:
        """Number of tokens that this rank sends through a block."""
        return sum(shape[0] * shape[1] for shape in shapes(self.hidden))

    @torch.no_grad()
    def enter(self, block: Block) -> None:
        """Compute the dense block's outputs for the dense stream, if there is one. Call it before the first pass on a block.

        Raises:
            CalibrationError: an output is not finite.
        """
        self.targets = self.keep(self._sound(block, hidden) for hidden in self.dense)

    @torch.no_grad()
    def collect(
        self,
        block: Block,
        layers: Sequence[str],
        needs: Sequence[type[Accumulator | PairedAccumulator]],
        tell: Callable[[int, int], None] = lambda done, total: None,
    ) -> BlockStats:
        """Run the block on every batch and return the statistics of its layers' inputs, merged over all ranks.

        Args:
            block: The resident block.
            layers: Layers to collect statistics for.
            needs: Types of statistics.
            tell: Called with the progress of the pass that receives the statistics.

        Raises:
            CalibrationError: no token reached a layer.
        """
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
        return_freed_memory()  # frees activations, because the pass needs the space now
        return found

    @torch.no_grad()
    def advance(self, block: Block) -> None:
        """Replace every hidden state by the block's output.

        Raises:
            CalibrationError: an output is not finite.
        """
        for i, hidden in enumerate(self.hidden):
            self.hidden[i] = self._sound(block, hidden)
        self.dense, self.targets = self.targets, []

    def _sound(self, block: Block, hidden: Tensor) -> Tensor:
        """Return the block's output, on the CPU, and check that it is finite."""
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
    """Return the inputs of some layers, in the order of their calls. Layers that read the same tensor share one object."""
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
    """Add the tokens of one batch to an accumulator."""
    if isinstance(accumulator, PairedAccumulator):
        assert dense is not None
        accumulator.update_pair(x.flatten(0, -2), dense.flatten(0, -2))
    else:
        accumulator.update(x.flatten(0, -2))


class _Enough(Exception):  # noqa: N818 - a signal, not an error
    """Signal that ends a forward pass once every watched layer was reached, because the rest of the block is not needed."""


@contextmanager
def watching(block: Block, names: Iterable[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `see(name, input)` for each named layer while the context is open. All hooks are removed at its end."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: see(name, args[0])

    handles = [block.module.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
