"""Keys and values rounded to 8 bits on their way into the cache: one scale for a block's keys, one for its values.

    fp8     scale = max |x| / 448,    x -> e4m3(clamp(x / scale, ±448)) * scale
    int8    scale = max |x| / 127.5,  x -> clamp(round(x / scale), -128, 127) * scale

Keys are taken after the rotary embedding, as they enter the cache. The scales are found in calibration and stored in bf16 as
`k_scale` and `v_scale` [1] of the attention module, which compressed-tensors (`kv_cache_scheme`) and vLLM read. Here, as in
stock transformers, the cache holds the rounded numbers in the dtype of the computation: the result is that of an engine that
stores 8 bits, the memory is not.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

SCALE_DTYPE = torch.bfloat16
KEYS, VALUES = "k_scale", "v_scale"
LARGEST = {"fp8": 448.0, "int8": 127.5}  # what the largest number is scaled to
LEAST = torch.finfo(SCALE_DTYPE).smallest_normal  # the scale of zeros
PROJECTIONS = ("k_proj", "v_proj", "qkv_proj", "kv_b_proj")  # one of them has every attention that compressed-tensors takes
TYPES = {"fp8": "float", "int8": "int"}  # as compressed-tensors calls them
Change = Callable[[str, Tensor, Tensor], tuple[Tensor, Tensor]]  # attention module, keys, values -> keys, values


@dataclass(frozen=True)
class CacheRounding:
    """The numbers that the cache of a block holds: an option of a plan.

    Args:
        kv_cache: fp8 (E4M3) or int8.
    """

    kv_cache: Literal["fp8", "int8"] = "fp8"

    @property
    def label(self) -> str:
        return f"kv-{self.kv_cache}"

    def scale(self, largest: Tensor) -> Tensor:
        """The scale [1], as it is stored, for numbers up to `largest` in magnitude."""
        return (largest.float() / LARGEST[self.kv_cache]).clamp(min=LEAST).reshape(1).to(SCALE_DTYPE)

    def round(self, x: Tensor, scale: Tensor) -> Tensor:
        """x rounded to what the cache can hold, in its own dtype; computed in fp32."""
        steps = x.float() / scale.float()
        if self.kv_cache == "fp8":
            held = steps.clamp_(-448, 448).to(torch.float8_e4m3fn).float()
        else:
            held = steps.round_().clamp_(-128, 127)
        return held.mul_(scale.float()).to(x.dtype)

    def scheme(self) -> dict[str, Any]:
        """`kv_cache_scheme` of compressed-tensors."""
        kind = TYPES[self.kv_cache]
        return {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "tensor", "dynamic": False}


@dataclass(frozen=True)
class CacheScales:
    """How a block rounds keys and values, with the scales of both by the name of the attention module inside it."""

    rounding: CacheRounding
    scales: Mapping[str, tuple[Tensor, Tensor]]

    @staticmethod
    def read(rounding: CacheRounding, modules: Iterable[str], stored: Callable[[str], Tensor]) -> "CacheScales":
        """Read the scales of some attention modules; `stored` returns the tensor of a name in `tensors`."""
        scales = {name: (stored(f"{name}.{KEYS}"), stored(f"{name}.{VALUES}")) for name in modules}
        return CacheScales(rounding, scales)

    def tensors(self) -> dict[str, Tensor]:
        """Return the stored tensors, by name inside the block."""
        keys = {f"{module}.{KEYS}": pair[0] for module, pair in self.scales.items()}
        return keys | {f"{module}.{VALUES}": pair[1] for module, pair in self.scales.items()}

    def change(self, module: str, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values as the cache gives them back."""
        k_scale, v_scale = self.scales[module]
        return self.rounding.round(keys, k_scale.to(keys.device)), self.rounding.round(values, v_scale.to(values.device))


def attentions(module: nn.Module) -> list[str]:
    """The attention modules below a module whose cache can be rounded, by name: those that compressed-tensors takes."""
    return [
        name
        for name, child in module.named_modules()
        if "attention" in type(child).__name__.lower()
        and any(hasattr(child, projection) for projection in PROJECTIONS)
        and "past_key_values" in signature(child.forward).parameters
    ]


def read_scheme(scheme: Mapping[str, Any]) -> CacheRounding:
    """Return the meaning of a `kv_cache_scheme`. Raises ValueError for another than those above."""
    for found in (CacheRounding(kv_cache="fp8"), CacheRounding(kv_cache="int8")):
        if all(scheme.get(key) == value for key, value in found.scheme().items()):
            return found
    wanted = ("num_bits", "type", "strategy", "symmetric", "dynamic")
    given = ", ".join(f"{key} {scheme.get(key)}" for key in wanted)
    raise ValueError(f"kv_cache_scheme of {given}; known are 8 symmetric bits with one fixed scale for a tensor")


class Entrance:
    """Stands for the cache in front of an attention module, or for none: changes what goes in."""

    def __init__(self, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], cache: Any) -> None:
        self._change, self._cache = change, cache

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values, and return all so far, as transformers' `Cache` does."""
        keys, values = self._change(keys, values)
        return (keys, values) if self._cache is None else self._cache.update(keys, values, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


@contextmanager
def entering(module: nn.Module, names: Iterable[str], change: Change) -> Iterator[None]:
    """Have `change` see, and alter, what enters the caches of the named attention modules while the context is open."""
    handles = [_hook(module.get_submodule(name), partial(change, name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def rounded_cache(module: nn.Module, cache: CacheScales | None) -> Iterator[None]:
    """Round what enters the caches while the context is open."""
    if cache is None:
        yield
        return
    with entering(module, cache.scales, cache.change):
        yield


def attach(attention: nn.Module, rounding: CacheRounding, k_scale: Tensor, v_scale: Tensor) -> None:
    """Have an attention module round for good; the scales become parameters of it, which are saved with the model."""
    for name, scale in ((KEYS, k_scale), (VALUES, v_scale)):
        attention.register_parameter(name, nn.Parameter(scale, requires_grad=False))

    def change(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return rounding.round(keys, attention.get_parameter(KEYS)), rounding.round(values, attention.get_parameter(VALUES))

    _hook(attention, change)


def _hook(attention: nn.Module, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> RemovableHandle:
    def give(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "past_key_values": Entrance(change, kwargs.get("past_key_values"))}

    return attention.register_forward_pre_hook(give, with_kwargs=True)
