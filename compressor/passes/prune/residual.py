"""A narrower residual stream: every tensor that writes it, scales it or reads it loses the same channels.

The model class determines where the stream runs: an axis of a tensor belongs to it if its length follows `hidden_size`. With
d channels before and d' after, the stream's norms average squares over fewer channels,

    Σ x² / d' + ε' = (d / d') (Σ x² / d + ε)     with  ε' = ε d / d',      so gains become g √(d / d'),

and an embedding that the model multiplies by √d is stored √(d / d') larger. If it is also the head, the last norm reverts
that. The model then computes the same if the dropped channels were zero, whatever the others contain.

Norms of queries and keys use the same ε setting. The effect of ε' on them is smaller than the rounding error of scaling the
weights before them to compensate, so they are not changed.

Sources: Ashkboos et al., "SliceGPT", ICLR 2024, for removing rows and columns; Muralidharan et al., "Compact Language Models
via Pruning and Knowledge Distillation", NeurIPS 2024, for the width of the entire model.

Shape suffixes: V vocabulary, D hidden, S kept channels.
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
SAME = 0.05  # largest relative difference that is explained by rounding to the checkpoint's dtype
TOKENS = 16  # number of tokens for the check that a model computes the same


@dataclass(frozen=True)
class Residual:
    """The location of the residual stream in a model, and the change to a narrower one.

    Args:
        source: The model.
        size: Number of channels of the narrower stream.
        config: Changed entries of config.json.
        axes: Axes of the stream, by name in the model, for each tensor that has one.
        louder: Factor by which the model multiplies its embedding, relative to that of the narrower model.
    """

    source: ModelSource
    size: int
    config: Mapping[str, Any]
    axes: Mapping[str, tuple[int, ...]]
    louder: float

    @classmethod
    def narrowed(cls, source: ModelSource, size: int) -> "Residual":
        """Return the narrower stream of a size.

        Raises:
            SourceError: The model class does not support the size.
            RecipeError: The shapes of its tensors do not follow the size.
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
        """Return the new shapes by name in the checkpoint."""
        found = {}
        for name, axes in self.axes.items():
            stored = self.source.names[name]
            old = self.source.checkpoint.headers[stored].shape
            found[stored] = tuple(self.size if axis in axes else length for axis, length in enumerate(old))
        return found

    @property
    def sketch(self) -> Rewriting:
        """Return the change to config and shapes, without values."""
        return Rewriting({}, config=self.config, shapes=self.shapes)

    def rewriting(self, keep_S: Tensor) -> Rewriting:
        """Return the change that keeps some channels of the stream, in the given order."""
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
        """Check that embedding, first block and head compute the same as with zeros in the dropped channels.

        Raises:
            RecipeError: They do not.
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
    """Return the number of channels of the residual stream.

    Raises:
        RecipeError: config.json has no integer `hidden_size`, or the config no `rms_norm_eps`.
    """
    size = source.raw_config.get("hidden_size")
    if not isinstance(size, int) or not isinstance(getattr(source.model.config, EPS, None), float):
        raise RecipeError(
            f"{source.path}: hidden channels can go where config.json has `hidden_size` and norms take no mean (`{EPS}`); "
            f"model type `{source.raw_config.get('model_type')}` is built otherwise; `prune_depth` may make it smaller"
        )
    return size


def fitting(source: ModelSource, most: int, of: Literal["model", "blocks"], multiple: int | None) -> Residual:
    """Return the widest stream that leaves at most a given number of parameters.

    Args:
        source: The model.
        most: Maximum number of parameters.
        of: Parameters that are counted: those of the entire model, or of its blocks.
        multiple: Divisor of the size. None derives it from the hidden size.

    Raises:
        RecipeError: No size is small enough, or the model class supports none of them.
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
    """Return whether a module's weight multiplies channel by channel."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 1


def _loudness(model: PreTrainedModel) -> float:
    """Return the factor by which a model's embedding multiplies its rows."""
    embedding = model.get_input_embeddings()
    ones = torch.ones(1, 1).expand(embedding.weight.shape)
    return float(torch.func.functional_call(embedding, {"weight": ones}, (torch.zeros(1, dtype=torch.long),))[0, 0])


def _narrow(axes: tuple[int, ...], keep_S: Tensor, factor: float, offset: float, old: Tensor) -> Tensor:
    """Select the kept channels and scale them. The effective factor of a channel is the tensor plus `offset`."""
    for axis in axes:
        old = old.index_select(axis, keep_S)
    return (old + offset) * factor - offset


def _silence(axes: tuple[int, ...], gone_D: Tensor, old: Tensor) -> Tensor:
    for axis in axes:
        old = old.index_fill(axis, gone_D.nonzero().flatten(), 0.0)
    return old


def _glance(source: ModelSource, rewriting: Rewriting, tokens: Tensor) -> Tensor:
    """Return the logits of a model reduced to its first block, fp32."""
    one = ModelSource(source.path, source.device, torch.float32, (*source.rewritings, rewriting))
    block = one.block(0)
    (hidden,) = one.first_inputs([tokens])
    finished = block.forward(hidden.to(one.device))
    one.release(block)
    return next(one.logits([finished])).cpu()
