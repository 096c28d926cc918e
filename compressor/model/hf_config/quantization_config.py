"""`quantization_config` of config.json: which layers are packed, and how. Written for our output, read for anybody's.

Three layouts are written. `compressed-tensors` holds everything that stock transformers and vLLM can load; byte facts and the
JSON were taken from compressed-tensors 0.20 (https://github.com/vllm-project/compressed-tensors). `gptq` is for one format
(compressor/model/hf_config/gptq.py). `compressor` is our own, for the rest: it lists each packed layer with its format as a
recipe would write it.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from types import MappingProxyType
from typing import Any

from compressor.errors import RecipeError, SourceError
from compressor.formats.base import Format
from compressor.formats.fp8 import FP8
from compressor.formats.gptq_int import GptqInt
from compressor.formats.int_group import IntGroup
from compressor.formats.mxfp4 import MXFP4
from compressor.formats.mxfp8 import MXFP8
from compressor.formats.numerics.activations import SCHEMES
from compressor.formats.nvfp4 import NVFP4
from compressor.model.hf_config.gptq import AUTO_ROUND, GPTQ, Reader, auto_round_reader, gptq_reader, refuse_set, write_gptq
from compressor.model.surgery.kv_cache import CacheRounding, read_scheme
from compressor.model.surgery.online_hadamard import Blocks, largest_block
from compressor.reading import cause, elide
from compressor.recipe import registry
from compressor.recipe.expressions import expressions

STATIC = ("static", "weight")  # kinds of activation order that leave nothing to be stored
COMPRESSED_TENSORS, OWN = "compressed-tensors", "compressor"
CACHE = "kv_cache_scheme"
HADAMARD = "hadamard"
ABSENT = "absent"
WIDTHS = "widths"
STOCK_NEEDS = {
    COMPRESSED_TENSORS: ("compressed-tensors",),
    GPTQ: ("optimum", "gptqmodel"),
    AUTO_ROUND: ("auto-round",),
}  # packages
LAYOUTS = {"pack-quantized": True, "int-quantized": False}  # of compressed-tensors; whether codes are packed
FLOATS: Mapping[str, Sequence[NVFP4 | MXFP4 | MXFP8 | FP8]] = {
    "nvfp4-pack-quantized": [NVFP4(), NVFP4(activations="nvfp4"), NVFP4(activations="fp8")],
    "mxfp4-pack-quantized": [MXFP4(), MXFP4(activations="mxfp4"), MXFP4(activations="mxfp8")],
    "mxfp8-quantized": [MXFP8(), MXFP8(activations="mxfp8")],
    "float-quantized": [
        FP8(scales=scales, activations=way)
        for scales in ("tensor", "channel", "block")
        for way in (None, "fp8", "fp8-block", "fp8-static")
    ],
}  # the layouts of numbers of a kind each: all that can be read
WEIGHTS = ("num_bits", "type", "strategy", "group_size", "block_structure")  # what tells numbers apart
INPUTS = ("num_bits", "type", "symmetric", "strategy", "group_size", "dynamic")
STRATEGIES = ("group", "channel")


def write(
    formats: Mapping[str, Format],
    linears: Iterable[str],
    transposed: Iterable[str],
    cache: CacheRounding | None = None,
    hadamard: Blocks = MappingProxyType({}),
    absent: Set[str] = frozenset(),
    widths: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, Any]:
    """The entry for a model.

    Args:
        formats: Packed layers by their full module name.
        linears: Full names of all `nn.Linear` modules of the model, the head included.
        transposed: Full names of the model's other linear modules (`Conv1D`), which the layouts of others cannot hold.
        cache: How keys and values are rounded, if they are.
        hadamard: Layers whose activations are turned, by full name: transformers passes over what other layouts say of such.
        absent: Sub-layers that the model does without, by full name, which others know nothing of.
        widths: Sub-layers that are narrower than the config says, by full name; as little.
    """
    scheme = None if cache is None else cache.scheme()
    distinct: dict[Format, list[str]] = {}
    for layer, fmt in formats.items():
        distinct.setdefault(fmt, []).append(layer)
    plain = not hadamard and not absent and not widths and not set(transposed) & set(formats)
    first = next(iter(distinct), None)
    if plain and len(distinct) == 1 and isinstance(first, GptqInt) and first.portable and cache is None:
        return write_gptq(first, formats, linears)
    schemes = {fmt: fmt.compressed_tensors() for fmt in distinct}
    if not plain or None in schemes.values():
        layers = {layer: registry.describe(fmt) for layer, fmt in formats.items()}
        more = {CACHE: scheme, HADAMARD: dict(hadamard), ABSENT: sorted(absent), WIDTHS: dict(widths)}
        return {"quant_method": OWN, "version": 1, "layers": layers, **{key: entry for key, entry in more.items() if entry}}
    groups = {
        f"group_{i}": {
            "targets": ["Linear"] if len(distinct) == 1 else layers,
            "input_activations": None,
            "output_activations": None,
            **(schemes[fmt] or {}),
        }
        for i, (fmt, layers) in enumerate(distinct.items())
    }
    layouts = {group["format"] for group in groups.values()}
    return {
        "quant_method": COMPRESSED_TENSORS,
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        CACHE: scheme,
        "ignore": [layer for layer in linears if layer not in formats],
        "config_groups": groups,
    }


def reader(config: Mapping[str, Any], where: str) -> Callable[[str, Set[str]], Format]:
    """A function from a packed layer's full name, and the names of its stored parts, to its format.

    Raises:
        SourceError: (also by the function) a quantization method, scheme or layer that cannot be read.
    """
    quantization = config.get("quantization_config") or {}
    method: Any = quantization.get("quant_method")
    if not isinstance(method, str) or method not in _READERS:
        raise SourceError(f"{where}: quantized with method `{elide(method)}`, which cannot be read; use the original model")
    cache_rounding(config, where)
    with _readable(where):
        found = _READERS[method](quantization, where)

    def read(layer: str, stored: Set[str]) -> Format:
        with _readable(where):
            fmt = found(layer, stored)
        if fmt is None:
            raise SourceError(f"{where}: layer {layer} is packed but quantization_config does not say how")
        return fmt

    return read


def cache_rounding(config: Mapping[str, Any], where: str) -> CacheRounding | None:
    """How keys and values are rounded on their way into the cache, if they are.

    Raises:
        SourceError: in a way that is not known.
    """
    quantization = config.get("quantization_config") or {}
    scheme = quantization.get(CACHE) if quantization.get("quant_method") in (OWN, COMPRESSED_TENSORS) else None
    if scheme is None:
        return None
    with _readable(where):
        return read_scheme(scheme)


def turned_layers(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], where: str) -> Blocks:
    """The layers whose activations are turned, by full name, with the size of the blocks.

    Args:
        config: Config of the model.
        shapes: (O, I) of every linear layer, by full name.
        where: For errors.

    Raises:
        SourceError: one that is not in the model, or that cannot be turned so.
    """
    quantization = config.get("quantization_config") or {}
    blocks = quantization.get(HADAMARD) if quantization.get("quant_method") == OWN else None
    with _readable(where):
        for layer, size in (blocks or {}).items():
            if layer not in shapes or type(size) is not int or size < 1 or largest_block(shapes[layer][1]) % size:
                raise ValueError(
                    f"{HADAMARD}: {layer} in blocks of {size}, where its input cannot be divided into powers of two"
                )
    return dict(blocks or {})


def absent_sublayers(config: Mapping[str, Any], where: str) -> frozenset[str]:
    """The sub-layers that the model does without, by full name.

    Raises:
        SourceError: they are not named so.
    """
    quantization = config.get("quantization_config") or {}
    names = quantization.get(ABSENT, ()) if quantization.get("quant_method") == OWN else ()
    with _readable(where):
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{ABSENT}: {names!r} is no list of names")
    return frozenset(names)


def sublayer_widths(config: Mapping[str, Any], where: str) -> dict[str, int]:
    """Heads of keys and values, or channels, of sub-layers that have fewer than the config says, by full name.

    Raises:
        SourceError: they are not said so.
    """
    quantization = config.get("quantization_config") or {}
    widths = quantization.get(WIDTHS, {}) if quantization.get("quant_method") == OWN else {}
    with _readable(where):
        if not isinstance(widths, dict) or not all(type(count) is int for count in widths.values()):
            raise ValueError(f"{WIDTHS}: {widths!r} is no number for each name")
    return dict(widths)


@contextlib.contextmanager
def _readable(where: str) -> Iterator[None]:
    """Turn what a config lacks, or has of the wrong kind, into one sentence."""
    try:
        yield
    except (RecipeError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise SourceError(f"{where}: quantization_config cannot be read ({cause(error)}); use the original model") from error


def _own_reader(config: Mapping[str, Any], where: str) -> Reader:
    formats = {layer: _shipped(spec) for layer, spec in config["layers"].items()}
    return lambda layer, stored: formats.get(layer)


def _shipped(spec: Mapping[str, Any]) -> Format:
    """A format of ours: a checkpoint must not name modules to import."""
    if spec["format"] not in registry.available("format"):
        raise RecipeError(f"no format named `{spec['format']}`")
    fmt: Format = registry.build("format", spec)
    return fmt


def _compressed_tensors_reader(config: Mapping[str, Any], where: str) -> Reader:
    sparsity, transforms = config.get("sparsity_config") or {}, config.get("transform_config") or {}
    others = {
        "sparsity_config": sparsity.get("format", "dense") != "dense" and sparsity,
        "transform_config": transforms.get("config_groups"),
    }
    refuse_set(others, where)
    formats = {
        target: _from_group({"format": config.get("format"), **group}, where)
        for group in config.get("config_groups", {}).values()
        for target in group.get("targets", [])
    }

    patterns = expressions(target[3:] for target in formats if target.startswith("re:"))

    def read(layer: str, stored: Set[str]) -> Format | None:
        found = [
            target
            for target in formats
            if target in {"Linear", layer} or (target.startswith("re:") and patterns[target[3:]].match(layer))
        ]
        return formats[min(found, key=_generality)] if found else None

    return read


def _from_group(group: Mapping[str, Any], where: str) -> Format:
    weights = group.get("weights") or {}
    layout = group.get("format") or "pack-quantized"
    if layout in FLOATS:
        return _float(layout, group, where)
    ordered = weights.get("actorder") not in (*STATIC, None, False)
    if layout not in LAYOUTS or ordered:
        raise SourceError(
            f"{where}: quantized as {elide(layout, 40)} with actorder {elide(weights.get('actorder'), 20)}; "
            f"only {', '.join((*LAYOUTS, *FLOATS))} without a stored order can be read"
        )
    if weights.get("type") != "int" or weights.get("strategy") not in STRATEGIES:
        raise SourceError(
            f"{where}: quantization scheme {elide(weights.get('type'), 40)}/{elide(weights.get('strategy'), 40)} cannot be "
            "read; only packed integers per group or channel can"
        )
    fields = {
        "bits": weights["num_bits"],
        "group_size": weights.get("group_size") or -1,
        "symmetric": weights.get("symmetric", True),
        "packed": LAYOUTS[layout],
        "activations": "int8" if _activations(group, ["int8"], where) else None,
    }
    return registry.validate(IntGroup, fields, where="int_group")


def _float(layout: str, group: Mapping[str, Any], where: str) -> Format:
    """The format of floating-point numbers that would be written as this group."""
    variants = [(fmt, fmt.compressed_tensors() or {}) for fmt in FLOATS[layout]]
    alike = [(fmt, known) for fmt, known in variants if _says(group.get("weights") or {}, known["weights"], WEIGHTS)]
    if not alike:
        found = "/".join(str((group.get("weights") or {}).get(key)) for key in WEIGHTS)
        known = " or ".join(
            dict.fromkeys("/".join(str(known["weights"].get(key)) for key in WEIGHTS) for _, known in variants)
        )
        raise SourceError(f"{where}: {layout} of {found} cannot be read; only {known} can")
    name = _activations(group, [fmt.activations for fmt, _ in alike], where)
    return next(fmt for fmt, _ in alike if fmt.activations == name)


def _says(given: Mapping[str, Any], known: Mapping[str, Any], keys: Iterable[str]) -> bool:
    """Whether two descriptions of numbers are the same in what matters."""
    return all(given.get(key) == known.get(key) for key in keys)


def _activations(group: Mapping[str, Any], ways: Iterable[str | None], where: str) -> str | None:
    """Return the way, out of some, in which a group of layers rounds its inputs."""
    if group.get("output_activations"):
        raise SourceError(f"{where}: the outputs of layers are quantized, which is not computed here; use another checkpoint")
    given = group.get("input_activations")
    if not given:
        return None
    given = {"num_bits": 8, "type": "int", "symmetric": True, **given}  # what is left out means this
    known = {name: SCHEMES[name] for name in ways if name is not None}
    if (found := next((name for name, scheme in known.items() if _says(given, scheme, INPUTS)), None)) is not None:
        return found
    kind = " ".join(str(given.get(key)) for key in ("num_bits", "type", "strategy"))
    how = ("" if given.get("symmetric") else "asymmetric ") + ("static" if given.get("dynamic") is False else "dynamic")
    able = " or ".join(" ".join(str(scheme[key]) for key in ("num_bits", "type", "strategy")) for scheme in known.values())
    raise SourceError(f"{where}: activations are quantized as {kind} {how}, which is not computed here; only {able} can be")


def _generality(target: str) -> int:
    """Names go before expressions, and these before the class of all layers."""
    return 2 if target == "Linear" else int(target.startswith("re:"))


_READERS: Mapping[str, Callable[[Mapping[str, Any], str], Reader]] = {
    OWN: _own_reader,
    COMPRESSED_TENSORS: _compressed_tensors_reader,
    GPTQ: gptq_reader,
    AUTO_ROUND: auto_round_reader,
}
