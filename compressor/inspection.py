"""What is in a model directory, from its headers: sizes by kind of tensor, bits per weight with all metadata counted."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from compressor.model.source import ModelSource


@dataclass(frozen=True)
class Kind:
    """Tensors of one kind."""

    name: str
    weights: int  # values the model computes with
    size_bytes: int

    @property
    def bits(self) -> float:
        """Stored bits per weight."""
        return 8 * self.size_bytes / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class Inspection:
    """The content of a model directory."""

    model_type: str
    blocks: int
    layout: str  # `dense`, or the quant_method
    kinds: tuple[Kind, ...]
    weights: int
    size_bytes: int
    bits_per_weight: float  # over the packed layers; over the linear layers of the blocks if none is packed
    model_bits_per_weight: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "kinds": [{**asdict(k), "bits_per_weight": k.bits} for k in self.kinds]}


def inspect_model(path: Path) -> Inspection:
    """Read the headers of a model directory.

    Raises:
        SourceError: it cannot be read.
    """
    source = ModelSource(path, torch.device("cpu"))
    packed = source.packed()
    state = source.model.state_dict()
    bytes_of: dict[str, int] = {}
    for stored, header in source.checkpoint.headers.items():
        base, _, part = stored.rpartition(".")
        owner = f"{base}.weight" if part.startswith("weight_") else stored
        bytes_of[owner] = bytes_of.get(owner, 0) + header.nbytes
    module_of = {stored: module for module, stored in source.names.items()}
    sums: dict[str, tuple[int, int]] = {}
    for stored, count in bytes_of.items():
        module = module_of.get(stored)
        weights = state[module].numel() if module is not None else 0
        kind = _kind(source, module, packed)
        before = sums.get(kind, (0, 0))
        sums[kind] = (before[0] + weights, before[1] + count)
    kinds = tuple(Kind(name, *sums[name]) for name in sorted(sums))
    shown = [k for k in kinds if k.name.startswith("packed ")] or [k for k in kinds if k.name == "linear"]
    total, weights = sum(k.size_bytes for k in kinds), sum(k.weights for k in kinds)
    return Inspection(
        model_type=source.model.config.model_type,
        blocks=len(source.layers),
        layout=(source.raw_config.get("quantization_config") or {}).get("quant_method", "dense"),
        kinds=kinds,
        weights=weights,
        size_bytes=total,
        bits_per_weight=8 * sum(k.size_bytes for k in shown) / max(1, sum(k.weights for k in shown)),
        model_bits_per_weight=8 * total / max(1, weights),
    )


def _kind(source: ModelSource, module: str | None, packed: dict[str, Any]) -> str:
    if module is None:
        return "unknown to the model"
    layer = module.removesuffix(".weight")
    if module.endswith(".weight") and layer in packed:
        return f"packed {packed[layer].label}"
    if not module.startswith(f"{source.prefix}."):
        owner = source.model.get_submodule(module.rpartition(".")[0])
        return "embedding and head" if owner.weight.dim() == 2 else "norms and biases"
    return "linear" if source.model.get_parameter(module).dim() == 2 else "norms and biases"
