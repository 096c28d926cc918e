"""The calibration stream: the hidden states of this rank's batches between two blocks. Nothing else survives a block.

Shape suffixes: B samples of a batch, S sequence, D hidden, T tokens, I in_features.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from compressor.distributed import Ranks
from compressor.errors import CalibrationError
from compressor.model.source import return_freed_memory
from compressor.types import Accumulator, Block


class LayerStats:
    """Accumulators by layer; layers that read the same tensor (a tap) share them."""

    def __init__(self, by_leader: Mapping[str, Mapping[type[Any], Accumulator]], leader_of: Mapping[str, str]) -> None:
        self._by_leader, self._leader_of = by_leader, leader_of

    def __getitem__(self, key: tuple[str, type[Any]]) -> Any:
        layer, kind = key
        return self._by_leader[self._leader_of[layer]][kind]

    def taps(self, layers: Iterable[str]) -> list[tuple[str, ...]]:
        """The layers, grouped by the tensor they read."""
        groups: dict[str, tuple[str, ...]] = {}
        for layer in layers:
            leader = self._leader_of.get(layer, layer)
            groups[leader] = (*groups.get(leader, ()), layer)
        return list(groups.values())


class CalibrationStream:
    """`hidden[i]`, [B, S, D] on the CPU, is the next block's input for batch i of this rank."""

    def __init__(self, hidden: Sequence[Tensor], ranks: Ranks, device: torch.device) -> None:
        self.hidden, self.ranks, self.device = list(hidden), ranks, device

    @property
    def tokens(self) -> int:
        """Tokens that this rank sends through a block."""
        return sum(batch.shape[0] * batch.shape[1] for batch in self.hidden)

    @torch.no_grad()
    def collect(self, block: Block, layers: Sequence[str], needs: Sequence[type[Accumulator]]) -> LayerStats:
        """Run the block on every batch and return what a pass needs to know of its layers' inputs, over all ranks."""
        stats: dict[str, dict[type[Any], Accumulator]] = {}
        leader_of: dict[str, str] = {}
        if not needs:
            return LayerStats(stats, leader_of)
        live: list[tuple[Tensor, str]] = []  # tensors read so far in this forward: `is` is safe while they are alive
        waiting: set[str] = set()

        def see(name: str, x: Tensor) -> None:
            waiting.discard(name)
            record(name, x)
            if not waiting:
                raise _Enough

        def record(name: str, x: Tensor) -> None:
            for tensor, leader in live:
                if tensor is x:
                    leader_of[name] = leader
                    return
            live.append((x, name))
            leader_of[name] = name
            if name not in stats:
                stats[name] = {kind: kind(x.shape[-1], self.device) for kind in needs}
            for accumulator in stats[name].values():
                accumulator.update(x.flatten(0, -2))

        with watching(block, layers, see):
            for hidden in self.hidden:
                waiting.update(layers)
                with suppress(_Enough):
                    block.forward(hidden.to(self.device))
                live.clear()
        unseen = [name for name in layers if name not in leader_of]
        if unseen:
            raise CalibrationError(
                f"{block.prefix}.{unseen[0]}: no calibration token reached this layer; leave it out with `ignore`"
            )
        for name in sorted(stats):
            for accumulator in stats[name].values():
                self.ranks.sum_(accumulator.tensors())
        return_freed_memory()  # the activations': a pass now needs the space
        return LayerStats(stats, leader_of)

    @torch.no_grad()
    def advance(self, block: Block) -> None:
        """Replace every hidden state by the block's output.

        Raises:
            CalibrationError: the output is not finite.
        """
        for i, hidden in enumerate(self.hidden):
            out = block.forward(hidden.to(self.device))
            if not torch.isfinite(out).all():
                raise CalibrationError(
                    f"{block.prefix}: its output is not finite on the calibration text; compute in a wider dtype, "
                    "or check that the model is sound"
                )
            self.hidden[i] = out.cpu()


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
