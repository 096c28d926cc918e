"""Scales for a key-value cache of 8 bits, from the largest key and value of each block on the calibration text.

Put it behind the passes that change weights: keys and values are then those of the compressed model. What is rounded, and who
reads it, is in compressor/model/surgery/kv_cache.py.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from compressor.errors import CalibrationError, RecipeError
from compressor.model.block import Block
from compressor.model.surgery.kv_cache import CacheRounding, CacheScales, attentions, entering
from compressor.pipeline.contract import Outcome, Pass, Stats
from compressor.recipe.registry import node


@node
class KVCache(Pass):
    """Round keys and values of the cache by scales from calibration.

    Args:
        dtype: Numbers of the cache: fp8 (E4M3), which vLLM stores, or int8.
    """

    dtype: Literal["fp8", "int8"] = "fp8"
    together: ClassVar[bool] = True

    @property
    def offers(self) -> tuple[CacheRounding, ...]:
        """The one that `dtype` names."""
        return (CacheRounding(kv_cache=self.dtype),)

    def units(self, block: Block) -> Mapping[str, tuple[str, ...]]:
        """The attention modules of a block; no layer is rewritten.

        Raises:
            RecipeError: none whose keys and values can be got at.
        """
        names = attentions(block.module)
        if not names:
            raise RecipeError(
                f"{block.prefix}: kv_cache finds no attention with a k_proj, v_proj or qkv_proj layer; leave the pass out"
            )
        return dict.fromkeys(names, ())

    @torch.no_grad()
    def apply(self, block: Block, stats: Stats, choice: Mapping[str, Any]) -> Outcome:
        device = stats.ranks.device
        largest = {name: torch.zeros(2, device=device) for name in choice}  # of keys and of values

        def see(name: str, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            here = torch.stack([keys.abs().amax(), values.abs().amax()]).float()
            torch.maximum(largest[name], here, out=largest[name])
            return keys, values

        with entering(block.module, choice, see):
            for hidden in stats.inputs:
                block.forward(hidden.to(device))
        stats.ranks.max_(list(largest.values()))
        for name, pair in largest.items():
            if not torch.isfinite(pair).all() or not pair.all():
                raise CalibrationError(
                    f"{block.prefix}.{name}: its largest key is {pair[0]:g} and its largest value {pair[1]:g} on the "
                    "calibration text; calibrate on other text, or compute with --dtype float32"
                )
        rounding = self.offers[0]
        scales = {name: (rounding.scale(pair[0]), rounding.scale(pair[1])) for name, pair in largest.items()}
        return Outcome({}, {}, cache=CacheScales(rounding, scales))


EXPORT = KVCache
