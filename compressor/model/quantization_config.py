"""`quantization_config` of config.json: which layers are packed, and how. Written for our output, read for anybody's.

Two layouts. `compressed-tensors` holds everything that stock transformers and vLLM can load; byte facts and the JSON were
taken from compressed-tensors 0.20 (https://github.com/vllm-project/compressed-tensors). `compressor` is our own, for the
rest: it lists each packed layer with its format as a recipe would write it.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from compressor import registry
from compressor.errors import RecipeError, SourceError
from compressor.formats.int_group import IntGroup
from compressor.types import Format

STATIC = ("static", "weight")  # kinds of activation order that leave nothing to be stored
COMPRESSED_TENSORS, OWN = "compressed-tensors", "compressor"
PACKED_SUFFIX = ".weight_packed"


def write(formats: Mapping[str, Format], linears: Iterable[str], transposed: Iterable[str]) -> dict[str, Any]:
    """The entry for a model.

    Args:
        formats: Packed layers by their full module name.
        linears: Full names of all `nn.Linear` modules of the model, the head included.
        transposed: Full names of the model's other linear modules (`Conv1D`), which compressed-tensors cannot hold.
    """
    schemes = {layer: fmt.compressed_tensors() for layer, fmt in formats.items()}
    if any(scheme is None for scheme in schemes.values()) or set(transposed) & set(formats):
        layers = {layer: registry.describe(fmt) for layer, fmt in formats.items()}
        return {"quant_method": OWN, "version": 1, "layers": layers}
    distinct: dict[Format, list[str]] = {}
    for layer, fmt in formats.items():
        distinct.setdefault(fmt, []).append(layer)
    groups = {
        f"group_{i}": {
            "targets": ["Linear"] if len(distinct) == 1 else layers,
            "format": "pack-quantized",
            "weights": fmt.compressed_tensors(),
            "input_activations": None,
            "output_activations": None,
        }
        for i, (fmt, layers) in enumerate(distinct.items())
    }
    return {
        "quant_method": COMPRESSED_TENSORS,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": [layer for layer in linears if layer not in formats],
        "config_groups": groups,
    }


def reader(config: Mapping[str, Any], where: str) -> Callable[[str], Format]:
    """A function from a packed layer's full name to its format.

    Raises:
        SourceError: (also by the function) a quantization method, scheme or layer that cannot be read.
    """
    quantization = config.get("quantization_config") or {}
    method = quantization.get("quant_method")
    if method == OWN:
        try:
            formats = {layer: _shipped(spec) for layer, spec in quantization["layers"].items()}
        except (RecipeError, KeyError, AttributeError) as error:
            raise SourceError(f"{where}: quantization_config cannot be read ({error})") from error
        return lambda layer: _found(formats.get(layer), layer, where)
    if method == COMPRESSED_TENSORS:
        try:
            groups = [
                (group.get("targets", []), _from_group({"format": quantization.get("format"), **group}, where))
                for group in quantization.get("config_groups", {}).values()
                if isinstance(group, Mapping)
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SourceError(f"{where}: quantization_config cannot be read ({error})") from error
        return lambda layer: _found(
            next((fmt for targets, fmt in groups if any(_targets(t, layer) for t in targets)), None), layer, where
        )
    raise SourceError(f"{where}: quantized with method `{method}`, which cannot be read; use the original model")


def _shipped(spec: Mapping[str, Any]) -> Format:
    """A format of ours: a checkpoint must not name modules to import."""
    if spec["format"] not in registry.available("format"):
        raise RecipeError(f"no format named `{spec['format']}`")
    fmt: Format = registry.build("format", spec)
    return fmt


def _from_group(group: Mapping[str, Any], where: str) -> Format:
    weights = group.get("weights") or {}
    layout = group.get("format") or "pack-quantized"
    ordered = weights.get("actorder") not in (*STATIC, None, False)
    if layout != "pack-quantized" or group.get("input_activations") or ordered:
        raise SourceError(
            f"{where}: quantized as {layout} with actorder {weights.get('actorder')} and activations "
            f"{group.get('input_activations')}; only packed weights without a stored order can be read"
        )
    if weights.get("type") != "int" or weights.get("strategy") not in ("group", "channel"):
        raise SourceError(
            f"{where}: quantization scheme {weights.get('type')}/{weights.get('strategy')} cannot be read; "
            "only packed integers per group or channel can"
        )
    size = weights.get("group_size") or -1
    return IntGroup(bits=weights["num_bits"], group_size=size, symmetric=weights.get("symmetric", True))


def _targets(target: str, layer: str) -> bool:
    return target in {"Linear", layer} or (target.startswith("re:") and bool(re.match(target[3:], layer)))


def _found(fmt: Format | None, layer: str, where: str) -> Format:
    if fmt is None:
        raise SourceError(f"{where}: layer {layer} is packed but quantization_config does not say how")
    return fmt
