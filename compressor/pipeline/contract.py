"""The contract between the engine and an algorithm: the pass, the statistics it receives, and the result it returns.

Shape suffixes: O out_features, I in_features, T tokens, B samples of a batch, S sequence, D hidden.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from compressor.errors import RecipeError
from compressor.formats.base import Edits, Format, Option, QuantizedTensor
from compressor.model.block import Block
from compressor.model.edited import Progress, Rewriting, silent
from compressor.model.source import ModelSource
from compressor.model.surgery.kv_cache import CacheScales
from compressor.reading import elide
from compressor.recipe.registry import node


class Accumulator(Protocol):
    """A statistic of a layer's input, accumulated over calibration tokens and ranks."""

    def __init__(self, in_features: int, device: torch.device) -> None: ...
    def update(self, x_TI: Tensor) -> None: ...
    def merge(self, ranks: "Group") -> None: ...  # merges the statistics of all ranks


@runtime_checkable
class PairedAccumulator(Protocol):
    """A statistic of a layer's input together with the dense model's input to that layer, for the same tokens."""

    def __init__(self, in_features: int, device: torch.device) -> None: ...
    def update_pair(self, x_TI: Tensor, dense_TI: Tensor) -> None: ...
    def merge(self, ranks: "Group") -> None: ...


class Group(Protocol):
    """The processes that share a run."""

    @property
    def rank(self) -> int: ...
    @property
    def world(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    def sum_(self, tensors: Sequence[Tensor]) -> None: ...  # element-wise sum over all processes, in place
    def max_(self, tensors: Sequence[Tensor]) -> None: ...  # element-wise maximum over all processes, in place


class Notes(Protocol):
    """Checkpoint store for long-running passes, so that an interrupted run can resume."""

    def load(self, key: str) -> Mapping[str, Tensor]: ...  # tensors last saved under a key; empty if there are none
    def save(self, key: str, tensors: Mapping[str, Tensor]) -> None: ...  # replaces the tensors saved under the key


class NoNotes:
    """A store that keeps nothing, for runs that cannot be resumed."""

    def load(self, key: str) -> Mapping[str, Tensor]:
        """Return nothing."""
        return {}

    def save(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Discard the tensors."""


class Stats(Protocol):
    """The statistics that the calibration stream collected on one block."""

    @property
    def inputs(
        self,
    ) -> Sequence[Tensor]: ...  # this rank's hidden states [B, S, D] that enter the block, after compressed blocks
    @property
    def targets(
        self,
    ) -> Sequence[Tensor]: ...  # outputs [B, S, D] of the dense model's block for the same text
    @property
    def metric(self) -> Tensor | None: ...  # cost [D, D] of an error in the block's output: see calibration/sensitivity.py
    @property
    def ranks(self) -> Group: ...
    @property
    def notes(self) -> Notes: ...  # checkpoint store of this pass on this block; each rank has its own
    def progress(self, done: int, total: int) -> None: ...  # reports the progress of a long-running pass
    def __getitem__(self, key: tuple[str, type[Any]]) -> Any: ...  # for example stats[layer, Hessian]
    def taps(self, layers: Iterable[str]) -> Sequence[tuple[str, ...]]: ...  # groups of layers that read the same tensor


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a pass on (a part of) a block."""

    edits: Edits
    errors: Mapping[str, float]  # by layer: relative error of the layer's output, or of its weight without data
    warnings: tuple[str, ...] = ()
    cache: CacheScales | None = None  # scales for rounding keys and values from now on


OptionT = TypeVar("OptionT", bound=Option)
Plan = Mapping[str, Option]  # by full unit name, "model.layers.3.mlp.down_proj"


@dataclass(frozen=True, slots=True)
class Whole:
    """A compressed model in memory and the dense model's outputs for the same text, for passes that train the model."""

    inputs: Sequence[Tensor]  # this rank's hidden states [B, S, D] that enter the first block
    targets: Sequence[Tensor]  # outputs [B, S, D] of the dense model's last block
    student: Callable[[Tensor, Mapping[str, Tensor]], Tensor]  # logits of inputs, with weights [O, I] by full layer name
    teacher: Callable[[Tensor], Tensor]  # logits of targets
    packed: Mapping[str, QuantizedTensor]  # by full layer name
    dense: Mapping[str, Tensor]  # weights [O, I] of the same layers before compression
    dtype: torch.dtype  # dtype of the computation
    ranks: Group
    progress: Callable[[int, int], None]


@node
class Pass:
    """Base class of algorithms: one file and one subclass per algorithm. Its fields are its recipe keys. It holds no state.

    A subclass overrides only what it needs. Properties declare what the engine must provide, and methods do the work. A pass
    works at one of four stages, in the order of a run:

    1. `rewriting` changes the checkpoint before any block is read (`rewrites`).
    2. `prune` makes the model smaller and reads text to do so (`prunes`; see PruningPass in prune_stage.py).
    3. `apply` compresses one resident block.
    4. `tune` trains the compressed model (`trains_model`).
    """

    @property
    def needs(self) -> tuple[type[Accumulator | PairedAccumulator], ...]:
        """Types of input statistics that `apply` reads from `stats`."""
        return ()

    @property
    def offers(self) -> tuple[Any, ...]:
        """Options that the plan chooses among. One option needs no choice, and a pass without options is not planned."""
        return ()

    @property
    def chooses(self) -> bool:
        """Whether `apply` itself chooses among the options. It then receives a OneOf for each unit."""
        return False

    @property
    def two_streams(self) -> bool:
        """Whether `apply` compares with the dense model, through `stats.inputs`, `stats.targets` or paired statistics."""
        return False

    @property
    def together(self) -> bool:
        """Whether all ranks work on all units together, through `stats.ranks`, and compute the same result."""
        return False

    @property
    def reads_metric(self) -> bool:
        """Whether `apply` reads `stats.metric`, which takes a sweep over the model before the first block."""
        return False

    @property
    def rescales_weights(self) -> bool:
        """Whether the pass multiplies dense weights and norms by factors, so that they differ from the original's."""
        return False

    @property
    def training_samples(self) -> int:
        """Number of samples that training reads per layer, over all steps, if a time limit applies to it; otherwise 0."""
        return 0

    def shortened(self, share: float) -> "Pass | None":
        """Return the pass with only a share of its training, to meet a time limit; None if hardly any would be left."""
        return self

    def units(self, block: Block) -> Mapping[str, tuple[str, ...]]:
        """Return the units of a block, each with the layers that the pass rewrites."""
        return {}

    def suits(self, option: Any, block: Block, layers: Sequence[str]) -> bool:
        """Return whether an option suits layers of a block that are stored alike; some suit only other checkpoints."""
        return True

    def pick(self, options: Sequence[Any], block: Block, layers: Sequence[str]) -> Any:
        """Choose one of several options for layers of a block that are stored alike, from their shapes alone.

        Returns: the option; None if the pass leaves the choice to the plan.

        Raises:
            ValueError: none of the options is suitable.
        """
        return None

    def shared(self, block: Block, formats: Mapping[str, Format]) -> Mapping[str, Format]:
        """Return the formats of a block's layers after layers share stored tensors, given the formats in the plan."""
        return formats

    def apply(self, block: Block, stats: Stats, choice: Mapping[str, Any]) -> Outcome:
        """Compress (a part of) a block. Pure: arguments are not modified, and the same input gives the same result.

        Args:
            block: The resident block.
            stats: Statistics from calibration.
            choice: Option of each unit to compress.
        """
        return Outcome({}, {})

    rewrites: ClassVar[bool] = False

    def rewriting(self, source: ModelSource, tell: Progress = silent, *, sizes_only: bool = False) -> Rewriting:
        """Return the change to the checkpoint.

        Args:
            source: The model. Its headers are read, and other data if needed.
            tell: Called with progress.
            sizes_only: Whether only names, dtypes and shapes matter, so that long computations may be skipped.
        """
        return Rewriting({})

    prunes: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """File-name safe description of what `prune` drops; empty if it drops nothing."""
        return ""

    trains_model: ClassVar[bool] = False

    def tune(self, whole: Whole) -> tuple[Mapping[str, QuantizedTensor], tuple[str, ...]]:
        """Train the model. Return the new layers by full name, in their previous formats, and warnings."""
        return {}, ()


def check_passes(passes: Sequence[object]) -> None:
    """Refuse a class that a recipe names as a pass by its full module name, but that is something else.

    Raises:
        RecipeError: one of them does not inherit `Pass`.
    """
    for number, step in enumerate(passes):
        if not isinstance(step, Pass):
            where = elide(type(step).__module__, 80)
            raise RecipeError(f"passes.{number}: {where} is not a pass; its EXPORT must inherit {Pass.__module__}.Pass")
