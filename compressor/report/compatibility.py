"""Compatibility with runtimes: which can load a model directory, and why the others cannot.

The first two were tested. The others were not run; the rules come from reading their sources: vLLM
(`compressed_tensors.py`, `compressed_tensors_wNa16.py`, `compressed_tensors/utils.py`, `marlin_utils.py`, `auto_gptq.py`),
SGLang (the same files), llama.cpp.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import frexp
from typing import Any

from compressor.formats.base import Format
from compressor.formats.gptq_int import GptqInt
from compressor.formats.int_group import IntGroup
from compressor.formats.numerics.activations import bits, way
from compressor.formats.numerics.float_grid import FloatFormat
from compressor.formats.nvfp4 import NVFP4
from compressor.model.architecture import FLATTENING, fused_groups, linear_layers
from compressor.model.hf_config.decilm import ROUND, rounded, runs_code
from compressor.model.hf_config.quantization_config import OWN, STOCK_NEEDS
from compressor.model.source import ModelSource

TRUST = " (--trust-remote-code)"
KERNEL_BITS = (4, 8)  # widths of the kernels for 16-bit activations (Marlin) in vLLM and SGLang
SERVED_FLOATS = frozenset({
    "nvfp4", "nvfp4-nvfp4", "mxfp4", "fp8-tensor", "fp8-channel", "fp8-tensor-fp8", "fp8-channel-fp8",
    "fp8-tensor-fp8-static", "fp8-channel-fp8-static", "fp8-block-fp8-block",
})  # fmt: skip
KERNEL_GROUPS = (-1, 32, 64, 128)
SAME_IN_EVERY_VERSION = (2, 4, 8)  # compressed-tensors before 0.18 packed other widths differently


@dataclass(frozen=True)
class Runtime:
    """One runtime's ability to load a model."""

    name: str
    loads: bool
    reason: str  # what loading requires, or what prevents it
    tried: bool  # False: known from its source, not run

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


def runtimes(source: ModelSource) -> tuple[Runtime, ...]:
    """Return the compatibility of every runtime with a model that we could open."""
    packed = source.packed()
    layout = (source.raw_config.get("quantization_config") or {}).get("quant_method")
    named = source.raw_config.get("architectures") or [source.model.config.model_type]
    foreign = f"does not know the layout `{OWN}`: it would start from random weights" if layout == OWN else None
    if source.hadamard:
        foreign = f"does not turn the activations of {len(source.hadamard)} layers, as `rotate` with online: true asks for"
    stock = foreign or next(_stock_obstacles(packed), None) or per_tensor(source)
    served = foreign or next(_serving_obstacles(source, packed), None) or next(_cache_obstacles(source), None)
    needs = f"if it knows {named[0]}"
    odd = any(fmt.bits not in SAME_IN_EVERY_VERSION for fmt in packed.values() if isinstance(fmt, IntGroup) and fmt.packed)
    packages = f"{' and '.join(STOCK_NEEDS.get(layout or '', ()))}{' 0.18 or newer' if odd else ''}"
    install = f"with {packages} installed" if layout else "as any dense model"
    widths = sorted({fmt.bits for fmt in packed.values() if isinstance(fmt, IntGroup)} - set(KERNEL_BITS))
    narrow = any(isinstance(fmt, IntGroup) and fmt.activations and fmt.bits == 4 for fmt in packed.values())
    humming = f"{needs} and has Humming kernels, as newer versions do, for {_list(widths)} bits" if widths else needs
    humming = f"{humming}, on Arm processors and Intel GPUs" if narrow else humming
    too_odd = f"its kernels take {_list(KERNEL_BITS)} bits, this model has layers of {_list(widths)}" if widths else None
    too_odd = too_odd or ("with activations of 8 bits it takes weights of 8 bits only" if narrow else None)
    gguf = "reads GGUF files only" + ("" if layout else "; its convert_hf_to_gguf.py makes one")
    if runs_code(source.raw_config):
        install, humming, needs = f"{install}, with trust_remote_code=True", f"{humming}{TRUST}", f"{needs}{TRUST}"
        odd_widths = f"reads GGUF files only; this takes multiples of {ROUND} channels"
        gguf = gguf if layout or rounded(source.raw_config) else odd_widths
    return (
        Runtime("compressor", True, "compressor.load", True),
        Runtime("transformers", stock is None, stock or install, True),
        Runtime("vLLM", served is None, served or humming, False),
        Runtime("SGLang", (served or too_odd) is None, served or too_odd or needs, False),
        Runtime("llama.cpp", False, gguf, False),
    )


def _stock_obstacles(packed: Mapping[str, Format]) -> Iterator[str]:
    """Yield what prevents transformers from loading a model whose layout it knows."""
    for layer, fmt in packed.items():
        if isinstance(fmt, IntGroup) and fmt.packed and not fmt.symmetric:
            yield f"{layer}: packed zero points do not reload"


def activation_bits(source: ModelSource) -> int | None:
    """Return the fewest bits that any layer rounds its input to; None if no layer does."""
    return min((bits(name) for name in map(way, source.packed().values()) if name is not None), default=None)


def stock_dtype(source: ModelSource) -> str:
    """Return the precision of dequantized weights in transformers.

    It is bfloat16, to which NVFP4 weights are rounded, if a divisor is not a power of two; else the rounding has no effect,
    and it is float32.
    """
    layers = [layer for layer, fmt in source.packed().items() if isinstance(fmt, NVFP4)]
    return "bfloat16" if any(frexp(_divisor(source, layer))[0] != 0.5 for layer in layers) else "float32"


def _cache_obstacles(source: ModelSource) -> Iterator[str]:
    """Yield what prevents engines from rounding keys and values as in calibration."""
    if source.cache is not None and source.cache.kv_cache != "fp8":
        yield f"its caches hold fp8, this model was made for one of {source.cache.kv_cache}"


def per_tensor(source: ModelSource) -> str | None:
    """Return a warning if compressed-tensors would round activations by one scale for all tokens; None otherwise.

    This happens if activations lose their batch dimension before they enter a layer.
    """
    kind = source.model.config.model_type
    if kind not in FLATTENING or activation_bits(source) is None:
        return None
    return f"some layers of `{kind}` get activations [tokens, channels]; compressed-tensors rounds those by one scale for all"


def _serving_obstacles(source: ModelSource, packed: Mapping[str, Format]) -> Iterator[str]:
    """Yield what prevents engines from serving a model: differences between fused layers, and limits of their kernels."""
    for group, layers in fused_groups(linear_layers(source.model)).items():
        schemes = {packed[layer].label if layer in packed else "dense" for layer in layers}
        if len(schemes) > 1:
            yield f"{group}: its layers are fused, which must be stored alike, but are {' and '.join(sorted(schemes))}"
        elif len({_divisor(source, layer) for layer in layers if isinstance(packed.get(layer), NVFP4)}) > 1:
            yield f"{group}: its layers are fused, and the largest weight_global_scale taken for all, but theirs differ"
    for layer, fmt in packed.items():
        if isinstance(fmt, IntGroup) and fmt.activations:
            yield from (f"{layer}: {obstacle}" for obstacle in _rounding_obstacles(fmt))
            continue
        if isinstance(fmt, FloatFormat) and fmt.label not in SERVED_FLOATS:
            yield f"{layer}: for weights and activations stored as {fmt.label} no kernels are known"
        if isinstance(fmt, IntGroup | GptqInt) and fmt.group_size not in KERNEL_GROUPS:
            yield f"{layer}: group_size {fmt.group_size} is none of {_list(KERNEL_GROUPS)}, which the kernels take"
        if isinstance(fmt, IntGroup) and not fmt.packed:
            yield f"{layer}: a byte for each code is taken with activations of 8 bits only"
        if isinstance(fmt, GptqInt) and (fmt.bits not in KERNEL_BITS or not fmt.symmetric):
            yield f"{layer}: stored as {fmt.label}, of which the kernels take {_list(KERNEL_BITS)} bits without zero points"


def _divisor(source: ModelSource, layer: str) -> float:
    return float(source.checkpoint.read(source.beside(f"{layer}.weight_global_scale")))


def _rounding_obstacles(fmt: IntGroup) -> Iterator[str]:
    """Yield what prevents engines from multiplying as integers."""
    if fmt.packed:
        yield "with activations of 8 bits a byte for each code is taken only; set packed: false"
    if not fmt.symmetric or fmt.bits not in KERNEL_BITS:
        yield f"with activations of 8 bits, weights of {_list(KERNEL_BITS)} bits without zero points are taken"
    if fmt.bits == 8 and fmt.group_size != -1:
        yield "with activations of 8 bits, weights of 8 bits have one scale a row; set group_size: -1"


def _list(numbers: tuple[int, ...] | list[int]) -> str:
    return ", ".join(map(str, numbers))
