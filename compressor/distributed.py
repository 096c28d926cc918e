"""Data-parallel calibration: each rank streams its own batches, statistics are summed, work is shared out.

Started by `torchrun --nproc-per-node N -m compressor …`. With one rank every call is the identity, so there is one code path.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from compressor.types import Edits, Outcome, QuantizedTensor, Stored

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Passed to whoever needs it; `rank` of `world` processes."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def from_environment(cls, device: str | None = None) -> "Ranks":
        """Join the group that torchrun describes in the environment, or run alone; `device` None takes a GPU if any."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if world == 1:
            return cls(device=torch.device(kind))
        if kind == "cuda":
            kind = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(kind)
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if kind.startswith("cuda") else "gloo")
        return cls(dist.get_rank(), world, torch.device(kind))

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0

    def mine(self, items: Sequence[T]) -> list[T]:
        """This rank's share of a list: item i lives on rank i mod world."""
        return list(items[self.rank :: self.world])

    def share(self, costs: Mapping[str, int]) -> list[str]:
        """This rank's share of some names: largest first, each to the least loaded rank. The same answer everywhere."""
        return [name for name, owner in self._owners(costs).items() if owner == self.rank]

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Sum tensors over ranks, in place."""
        if self.world > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def gather(self, mine: Outcome) -> Outcome:
        """Every rank's outcome in one, edits in name order. Packed parts travel as tensors."""
        if self.world == 1:
            return mine
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, replace(mine, edits={n: _on_meta(new) for n, new in mine.edits.items()}))
        edits: dict[str, Stored] = {}
        for owner, outcome in enumerate(everyone):
            for name in sorted(outcome.edits):
                own = mine.edits[name] if owner == self.rank else None
                edits[name] = self._broadcast(outcome.edits[name], own, owner)
        errors = {name: error for outcome in everyone for name, error in outcome.errors.items()}
        warnings = tuple(warning for outcome in everyone for warning in outcome.warnings)
        return Outcome(_sorted(edits), errors, warnings)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world > 1:
            dist.barrier()

    def agree(self, value: T) -> T:
        """Rank 0's value, everywhere."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def _owners(self, costs: Mapping[str, int]) -> dict[str, int]:
        load = [0] * self.world
        owners = {}
        for name in sorted(costs, key=lambda n: (-costs[n], n)):
            owners[name] = load.index(min(load))
            load[owners[name]] += costs[name]
        return {name: owners[name] for name in costs}

    def _broadcast(self, shape: Stored, own: Stored | None, owner: int) -> Stored:
        """A stored weight from its owner; `shape` is the same on the meta device."""

        def send(like: Tensor, tensor: Tensor | None) -> Tensor:
            here = torch.empty_like(like, device=self.device) if tensor is None else tensor.to(self.device).contiguous()
            dist.broadcast(here.view(torch.uint8), owner)
            return here

        if isinstance(shape, QuantizedTensor):
            given = own.parts if isinstance(own, QuantizedTensor) else {}
            parts = {name: send(like, given.get(name)) for name, like in shape.parts.items()}
            return replace(shape, parts=parts)
        return send(shape, own if isinstance(own, Tensor) else None)


def _on_meta(new: Stored) -> Stored:
    if isinstance(new, QuantizedTensor):
        return replace(new, parts={name: part.to("meta") for name, part in new.parts.items()})
    return new.to("meta")


def _sorted(edits: Edits) -> Edits:
    return dict(sorted(edits.items()))
