"""Scales for an 8-bit key-value cache, from the largest key and value of each block on the calibration text.

List it after the passes that change weights, so that keys and values are those of the compressed model. For what is rounded
and which runtimes support it, see compressor/model/surgery/kv_cache.py.
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
    """Round cached keys and values, with scales from calibration.

    Args:
        dtype: Number format of the cache: fp8 (E4M3), which vLLM supports, or int8.
    """

    dtype: Literal["fp8", "int8"] = "fp8"
    together: ClassVar[bool] = True

    @property
    def offers(self) -> tuple[CacheRounding, ...]:
        """Return the rounding that `dtype` names."""
        return (CacheRounding(kv_cache=self.dtype),)

    def units(self, block: Block) -> Mapping[str, tuple[str, ...]]:
        """Return the attention modules of a block, without layers, because no weight changes.

        Raises:
            RecipeError: The block has no attention whose keys and values are accessible.
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
