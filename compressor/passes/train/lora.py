"""Low-rank changes to the linear layers of a model in memory, trained and then merged.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, by peft.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from compressor.model.source import ModelSource


def student(source: ModelSource, rank: int, alpha: int, ends: Sequence[str] = ("",)) -> Any:
    """Load the model in float32, with a low-rank change to linear layers of its blocks. All other parameters are frozen.

    Args:
        source: The model.
        rank: Rank of the changes.
        alpha: Scale of the changes, which are multiplied by alpha / rank.
        ends: Suffixes of the names of the layers to change. By default all linear layers of the blocks.
    """
    whole = ModelSource(source.path, source.device, torch.float32, source.rewritings)
    blocks = map(partial(whole.block, load=False), range(len(whole.layers)))
    layers = [f"{block.prefix}.{name}" for block in blocks for name in block.layers if name.endswith(tuple(ends))]
    settings = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=layers, bias="none")
    return get_peft_model(whole.whole(), settings)


def merged(model: Any, source: ModelSource) -> dict[str, Tensor]:
    """Merge the changes, and return the blocks' tensors, fp32, by name in the model."""
    state = model.merge_and_unload().state_dict()
    return {name: state[name] for name in source.names if name.startswith(f"{source.prefix}.") and name in state}
