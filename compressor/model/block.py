"""Hold one decoder block in memory: its layers, its forward pass, and new weights that are installed or tried.

Shape suffixes: O out_features, I in_features, B samples of a batch, S sequence, D hidden.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from compressor.errors import SourceError
from compressor.formats.base import Edits, QuantizedTensor, Stored, dense
from compressor.formats.numerics.activations import InputRounding, input_rounding, rounded_inputs
from compressor.model.surgery.kv_cache import CacheScales, rounded_cache
from compressor.model.surgery.skip_sublayers import without


def _roundings(edits: Edits) -> dict[str, InputRounding]:
    """Return how layers with new weights round their inputs; layers that do not round them are left out."""
    packed = {name: new for name, new in edits.items() if isinstance(new, QuantizedTensor)}
    found = {name: input_rounding(new.format, new.parts.__getitem__) for name, new in packed.items()}
    return {name: how for name, how in found.items() if how is not None}


@dataclass(frozen=True, slots=True)
class Trial:
    """New weights, ready to be tried."""

    weights: Mapping[str, Tensor]  # dense, named as in `Edits`
    rounded: Mapping[str, InputRounding]
    skips: tuple[str, ...] = ()  # sub-layers that are skipped (compressor/model/surgery/skip_sublayers.py)
    whole: bool = False  # whether the whole block is skipped

    @classmethod
    def of(cls, edits: Edits, device: torch.device, dtype: torch.dtype) -> "Trial":
        """Move edits to a device, in the dtype of the computation."""
        there = {name: _moved(new, device) for name, new in edits.items()}
        return cls({name: dense(new).to(dtype) for name, new in there.items()}, _roundings(there))


def _moved(new: Stored, device: torch.device) -> Stored:
    if isinstance(new, QuantizedTensor):
        return replace(new, parts={name: part.to(device) for name, part in new.parts.items()})
    return new.to(device)


class LinearLike(Protocol):
    """Reads and writes the weight of one kind of linear module as [out_features, in_features]."""

    def weight(self, module: nn.Module) -> Tensor: ...
    def parameter(self, w_OI: Tensor) -> Tensor: ...  # in the module's own layout
    def set_weight(self, module: nn.Module, w_OI: Tensor) -> None: ...


Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]  # arguments of a block besides the hidden states


@dataclass(slots=True)
class Block:
    """One resident decoder block. Its weights change only through `install`."""

    index: int
    prefix: str  # "model.layers.3"
    module: nn.Module
    layers: Mapping[str, LinearLike]  # linear layers, by name inside the block
    arguments: Callable[[tuple[int, int]], Arguments]  # from the shape (B, S) of the hidden states
    installed: dict[str, Stored] = field(default_factory=dict)
    unrounded: dict[str, Tensor] | None = None  # weights [O, I] of packed layers before rounding; None: not kept
    rounded: Mapping[str, InputRounding] = field(default_factory=dict)  # how layers round their inputs, if they do
    cache: CacheScales | None = None  # scales of keys and values (compressor/model/surgery/kv_cache.py)
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)  # dtypes of dense parameters in the checkpoint

    def weight(self, name: str) -> Tensor:
        """Return the current weight [O, I] of a layer: a view that must not be written to."""
        return self.layers[name].weight(self.module.get_submodule(name))

    def shape(self, name: str) -> tuple[int, int]:
        """Return (out_features, in_features) of a layer."""
        rows, columns = self.weight(name).shape
        return rows, columns

    def forward(self, hidden_BSD: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the block's output [B, S, D] on full sequences without padding, positions from 0.

        Args:
            hidden_BSD: Hidden states that enter the block.
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
        """Return `forward` as it would be with new weights installed, without installing them."""
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
        """Return the output of `forward` with the packed layers replaced by their dense weights. Other changes, to norms for
        example, stay in effect.
        """
        assert self.unrounded is not None
        return replace(self, rounded={}, cache=None).forward(hidden_BSD, self.unrounded)

    def install(self, edits: Edits) -> None:
        """Adopt new weights: their values and input rounding for later forwards, their stored form for the writer.

        What is dense may still be packed by a later pass, so it is rounded to the checkpoint's dtype only by `settle`.
        """
        for name, new in edits.items():
            if self.unrounded is not None and isinstance(new, QuantizedTensor):
                self.unrounded.setdefault(name, self.weight(name))
            self._set(name, dense(new))
            self.installed[name] = new
        self.rounded = {name: how for name, how in self.rounded.items() if name not in edits} | _roundings(edits)

    def settle(self) -> None:
        """Round weights that passes left dense to the dtype on disk, so that later blocks see the stored values."""
        for name, new in self.installed.items():
            if isinstance(new, Tensor):
                stored = new.to(self.dtypes[f"{name}.weight" if name in self.layers else name])
                self.installed[name] = stored
                self._set(name, stored)

    def _parameter(self, name: str, new: Tensor) -> tuple[str, Tensor]:
        """Return name and value of the module's parameter that an edit changes."""
        return (f"{name}.weight", self.layers[name].parameter(new)) if name in self.layers else (name, new)

    def _set(self, name: str, new: Tensor) -> None:
        if name in self.layers:
            self.layers[name].set_weight(self.module.get_submodule(name), new)
            return
        parent, _, leaf = name.rpartition(".")
        old = self.module.get_parameter(name)
        setattr(self.module.get_submodule(parent), leaf, nn.Parameter(new.to(old), requires_grad=False))
