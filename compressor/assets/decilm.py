"""A Llama whose MLPs have widths of their own, in the form of NVIDIA's DeciLM, which vLLM knows too.

`compress` lays this file beside the weights of such a model, for transformers with `trust_remote_code=True`. It needs nothing
but transformers.
"""

import copy
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaMLP


class DeciLMConfig(LlamaConfig):  # type: ignore[misc]
    """Of Llama, and `block_configs`: for each block `attention` and `ffn`, whose entries are attributes."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: Sequence[Any] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.block_configs = [_attributes(block) if isinstance(block, Mapping) else block for block in block_configs]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in config.json."""
        blocks = [{name: vars(entries) for name, entries in vars(block).items()} for block in self.block_configs]
        return {**super().to_dict(), "block_configs": blocks}


class DeciLMForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    """Llama with MLPs as wide as `block_configs` says."""

    config_class = DeciLMConfig

    def __init__(self, config: DeciLMConfig) -> None:
        super().__init__(config)
        for layer, block in zip(self.model.layers, config.block_configs, strict=True):
            own = copy.copy(config)
            own.intermediate_size = block.ffn.intermediate_size
            layer.mlp = LlamaMLP(own)
        self.post_init()


def _attributes(block: Mapping[str, Mapping[str, Any]]) -> SimpleNamespace:
    return SimpleNamespace(**{name: SimpleNamespace(**entries) for name, entries in block.items()})
