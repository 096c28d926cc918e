"""Sub-layers that a model does without: the attention or the MLP of a block, each as if its output were zero.

What stands in their place returns zeros, so that a block's own code runs as it is: what it adds to the hidden states is
nothing, also behind a norm (which makes zeros of zeros, having no bias). The attention of a block keeps the count of tokens
in the cache all the same, in one number a token: others ask the first block for it.
"""

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import SourceError

ATTENTION, MLP = "self_attn", "mlp"
SUBLAYERS = (ATTENTION, MLP)  # in the order of computation


class NoAttention(nn.Module):
    """Zeros in the place of an attention module of transformers."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states: Tensor, *args: Any, past_key_values: Any = None, **kwargs: Any) -> tuple[Tensor, None]:
        if past_key_values is not None:
            count = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            past_key_values.update(count, count, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class NoMLP(nn.Module):
    """Zeros in the place of an MLP."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.zeros_like(hidden_states)


def substitutes(block: nn.Module) -> dict[str, nn.Module]:
    """Return a substitute for each sub-layer that a block has and can do without."""
    found: dict[str, nn.Module] = {}
    attention, mlp = (getattr(block, name, None) for name in SUBLAYERS)
    if hasattr(attention, "o_proj") and isinstance(index := getattr(attention, "layer_idx", None), int):
        found[ATTENTION] = NoAttention(index)
    return found | ({MLP: NoMLP()} if hasattr(mlp, "down_proj") else {})


def leave_out(model: nn.Module, names: Collection[str], where: str) -> None:
    """Put the substitutes in the places of sub-layers, by full name.

    Raises:
        SourceError: the model has no such sub-layer.
    """
    for name in names:
        parent, _, leaf = name.rpartition(".")
        try:
            substitute = substitutes(model.get_submodule(parent))[leaf]
        except (AttributeError, KeyError) as error:
            raise SourceError(
                f"{where}: {name} is said to be left out, but is no attention or MLP of a block that could do without"
            ) from error
        model.set_submodule(name, substitute)


@contextlib.contextmanager
def without(block: nn.Module, names: Collection[str]) -> Iterator[None]:
    """While it is open, a block does without some of its sub-layers."""
    kept = {name: getattr(block, name) for name in names}
    stand_ins = substitutes(block)
    for name in kept:
        setattr(block, name, stand_ins[name])
    try:
        yield
    finally:
        for name, module in kept.items():
            setattr(block, name, module)
