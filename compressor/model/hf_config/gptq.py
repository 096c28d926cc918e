"""`quantization_config` of GPTQ checkpoints: what GPTQModel and auto-round say of their layers, and what we say of ours.

Both describe all layers at once, and then the exceptions. GPTQModel's `dynamic` has expressions, of which the first that
matches the beginning of a layer's name counts; after `-:` they leave layers dense. auto-round's `extra_config` has names, and
expressions that match anywhere. As read off GPTQModel 7.6 and auto-round 0.16.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any

from compressor.errors import SourceError
from compressor.formats.base import Format
from compressor.formats.gptq_int import GptqInt
from compressor.reading import elide
from compressor.recipe.expressions import expressions
from compressor.recipe.registry import validate

GPTQ, AUTO_ROUND = "gptq", "auto-round"
PACKING = {"auto_round:auto_gptq": "gptq", "auto_round:gptqmodel": "gptq_v2", "auto_round": "gptq_v2"}
Reader = Callable[[str, Set[str]], Format | None]  # a layer's name and the names of its stored parts -> its format


def write_gptq(fmt: GptqInt, formats: Mapping[str, Format], linears: Iterable[str]) -> dict[str, Any]:
    """The entry for a model whose packed layers all have one format; arguments as of `quantization_config.write`."""
    dense = [layer for layer in linears if layer not in formats and layer != "lm_head"]
    return {
        "quant_method": GPTQ,
        "bits": fmt.bits,
        "group_size": fmt.group_size,
        "sym": fmt.symmetric,
        "desc_act": False,
        "checkpoint_format": fmt.checkpoint_format,
        "pack_dtype": "int32",
        "lm_head": "lm_head" in formats,
        "dynamic": {f"-:^{re.escape(layer)}$": {} for layer in dense},
    }


def gptq_reader(config: Mapping[str, Any], where: str) -> Reader:
    """The reader of `quant_method: gptq`. Raises as `quantization_config.reader`."""
    meta = _entries(config, "meta")
    refuse_set({key: config.get(key) or meta.get(key) for key in ("adapter", "rotation", "is_marlin_format")}, where)
    _gptq_format(config, where)
    dynamic = _entries(config, "dynamic")
    rules = {name: name.removeprefix("+:").removeprefix("-:") for name in dynamic}
    patterns = expressions(rules.values())

    def read(layer: str, stored: Set[str]) -> Format | None:
        rule = next((name for name, pattern in rules.items() if patterns[pattern].match(layer)), None)
        override: Mapping[str, Any] | None = {} if rule is None else None if rule.startswith("-:") else dynamic[rule]
        return None if override is None else _gptq_format({**config, **override}, where, layer, stored)

    return read


def auto_round_reader(config: Mapping[str, Any], where: str) -> Reader:
    """The reader of `quant_method: auto-round`. Raises as `quantization_config.reader`."""
    packing = config.get("packing_format")
    if packing not in PACKING:
        raise SourceError(f"{where}: packed as {packing}; of auto-round's layouts, only {', '.join(PACKING)} can be read")
    refuse_set({"rotation_config": config.get("rotation_config")}, where)
    named = _entries(config, "extra_config")
    patterns = expressions(name for name, given in named.items() if given)

    def read(layer: str, stored: Set[str]) -> Format | None:
        override: Mapping[str, Any] = named.get(layer) or next(
            (named[name] for name, pattern in patterns.items() if pattern.search(layer)), {}
        )
        settings = {**config, **override}
        return None if settings["bits"] >= 16 else check(settings, layer, stored)

    def check(settings: Mapping[str, Any], layer: str = "", stored: Set[str] = frozenset()) -> Format:
        kind, activations = settings.get("data_type", "int"), settings.get("act_bits") or 16
        if kind != "int" or activations < 16:
            raise SourceError(
                f"{where}: weights quantized as {kind} with activations of {activations} bits; "
                "only integers with activations of 16 bits can be read"
            )
        return _gptq_format({**settings, "checkpoint_format": PACKING[packing]}, where, layer, stored)

    check(config)
    return read


def _entries(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The object under a key; empty if there is none. Raises ValueError for anything else."""
    found = config.get(key) or {}
    if not isinstance(found, Mapping):
        raise ValueError(f"{key} is a {type(found).__name__} where an object is needed")
    return found


def refuse_set(settings: Mapping[str, Any], where: str) -> None:
    """Refuse settings that change what the model computes in a way that is not understood."""
    for key, value in settings.items():
        if value:
            raise SourceError(
                f"{where}: quantization_config sets {key} to {elide(value)}, which cannot be read; use the original model"
            )


def _gptq_format(settings: Mapping[str, Any], where: str, layer: str = "", stored: Set[str] = frozenset()) -> Format:
    name = settings.get("checkpoint_format") or settings.get("format") or GPTQ
    words = settings.get("pack_dtype") or "int32"
    if name not in ("gptq", "gptq_v2") or words != "int32":
        raise SourceError(f"{where}: packed as {name} in words of {words}; only gptq and gptq_v2 in int32 can be read")
    if layer and settings.get("desc_act") and "g_idx" not in stored:
        raise SourceError(
            f"{where}: layer {layer} was quantized with desc_act but has no g_idx; the checkpoint is not complete"
        )
    fields = {
        "bits": settings["bits"],
        "group_size": settings["group_size"],
        "symmetric": settings.get("sym", True),
        "checkpoint_format": name,
        "g_idx": "g_idx" in stored,
    }
    return validate(GptqInt, fields, where="gptq_int")
