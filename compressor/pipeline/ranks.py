"""Data-parallel calibration: each rank streams its own batches, statistics are summed, and work is shared out.

Started by `torchrun --nproc-per-node N -m compressor …`. With one rank every call is the identity, so there is only one
code path.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from compressor.errors import LostRankError, RecipeError
from compressor.formats.base import Edits, QuantizedTensor, Stored
from compressor.model.device import compute_device
from compressor.pipeline.contract import Outcome

T = TypeVar("T")
PATIENCE = timedelta(days=7)  # time that ranks wait for each other, because the first rank writes and evaluates alone


@dataclass(frozen=True)
class Ranks:
    """A process group: this process is number `rank` of `world`. Code that needs it receives it as an argument."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def from_environment(cls, device: str | None = None) -> "Ranks":
        """Join the group that torchrun describes in the environment, or run alone. For `device` see `compute_device`."""
        world, place = _world(), compute_device(device)
        if world == 1:
            return cls(device=place)
        if place.type == "cuda":
            place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(place)
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo", timeout=PATIENCE)
        return cls(dist.get_rank(), world, place)

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0

    def mine(self, items: Sequence[T]) -> list[T]:
        """Return this rank's share of a list: item i belongs to rank i mod world."""
        return list(items[self.rank :: self.world])

    def share(self, costs: Mapping[str, int]) -> list[str]:
        """Return this rank's share of some names. Names are assigned by falling cost, each to the least loaded rank.

        Every rank computes the same assignment.
        """
        return [name for name, owner in self._owners(costs).items() if owner == self.rank]

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Sum tensors over ranks, in place."""
        self._reduce(tensors, dist.ReduceOp.SUM)

    def max_(self, tensors: Sequence[Tensor]) -> None:
        """Take the element-wise maximum of tensors over ranks, in place."""
        self._reduce(tensors, dist.ReduceOp.MAX)

    def _reduce(self, tensors: Sequence[Tensor], how: dist.ReduceOp.RedOpType) -> None:
        if self.world > 1:
            with _together():
                for tensor in tensors:
                    dist.all_reduce(tensor, how)

    def gather(self, mine: Outcome) -> Outcome:
        """Merge the outcomes of all ranks into one, with edits in name order. Weights are sent as tensors, not pickled."""
        if self.world == 1:
            return mine
        everyone: list[Any] = [None] * self.world
        with _together():
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
        """Wait until every rank has called this."""
        if self.world > 1:
            with _together():
                dist.barrier()

    def agree(self, value: T) -> T:
        """Return rank 0's value on every rank."""
        if self.world == 1:
            return value
        box = [value]
        with _together():
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
        """Broadcast a stored weight from its owner. `shape` is the weight on the meta device."""

        def send(like: Tensor, tensor: Tensor | None) -> Tensor:
            here = torch.empty_like(like, device=self.device) if tensor is None else tensor.to(self.device).contiguous()
            with _together():
                dist.broadcast(here.view(torch.uint8), owner)
            return here

        if isinstance(shape, QuantizedTensor):
            given = own.parts if isinstance(own, QuantizedTensor) else {}
            parts = {name: send(like, given.get(name)) for name, like in shape.parts.items()}
            return replace(shape, parts=parts)
        return send(shape, own if isinstance(own, Tensor) else None)


def check_alone() -> None:
    """Refuse to run in several processes, for work that cannot be shared out.

    Raises:
        RecipeError: several processes were started.
    """
    if _world() > 1:
        raise RecipeError(f"judging runs in one process, torchrun started {_world()}; start it without torchrun")


def first_to_fail() -> bool:
    """Return whether this process should report its error. Of several ranks, only the first to fail does."""
    if _world() == 1:
        return True
    if not dist.is_initialized():
        return os.environ["RANK"] == "0"  # an error before the ranks join occurs on all of them
    try:
        return bool(dist.distributed_c10d._get_default_store().add("failed", 1) == 1)
    except RuntimeError:
        return False  # rank 0, which kept the count, is gone, so it failed first


def _world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def _together() -> Iterator[None]:
    """Wrap a collective operation: raise LostRankError if another rank is lost."""
    try:
        yield
    except RuntimeError as error:
        raise LostRankError(
            f"rank {dist.get_rank()}: lost the connection to another rank; "
            "resume the run, which goes on from the last finished block"
        ) from error


def _on_meta(new: Stored) -> Stored:
    if isinstance(new, QuantizedTensor):
        return replace(new, parts={name: part.to("meta") for name, part in new.parts.items()})
    return new.to("meta")


def _sorted(edits: Edits) -> Edits:
    return dict(sorted(edits.items()))
