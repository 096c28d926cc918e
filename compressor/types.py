"""The types that cross module boundaries.

Shape suffixes: O out_features, I in_features, T tokens, B samples of a batch, S sequence, D hidden, C adjacent columns.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from compressor.absent import without
from compressor.activations import InputRounding, Seen, input_rounding, rounded_inputs
from compressor.codes import Codes
from compressor.errors import SourceError
from compressor.kv_cache import CacheScales, rounded_cache


class Option(Protocol):
    """One way to compress a unit: a weight format, `keep half of the channels`, `drop the block`."""

    @property
    def label(self) -> str: ...  # file-name safe, unique within a recipe


@dataclass(frozen=True, slots=True)
class Kept:
    """So many units of a part stay: channels, groups of heads; of a sub-layer that goes or stays as a whole, 0 or 1."""

    keep: int
    of: int

    @property
    def label(self) -> str:
        """File-name safe."""
        return f"keep{self.keep}of{self.of}"


GONE = Kept(0, 1)


class Grid(Protocol):
    """A format fitted to one weight: the values that every column may take."""

    @property
    def step(self) -> int: ...  # columns that one code covers: 1, or the length of a codebook's vectors
    def round(self, w_OC: Tensor, column: int) -> Tensor: ...  # codes [O, C / step] of columns column … column + C
    def decode(self, codes: Tensor, column: int) -> Tensor: ...  # their values, fp32 [O, C]
    @property
    def width(self) -> int: ...  # adjacent columns that share scales
    def refit(self, w_OC: Tensor, column: int, importance_C: Tensor, *, search: bool) -> "Grid":
        """With the scales of columns column … column + width chosen anew, as by `Format.fit`, for columns that changed."""

    def pack(self, codes: Tensor) -> "QuantizedTensor": ...  # all codes of the weight, [O, I / step]


@runtime_checkable
class Rescalable(Grid, Protocol):
    """A grid whose scales can be changed while the codes stay."""

    def rescaled(self, column: int, slope_O: Tensor, curvature_O: Tensor) -> "Rescalable":
        """The scales of columns column … column + width multiplied by what is best, as they are stored.

        Rows that share a scale get one factor, 1 + the sum of their slopes / that of their curvatures, of the loss by the
        factor; it is not negative, and 1 where there is no curvature.
        """


PartSpec = tuple[torch.dtype, tuple[int, ...]]  # dtype and shape of a tensor on disk


@runtime_checkable
class Format(Option, Protocol):
    """Byte layout, exact size and CPU reference of one weight format; `dequantize` is the ground truth."""

    part_names: ClassVar[tuple[str, ...]]  # of all tensors that a layer may have on disk; two of them tell that it is packed

    def stored_bits(self, shape: tuple[int, int]) -> int:
        """Exact size of a weight of this shape, scales and padding included. Raises ValueError if it cannot be held."""

    def fit(self, w_OI: Tensor, importance_I: Tensor | None = None, *, search: bool = True) -> Grid:
        """Choose scales for a weight, by search for the least error (weighted by column) or from its range alone."""

    def codes(self, packed: "QuantizedTensor") -> Codes:
        """What a packed weight holds, unpacked: its integers, scales and zero points, these in the dtype they are stored in.

        Raises:
            SourceError: the parts contradict each other.
        """

    def stored(self, codes: Codes, shape: tuple[int, int]) -> "QuantizedTensor":
        """Inverse of `codes`, bit for bit, for a weight of shape (O, I)."""

    def dequantize(self, packed: "QuantizedTensor") -> Tensor: ...  # `values` of the codes, fp32 [O, I]

    def checkpoint_parts(self, shape: tuple[int, int]) -> Mapping[str, PartSpec]:
        """Name, dtype and shape of every tensor on disk: what `codes` reads and a loader must expect.

        Others may have stored scales in another floating-point dtype.
        """

    def compressed_tensors(self) -> dict[str, Any] | None:
        """The entries of a compressed-tensors scheme that describe the format; None if that layout cannot hold it."""


@runtime_checkable
class Contextual(Format, Protocol):
    """A format with something that is stored once for a weight and hangs on more than the weight."""

    @property
    def static_inputs(self) -> bool: ...  # it rounds activations by a number found in calibration
    def within(self, largest: float, seen: Seen | None) -> Format:
        """The same, for layers that engines fuse, and want equal in what is stored once.

        Args:
            largest: The largest weight of all of them, in magnitude.
            seen: What they read, where `static_inputs` asks for it.
        """


@runtime_checkable
class Borrowing(Format, Protocol):
    """A format some of whose parts another layer may have on disk, which both then use."""

    @property
    def lender(self) -> str: ...  # full name of that layer; empty: all parts are its own
    def borrowed_parts(self, shape: tuple[int, int]) -> Mapping[str, PartSpec]:
        """What `codes` reads besides `checkpoint_parts`; a weight of any shape lends them."""

    def borrowing(self, lender: str) -> Format: ...  # the same with another lender
    @property
    def inner(self) -> Format: ...  # what kernels decode of it


def borrowed(fmt: Format, shape: tuple[int, int]) -> tuple[str, Mapping[str, PartSpec]]:
    """The layer that lends parts to a weight of a shape, and these; empty if all are its own."""
    return (fmt.lender, fmt.borrowed_parts(shape)) if isinstance(fmt, Borrowing) and fmt.lender else ("", {})


@dataclass(frozen=True, slots=True)
class OneOf:
    """Formats that a pass chooses among by itself, from data or from the weights; each can hold every layer of the unit."""

    formats: tuple[Format, ...]

    @property
    def label(self) -> str:
        return "-or-".join(fmt.label for fmt in self.formats)

    def largest(self, shape: tuple[int, int]) -> Format:
        """The one that takes the most space on disk, its entries in the file's header included: what a forecast says."""
        return max(self.formats, key=lambda fmt: (fmt.stored_bits(shape), len(str(fmt.checkpoint_parts(shape)))))


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A weight as it lies on disk: named parts, and the format that can decode them."""

    format: Format
    shape: tuple[int, int]  # (O, I) of the dense weight
    parts: Mapping[str, Tensor]  # saved as "<layer>.<part>", each by the layer whose own it is

    @property
    def own(self) -> dict[str, Tensor]:
        """The parts that no other layer lends."""
        others = borrowed(self.format, self.shape)[1]
        return {name: part for name, part in self.parts.items() if name not in others}

    def dequantize(self) -> Tensor:
        """The values the parts stand for, fp32 [O, I]."""
        return self.format.dequantize(self)


Stored = Tensor | QuantizedTensor
Edits = Mapping[str, Stored]  # by name inside the block: weights [O, I] of layers, and any other parameter, dense


def dense(new: Stored) -> Tensor:
    """The values of a stored weight, [O, I]."""
    return new.dequantize() if isinstance(new, QuantizedTensor) else new


def stored_bits(new: Stored) -> int:
    """Bits that a stored weight takes on disk."""
    parts = new.own.values() if isinstance(new, QuantizedTensor) else [new]
    return sum(8 * part.nbytes for part in parts)


def _roundings(edits: Edits) -> dict[str, InputRounding]:
    """How layers with new weights round what they multiply by, if they do."""
    packed = {name: new for name, new in edits.items() if isinstance(new, QuantizedTensor)}
    found = {name: input_rounding(new.format, new.parts.__getitem__) for name, new in packed.items()}
    return {name: how for name, how in found.items() if how is not None}


@dataclass(frozen=True, slots=True)
class Trial:
    """New weights that are ready to be tried."""

    weights: Mapping[str, Tensor]  # dense, as in `Edits`
    rounded: Mapping[str, InputRounding]
    skips: tuple[str, ...] = ()  # sub-layers of the block that it does without (compressor/absent.py)
    whole: bool = False  # the block is passed over

    @classmethod
    def of(cls, edits: Edits, device: torch.device, dtype: torch.dtype) -> "Trial":
        """On a device, in the dtype of computation."""
        there = {name: _moved(new, device) for name, new in edits.items()}
        return cls({name: dense(new).to(dtype) for name, new in there.items()}, _roundings(there))


def _moved(new: Stored, device: torch.device) -> Stored:
    if isinstance(new, QuantizedTensor):
        return replace(new, parts={name: part.to(device) for name, part in new.parts.items()})
    return new.to(device)


class LinearLike(Protocol):
    """How to read and write the weight of one kind of linear module as [out_features, in_features]."""

    def weight(self, module: nn.Module) -> Tensor: ...
    def parameter(self, w_OI: Tensor) -> Tensor: ...  # as the module keeps it
    def set_weight(self, module: nn.Module, w_OI: Tensor) -> None: ...


Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]  # what a block is called with besides the hidden states


@dataclass(slots=True)
class Block:
    """One resident decoder block. Its weights change only through `install`."""

    index: int
    prefix: str  # "model.layers.3"
    module: nn.Module
    layers: Mapping[str, LinearLike]  # its linear layers, by name inside the block
    arguments: Callable[[tuple[int, int]], Arguments]  # by the (B, S) of the hidden states
    installed: dict[str, Stored] = field(default_factory=dict)
    unrounded: dict[str, Tensor] | None = None  # [O, I] of the layers that were packed, before that; None: not kept
    rounded: Mapping[str, InputRounding] = field(default_factory=dict)  # layers that round what they multiply by
    cache: CacheScales | None = None  # how it rounds keys and values (compressor/kv_cache.py)
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)  # of its dense parameters in the checkpoint

    def weight(self, name: str) -> Tensor:
        """The current weight [O, I] of a layer; a view, not to be written to."""
        return self.layers[name].weight(self.module.get_submodule(name))

    def shape(self, name: str) -> tuple[int, int]:
        """(out_features, in_features) of a layer."""
        rows, columns = self.weight(name).shape
        return rows, columns

    def forward(self, hidden_BSD: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """The block's output [B, S, D] on full sequences without padding, positions from 0.

        Args:
            hidden_BSD: What enters the block.
            weights: Dense, named as in `Edits`, used in this call instead of the block's own.

        Raises:
            SourceError: the architecture's blocks return more than hidden states.
        """
        args, kwargs = self.arguments((hidden_BSD.shape[0], hidden_BSD.shape[1]))
        given = dict(self._parameter(name, new) for name, new in (weights or {}).items())
        with rounded_inputs(self.module, self.rounded), rounded_cache(self.module, self.cache):
            result = torch.func.functional_call(self.module, given, (hidden_BSD, *args), dict(kwargs))
        if not isinstance(result, Tensor):
            raise SourceError(
                f"{self.prefix}: its blocks return a {type(result).__name__} where hidden states are needed; "
                "this architecture cannot be streamed block by block yet, only `rtn` without evaluation can compress it"
            )
        return result

    def trying(self, *trials: Trial) -> Callable[[Tensor], Tensor]:
        """`forward` as it would be with new weights installed, which they are not."""
        skipped = {name for trial in trials for name in trial.skips}
        if any(trial.whole for trial in trials):
            return lambda hidden_BSD: hidden_BSD
        given = {name: new for trial in trials for name, new in trial.weights.items()}
        weights = {name: new for name, new in given.items() if name.partition(".")[0] not in skipped}
        kept = {name: how for name, how in self.rounded.items() if name not in weights}
        rounded = {name: how for trial in trials for name, how in trial.rounded.items()}
        tried = replace(self, rounded={**kept, **rounded})

        def forward(hidden_BSD: Tensor) -> Tensor:
            with without(self.module, skipped):
                return tried.forward(hidden_BSD, weights)

        return forward

    def dense_forward(self, hidden_BSD: Tensor) -> Tensor:
        """What `forward` would return had nothing been packed; what else passes changed, norms say, counts."""
        assert self.unrounded is not None
        return replace(self, rounded={}, cache=None).forward(hidden_BSD, self.unrounded)

    def install(self, edits: Edits) -> None:
        """Adopt new weights: their values and how they round activations for later forwards, what is stored for the writer.

        What is dense may still be packed by a later pass, so it is rounded to the checkpoint's dtype only by `settle`.
        """
        for name, new in edits.items():
            if self.unrounded is not None and isinstance(new, QuantizedTensor):
                self.unrounded.setdefault(name, self.weight(name))
            self._set(name, dense(new))
            self.installed[name] = new
        self.rounded = {name: how for name, how in self.rounded.items() if name not in edits} | _roundings(edits)

    def settle(self) -> None:
        """Round what passes made and left dense to the dtype it is stored in: later blocks see what will be read back."""
        for name, new in self.installed.items():
            if isinstance(new, Tensor):
                stored = new.to(self.dtypes[f"{name}.weight" if name in self.layers else name])
                self.installed[name] = stored
                self._set(name, stored)

    def _parameter(self, name: str, new: Tensor) -> tuple[str, Tensor]:
        """Name and value of the module's parameter that an edit is for."""
        return (f"{name}.weight", self.layers[name].parameter(new)) if name in self.layers else (name, new)

    def _set(self, name: str, new: Tensor) -> None:
        if name in self.layers:
            self.layers[name].set_weight(self.module.get_submodule(name), new)
            return
        parent, _, leaf = name.rpartition(".")
        old = self.module.get_parameter(name)
        setattr(self.module.get_submodule(parent), leaf, nn.Parameter(new.to(old), requires_grad=False))


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
    """What the calibration stream collected on one block."""

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
    """What a pass did to (a part of) a block."""

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
