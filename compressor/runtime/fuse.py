"""Prepare a model whose packed layers are in memory: fuse them, choose their kernels, compile these.

Layers that read the same activations, packed alike, become one: one launch instead of three for q, k and v.
"""

import logging
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from compressor.model.architecture import fused_groups
from compressor.runtime.kernels.dispatch import prepare
from compressor.runtime.kernels.layouts import Layout
from compressor.runtime.kernels.layouts.around import Around
from compressor.runtime.kernels.layouts.tile_order import ROWS
from compressor.runtime.packed_linear import PackedLinear, PackedWeight, StoredLinear, link

log = logging.getLogger(__name__)


def make_ready(model: nn.Module, dtype: torch.dtype) -> None:
    """Link and fuse, and do before the first token what would delay it; what is wrong with a kernel asked for is said here.

    Raises:
        KernelError: a kernel cannot multiply by these weights here, or cannot be compiled.
    """
    link(model)
    fuse(model)
    kinds = {
        (_inner(module.layout).name, next(module.buffers()).device, module.kernel)
        for module in model.modules()
        if isinstance(module, PackedWeight)
    }
    for layout, device, kernel in sorted(kinds, key=str):
        prepare(layout, device, dtype, kernel)
    slow = Counter(module.format.label for module in model.modules() if isinstance(module, StoredLinear))
    for label, count in slow.items():
        log.warning("%s: no kernel takes this; %d layers are dequantised at every call", label, count)


def _inner(layout: Layout) -> Layout:
    """Return the layout as the kernels see it."""
    return layout.inner if isinstance(layout, Around) else layout


def fuse(model: nn.Module) -> int:
    """Fuse q/k/v and gate/up where they are packed alike; each layer stays where it is and gives out its own rows.

    Returns:
        How many weights were made of several.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    groups = [[layers[name] for name in names] for names in fused_groups(layers).values()]
    fusable = [group for group in groups if len(group) > 1 and _alike(group)]
    for group in fusable:
        _join(group)
    return len(fusable)


def _alike(layers: Sequence[PackedLinear]) -> bool:
    """Whether one launch can multiply by all: same layout, whole tiles, the same order of columns, all or none with bias."""
    first = layers[0].packed
    return all(
        layer.packed.takers == 1
        and layer.packed.layout == first.layout
        and layer.packed.layout.by_rows
        and layer.packed.kernel == first.kernel
        and layer.packed.rounding == first.rounding
        and layer.in_features == first.shape[1]
        and layer.out_features % ROWS == 0
        and (layer.bias is None) == (first.bias is None)
        and _equal(layer.packed.parts.get("order"), first.parts.get("order"))
        for layer in layers
    )


def _join(layers: Sequence[PackedLinear]) -> None:
    """Make one weight of several, and each layer a part of it."""
    weights = [layer.packed for layer in layers]
    first = weights[0]
    parts = {
        name: part if name == "order" else torch.cat([weight.parts[name] for weight in weights])
        for name, part in first.parts.items()
    }
    bias = None if first.bias is None else torch.cat([weight.bias for weight in weights if weight.bias is not None])
    rows = sum(layer.out_features for layer in layers)
    whole = PackedWeight(first.layout, parts, (rows, first.shape[1]), bias, first.kernel, len(layers), first.rounding)
    start = 0
    for taker, layer in enumerate(layers):
        layer.packed, layer.rows, layer.taker = whole, slice(start, start + layer.out_features), taker
        start += layer.out_features


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))
