"""A narrower residual stream: every tensor that writes it, scales it or reads it loses the same channels.

Where the stream runs is told by the model class: an axis of a tensor belongs to it if its length follows `hidden_size`. With
d channels before and d' after, the stream's norms divide by the mean square of fewer channels, of which all matter,

    Σ x² / d' + ε' = (d / d') (Σ x² / d + ε)     with  ε' = ε d / d',      so gains become g √(d / d'),

and an embedding that is multiplied by √d when it is read is stored √(d / d') larger; if it is the head too, the last norm
takes that back. Nothing then changes if the channels that go were zero, whatever is in the others.

Norms of queries and keys share the stream's ε. What ε' changes in them is less than what rounding would if the weights before
them were scaled for it, so they stay as they are.

Sources: Ashkboos et al., "SliceGPT", ICLR 2024, for taking rows and columns away; Muralidharan et al., "Compact Language
Models via Pruning and Knowledge Distillation", NeurIPS 2024, for the width of the whole model.

Shape suffixes: V vocabulary, D hidden, S channels that stay.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compressor.errors import RecipeError, SourceError
from compressor.model.dataflow import gain_offset
from compressor.model.edited import Rewriting
from compressor.model.hf_config.decilm import runs_code
from compressor.model.source import ModelSource, skeleton
from compressor.model.surgery.resize import narrow
from compressor.passes.prune.shapes import multiple_of, parameters

EPS = "rms_norm_eps"
SAME = 0.05  # relative difference that rounding to the checkpoint's dtype can make
TOKENS = 16  # that are sent through a model to see whether it computes the same


@dataclass(frozen=True)
class Residual:
    """Where the residual stream runs, in a model and in one in which it is narrower.

    Args:
        source: The model.
        size: Channels of the narrower one.
        config: Entries of config.json that differ.
        axes: Axes of the stream, by the name in the model of each tensor that has one.
        louder: By how much less the narrower model multiplies its embedding.
    """

    source: ModelSource
    size: int
    config: Mapping[str, Any]
    axes: Mapping[str, tuple[int, ...]]
    louder: float

    @classmethod
    def narrowed(cls, source: ModelSource, size: int) -> "Residual":
        """To a size.

        Raises:
            SourceError: the model class does not take it.
            RecipeError: its tensors do not follow the size.
        """
        width, config = hidden_size(source), source.model.config
        changes: dict[str, Any] = {"hidden_size": size, EPS: getattr(config, EPS) * width / size}
        heads = [
            module.head_dim for module in source.layers[0].modules() if isinstance(getattr(module, "head_dim", None), int)
        ]
        if heads:
            changes["head_dim"] = heads[0]
        small = skeleton(source.path, source.dtype, {**source.config_changes, **changes})
        narrow(small, source.widths, str(source.path))
        new, axes = small.state_dict(), {}
        for name, tensor in source.model.state_dict().items():
            if name not in source.names:
                continue
            pairs = list(zip(tensor.shape, new[name].shape, strict=True))
            axes[name] = tuple(axis for axis, (before, after) in enumerate(pairs) if before != after)
            if any(pairs[axis] != (width, size) for axis in axes[name]):
                raise RecipeError(
                    f"{source.path}: {name} has shape {list(tensor.shape)} with {width} hidden channels and "
                    f"{list(new[name].shape)} with {size}, so it cannot be told which of its numbers belong to a channel"
                )
        louder = _loudness(source.model) / _loudness(small)
        return cls(source, size, changes, {name: found for name, found in axes.items() if found}, louder)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By name on disk."""
        found = {}
        for name, axes in self.axes.items():
            stored = self.source.names[name]
            old = self.source.checkpoint.headers[stored].shape
            found[stored] = tuple(self.size if axis in axes else length for axis, length in enumerate(old))
        return found

    @property
    def sketch(self) -> Rewriting:
        """Without values."""
        return Rewriting({}, config=self.config, shapes=self.shapes)

    def rewriting(self, keep_S: Tensor) -> Rewriting:
        """The model with some channels of the stream, in their order."""
        model, grown = self.source.model, math.sqrt(hidden_size(self.source) / self.size)
        embedding, head = self.source.ends
        tied = bool({embedding, head} & set(self.source.tied))
        tensors = {}
        for name, axes in self.axes.items():
            factor, offset, module = 1.0, 0.0, model.get_submodule(name.rpartition(".")[0])
            if name == embedding or (tied and name == head):
                factor = self.louder
            elif is_norm(module):
                last = tied and not name.startswith(f"{self.source.prefix}.")
                factor, offset = grown / (self.louder if last else 1.0), gain_offset(module)
            tensors[self.source.names[name]] = partial(_narrow, axes, keep_S, factor, offset)
        return replace(self.sketch, tensors=tensors)

    @torch.no_grad()
    def check(self, keep_S: Tensor) -> None:
        """See that embedding, first block and head compute the same as with zeros in what goes.

        Raises:
            RecipeError: they do not.
        """
        gone = torch.ones(hidden_size(self.source), dtype=torch.bool)
        gone[keep_S] = False
        silent = {
            self.source.names[name]: partial(_silence, axes, gone)
            for name, axes in self.axes.items()
            if not is_norm(self.source.model.get_submodule(name.rpartition(".")[0]))
        }
        tokens = torch.arange(TOKENS)[None] % self.source.vocab_size
        expected, found = (
            _glance(self.source, rewriting, tokens) for rewriting in (Rewriting(silent), self.rewriting(keep_S))
        )
        missed = float((found - expected).norm() / expected.norm())
        if not missed <= SAME:
            raise RecipeError(
                f"{self.source.path}: `{self.source.model.config.model_type}` is off by {missed:.0%} without hidden channels "
                "that are zero: something in it depends on how many there are; blocks may be narrowed with `prune_width`, or "
                "go with `prune_depth`"
            )


def hidden_size(source: ModelSource) -> int:
    """Channels of the residual stream.

    Raises:
        RecipeError: config.json does not have it in the usual place.
    """
    size = source.raw_config.get("hidden_size")
    if not isinstance(size, int) or not isinstance(getattr(source.model.config, EPS, None), float):
        raise RecipeError(
            f"{source.path}: hidden channels can go where config.json has `hidden_size` and norms take no mean (`{EPS}`); "
            f"model type `{source.raw_config.get('model_type')}` is built otherwise; `prune_depth` may make it smaller"
        )
    return size


def fitting(source: ModelSource, most: int, of: Literal["model", "blocks"], multiple: int | None) -> Residual:
    """The widest that leaves so many parameters at most.

    Args:
        source: The model.
        most: Parameters that may be left.
        of: Counted in the whole model, or in its blocks.
        multiple: Divisor of the size; None takes what suits it.

    Raises:
        RecipeError: none is that small, or its model class takes none of them.
    """
    if source.absent:
        raise RecipeError(
            f"{source.path}: {len(source.absent)} attentions and MLPs are missing; hidden channels have to go before those do"
        )
    if runs_code(source.raw_config):
        raise RecipeError(
            f"{source.path}: its MLPs have widths of their own; hidden channels have to go before they get those"
        )
    width, refused = hidden_size(source), ""
    step, least, floor = multiple or multiple_of(width), parameters(source, of), width
    for size in range((width - 1) // step * step, 0, -step):
        try:
            found = Residual.narrowed(source, size)
        except SourceError as error:
            refused = str(error).rpartition(": ")[2]
            continue
        least, floor = parameters(source, of, found.shapes), size
        if least <= most:
            return found
    raise RecipeError(
        f"prune_hidden: {most:,} parameters of the {of} cannot be reached with fewer hidden channels alone, in steps of "
        f"{step}: with {floor} of {width} there are {least:,}; give a smaller ratio or another multiple, or take from the "
        "blocks too with prune_width or prune_depth"
        + (f"; `{source.raw_config['model_type']}` refuses sizes: {refused}" if refused else "")
    )


def is_norm(module: nn.Module) -> bool:
    """Whether a module's weight multiplies channel by channel."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 1


def _loudness(model: PreTrainedModel) -> float:
    """Return the factor that a model's embedding multiplies its rows by."""
    embedding = model.get_input_embeddings()
    ones = torch.ones(1, 1).expand(embedding.weight.shape)
    return float(torch.func.functional_call(embedding, {"weight": ones}, (torch.zeros(1, dtype=torch.long),))[0, 0])


def _narrow(axes: tuple[int, ...], keep_S: Tensor, factor: float, offset: float, old: Tensor) -> Tensor:
    """The channels that stay; what they are multiplied by is `offset` more than the tensor."""
    for axis in axes:
        old = old.index_select(axis, keep_S)
    return (old + offset) * factor - offset


def _silence(axes: tuple[int, ...], gone_D: Tensor, old: Tensor) -> Tensor:
    for axis in axes:
        old = old.index_fill(axis, gone_D.nonzero().flatten(), 0.0)
    return old


def _glance(source: ModelSource, rewriting: Rewriting, tokens: Tensor) -> Tensor:
    """Logits of a model as if it had the first block alone, fp32."""
    one = ModelSource(source.path, source.device, torch.float32, (*source.rewritings, rewriting))
    block = one.block(0)
    (hidden,) = one.first_inputs([tokens])
    finished = block.forward(hidden.to(one.device))
    one.release(block)
    return next(one.logits([finished])).cpu()
