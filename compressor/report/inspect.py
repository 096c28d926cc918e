"""Inspection of a model directory from its headers: sizes by kind and by tensor, metadata included, and compatibility."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.formats.base import Format
from compressor.host import known_state
from compressor.model.shards import NAMES
from compressor.model.source import ModelSource
from compressor.report.compatibility import Runtime, runtimes

CACHE = "scales of the cache"


@dataclass(frozen=True)
class Kind:
    """Tensors of one kind."""

    name: str
    weights: int  # number of values that the model computes with
    size_bytes: int

    @property
    def bits(self) -> float:
        """Stored bits per weight."""
        return _bits(self.size_bytes, self.weights)


@dataclass(frozen=True)
class Part:
    """One stored tensor."""

    name: str  # in the file
    dtype: str  # its name in safetensors
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Parameter:
    """A tensor of the model with all stored tensors that belong to it: codes, scales, shapes."""

    name: str  # in the file; for a packed layer the name that its dense weight would have
    kind: str
    weights: int  # number of values that the model computes with; 0 if it does not know the tensor
    size_bytes: int
    parts: tuple[Part, ...]

    @property
    def bits(self) -> float:
        """Stored bits per weight."""
        return _bits(self.size_bytes, self.weights)


@dataclass(frozen=True)
class Inspection:
    """The content of a model directory."""

    model_type: str
    blocks: int
    layout: str  # `dense`, or the quant_method
    kv_cache: str | None  # element type that keys and values are rounded to
    turned: int  # number of layers whose activations are rotated by a Hadamard matrix at run time
    absent: int  # number of attentions and MLPs that were dropped
    uneven: bool  # whether blocks differ in width
    kinds: tuple[Kind, ...]
    tensors: tuple[Parameter, ...]
    runtimes: tuple[Runtime, ...]
    weights: int
    size_bytes: int
    bits_per_weight: float  # over the packed layers; over the linear layers of the blocks if none is packed
    model_bits_per_weight: float
    warnings: tuple[str, ...]  # about tensors that the model does not use

    def share(self, entry: Kind | Parameter) -> float:
        """Return the share of all bytes that one entry takes."""
        return entry.size_bytes / max(1, self.size_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""

        def sized(entry: Kind | Parameter) -> dict[str, Any]:
            return {**asdict(entry), "bits_per_weight": entry.bits, "share": self.share(entry)}

        return {**asdict(self), "kinds": [*map(sized, self.kinds)], "tensors": [*map(sized, self.tensors)]}


@known_state()
def inspect_model(path: Path) -> Inspection:
    """Read the headers of a model directory.

    Raises:
        SourceError: it cannot be read.
    """
    source = ModelSource(path, torch.device("cpu"))
    tensors = _parameters(source)
    kinds = tuple(
        Kind(name, sum(t.weights for t in tensors if t.kind == name), sum(t.size_bytes for t in tensors if t.kind == name))
        for name in sorted({t.kind for t in tensors})
    )
    shown = [k for k in kinds if k.name.startswith("packed ")] or [k for k in kinds if k.name == "linear"]
    total, weights = sum(k.size_bytes for k in kinds), sum(k.weights for k in kinds)
    return Inspection(
        model_type=source.model.config.model_type,
        blocks=len(source.layers),
        layout=(source.raw_config.get("quantization_config") or {}).get("quant_method", "dense"),
        kv_cache=source.cache.kv_cache if source.cache is not None else None,
        turned=len(source.hadamard),
        absent=len(source.absent),
        uneven=bool(source.widths),
        kinds=kinds,
        tensors=tensors,
        runtimes=runtimes(source),
        weights=weights,
        size_bytes=total,
        bits_per_weight=8 * sum(k.size_bytes for k in shown) / max(1, sum(k.weights for k in shown)),
        model_bits_per_weight=8 * total / max(1, weights),
        warnings=source.unused.warnings,
    )


def _parameters(source: ModelSource) -> tuple[Parameter, ...]:
    """Return the stored tensors, grouped by the model tensor they belong to, in the order of the files."""
    headers, packed, state = source.checkpoint.headers, source.packed(), source.model.state_dict()
    of_cache = source.cache_tensors()
    owned: dict[str, list[str]] = {}
    for stored in headers:
        owned.setdefault(source.packing.owner(stored), []).append(stored)
    module_of = {stored: module for module, stored in source.names.items()}
    return tuple(
        Parameter(
            name=owner,
            kind=CACHE if owner in of_cache else _kind(source, module_of.get(owner), packed, state),
            weights=state[module_of[owner]].numel() if owner in module_of else 0,
            size_bytes=sum(headers[name].nbytes for name in names),
            parts=tuple(Part(name, NAMES[headers[name].dtype], headers[name].shape) for name in sorted(names)),
        )
        for owner, names in owned.items()
    )


def _kind(source: ModelSource, module: str | None, packed: dict[str, Format], state: Mapping[str, Tensor]) -> str:
    if module is None:
        return "unknown to the model"
    layer = module.removesuffix(".weight")
    if module.endswith(".weight") and layer in packed:
        return f"packed {packed[layer].label}"
    owner = source.model.get_submodule(module.rpartition(".")[0])
    if isinstance(owner, nn.Embedding) or owner is source.model.get_output_embeddings():
        return "embedding and head"
    if state[module].dim() < 2:
        return "norms and biases"
    return "linear" if module.startswith(f"{source.prefix}.") else "outside the blocks"


def _bits(size_bytes: int, weights: int) -> float:
    return 8 * size_bytes / weights if weights else 0.0
