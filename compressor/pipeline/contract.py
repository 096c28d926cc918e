"""The contract between the engine and an algorithm: a pass, the statistics it gets, and what it returns.

Shape suffixes: O out_features, I in_features, T tokens, B samples of a batch, S sequence, D hidden.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from compressor.formats.base import Edits, Format, Option, QuantizedTensor
from compressor.model.block import Block
from compressor.model.edited import Progress, Rewriting, silent
from compressor.model.source import ModelSource
from compressor.model.surgery.kv_cache import CacheScales
from compressor.recipe.registry import node

if TYPE_CHECKING:
    from compressor.pipeline.prune_stage import Work


class Accumulator(Protocol):
    """A statistic of a layer's input, over calibration tokens and over ranks."""

    def __init__(self, in_features: int, device: torch.device) -> None: ...
    def update(self, x_TI: Tensor) -> None: ...
    def merge(self, ranks: "Group") -> None: ...  # with those of the other ranks


@runtime_checkable
class PairedAccumulator(Protocol):
    """A statistic of a layer's input and of what the dense model has in its place, for the same tokens."""

    def __init__(self, in_features: int, device: torch.device) -> None: ...
    def update_pair(self, x_TI: Tensor, dense_TI: Tensor) -> None: ...
    def merge(self, ranks: "Group") -> None: ...


class Group(Protocol):
    """The processes that work together."""

    @property
    def rank(self) -> int: ...
    @property
    def world(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    def sum_(self, tensors: Sequence[Tensor]) -> None: ...  # over all of them, in place
    def max_(self, tensors: Sequence[Tensor]) -> None: ...  # the same, element by element


class Notes(Protocol):
    """Where a pass that takes long puts down how far it has come, so that a run that is broken off goes on from there."""

    def load(self, key: str) -> Mapping[str, Tensor]: ...  # what was saved last under a key; nothing at the start
    def save(self, key: str, tensors: Mapping[str, Tensor]) -> None: ...  # in the place of what was


class NoNotes:
    """For where nothing is to be resumed."""

    def load(self, key: str) -> Mapping[str, Tensor]:
        """Nothing."""
        return {}

    def save(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Forget it."""


class Stats(Protocol):
    """The statistics that the calibration stream collected on one block."""

    @property
    def inputs(self) -> Sequence[Tensor]: ...  # [B, S, D] that enter the block after the compressed ones, of this rank
    @property
    def targets(self) -> Sequence[Tensor]: ...  # [B, S, D] that leave the block of the dense model, for the same text
    @property
    def metric(self) -> Tensor | None: ...  # what an error of the block's output costs: see calibration/sensitivity.py
    @property
    def ranks(self) -> Group: ...
    @property
    def notes(self) -> Notes: ...  # of this pass on this block; not of more than one rank together
    def progress(self, done: int, total: int) -> None: ...  # of a pass that takes long
    def __getitem__(self, key: tuple[str, type[Any]]) -> Any: ...  # stats[layer, Hessian]
    def taps(self, layers: Iterable[str]) -> Sequence[tuple[str, ...]]: ...  # layers that read the same tensor


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a pass on (a part of) a block."""

    edits: Edits
    errors: Mapping[str, float]  # by layer: error relative to the layer's output (or to its weight, without data)
    warnings: tuple[str, ...] = ()
    cache: CacheScales | None = None  # what keys and values are rounded with from now on


OptionT = TypeVar("OptionT", bound=Option)
Plan = Mapping[str, Option]  # by full unit name, "model.layers.3.mlp.down_proj"


@runtime_checkable
class Picks(Protocol):
    """A pass that tells from the shapes of layers which of several options they get."""

    def pick(self, options: Sequence[Any], block: Block, layers: Sequence[str]) -> Any:
        """The option for layers of a block that are stored alike; raises ValueError if none will do."""


@runtime_checkable
class Suits(Protocol):
    """A pass some of whose options are for layers of other checkpoints."""

    def suits(self, option: Any, block: Block, layers: Sequence[str]) -> bool:
        """Whether an option is for layers of a block that are stored alike."""


@runtime_checkable
class Shares(Protocol):
    """A pass that has layers of a block share what is stored."""

    def shared(self, block: Block, formats: Mapping[str, Format]) -> Mapping[str, Format]:
        """The formats of layers once they share, from those that the plan has."""


@dataclass(frozen=True, slots=True)
class Whole:
    """A compressed model in memory, and what the dense one makes of the same text."""

    inputs: Sequence[Tensor]  # [B, S, D] that enter the first block, of this rank
    targets: Sequence[Tensor]  # [B, S, D] that leave the last block of the dense model
    student: Callable[[Tensor, Mapping[str, Tensor]], Tensor]  # logits of inputs, with weights [O, I] by full layer name
    teacher: Callable[[Tensor], Tensor]  # logits of targets
    packed: Mapping[str, QuantizedTensor]  # by full layer name
    dense: Mapping[str, Tensor]  # [O, I] of the same layers, before anything was done to them
    dtype: torch.dtype  # of the computation
    ranks: Group
    progress: Callable[[int, int], None]


@runtime_checkable
class Tunes(Protocol):
    """A pass that trains the whole model once all blocks are compressed."""

    def tune(self, whole: Whole) -> tuple[Mapping[str, QuantizedTensor], tuple[str, ...]]:
        """New layers by full name, in the formats that they had, and warnings."""


class Pass(Protocol):
    """One algorithm, one file: a frozen dataclass whose fields are its recipe keys. Holds no state."""

    chooses: ClassVar[bool]  # among its options, layer by layer: `apply` then gets a OneOf for each unit

    @property
    def together(self) -> bool: ...  # all ranks work on all units at once, through `stats.ranks`, and come to the same result
    @property
    def needs(self) -> tuple[type[Accumulator | PairedAccumulator], ...]: ...
    @property
    def two_streams(self) -> bool: ...  # compares with the dense model: `stats.inputs`, `stats.targets`, paired statistics
    @property
    def sensitivity(self) -> bool: ...  # reads `stats.metric`
    @property
    def options(self) -> tuple[Any, ...]: ...  # one entry means there is nothing to allocate
    def units(self, block: Block) -> Mapping[str, tuple[str, ...]]: ...  # unit -> the layers it rewrites
    def apply(self, block: Block, stats: Stats, choice: Mapping[str, Any]) -> Outcome: ...  # pure


@node
class Schedule:
    """Fields of every pass that trains.

    Args:
        steps: Number of training steps.
        batch: Samples in a step.
        lr: First learning rate of the latents, in steps of the grid (their mean, of floating-point numbers), times the bits
            of a code: fine grids need small moves.
        scale_lr: First learning rate of the scales, or of the entries of codebooks, as a fraction of their mean size.
        seed: Seed of the order of samples.
    """

    steps: int = 200
    batch: int = 8
    lr: float = 0.01
    scale_lr: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("steps", self.steps), ("batch", self.batch)):
            if value < 1:
                raise ValueError(f"{name}: {value} is not a positive number")
        for name, rate in (("lr", self.lr), ("scale_lr", self.scale_lr)):
            if not 0 <= rate <= 1:
                raise ValueError(f"{name}: {rate} is not in 0 … 1")


@runtime_checkable
class Rewrites(Protocol):
    """A pass that changes the model before any block is read."""

    def rewriting(self, source: ModelSource, tell: Progress = silent, *, sizes_only: bool = False) -> Rewriting:
        """Return the change.

        Args:
            source: The model; headers are read, and whatever else is needed.
            tell: Called with progress.
            sizes_only: Only names, dtypes and shapes matter; what takes long may be left out.
        """


@dataclass(frozen=True)
class Pruned:
    """The result of a pass that prunes.

    Args:
        rewriting: The change; None if there is none.
        report: Report of the pass, plain data.
    """

    rewriting: Rewriting | None
    report: Mapping[str, Any]


@dataclass(frozen=True)
class Sketch:
    """Names, dtypes and shapes as a pass that prunes will leave them, before any weight is read.

    Args:
        rewriting: The change; None if there is none.
        certain: There is no other.
        more: Parameters that there may be besides, if there is.
    """

    rewriting: Rewriting | None
    certain: bool = True
    more: int = 0


@runtime_checkable
class Prunes(Protocol):
    """A pass that makes the model smaller before any block is compressed, for which it reads text."""

    @property
    def label(self) -> str: ...  # file-name safe; empty if nothing goes

    def sketch(self, source: ModelSource) -> Sketch:
        """Predict the shapes of the result."""

    def expected_memory(self, source: ModelSource, tokens: int, batch: int) -> int:
        """Return the peak of its work in bytes, as compressor/pipeline/memory_estimate.py counts it.

        Args:
            source: The model.
            tokens: Number of calibration tokens of this rank.
            batch: Number of tokens in a batch.
        """

    def prune(self, work: "Work") -> Pruned:
        """Prune the model."""
