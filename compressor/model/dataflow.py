"""Find the module that writes what linear layers read, channel by channel. There a channel can be scaled without changing the
model.

    writer: row j of its weight divided by s_j          readers: column j of their weights multiplied by s_j

Nothing of this depends on names but two products inside a block (v_proj with the attention weights, up_proj with the gate).
Norms are found by watching a block compute; and whatever is found is tried, with factors of two, which cost no digit.

Shape suffixes: O out_features, I in_features, W channels of the writer, B samples, S sequence, D hidden.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.model.block import Block

PRODUCTS = {"o_proj": "v_proj", "out_proj": "v_proj", "down_proj": "up_proj"}  # what is read is linear in what is written
TOKENS = 8  # that go through a block to see what it does
SIZE = 0.1  # of their hidden states: what a block adds to them then shows, in bfloat16 as well
SAME = 0.05  # relative difference of what a block adds that rounding may make; channels scaled by two make far more


@dataclass(frozen=True)
class Feed:
    """Some linear layers and the module that writes what they read.

    Args:
        writer: A norm or a linear layer, by name inside the block.
        readers: The linear layers.
        run: Channels of the writer that stay together.
        repeats: How often the readers see each run: query heads to a head of values.
    """

    writer: str
    readers: tuple[str, ...]
    run: int = 1
    repeats: int = 1

    def spread(self, s_W: Tensor) -> Tensor:
        """One number per channel of the writer -> one per channel of the readers."""
        return s_W.view(-1, 1, self.run).expand(-1, self.repeats, -1).flatten()

    def gathered(self, x_I: Tensor) -> Tensor:
        """Mean over the channels of the readers that come from the same of the writer."""
        return x_I.view(-1, self.repeats, self.run).mean(1).flatten()


@torch.no_grad()
def find_feeds(block: Block, width: int) -> list[Feed]:
    """The feeds of a resident block whose channels can be scaled, in the order of computation.

    Args:
        block: Resident.
        width: D, of the hidden states.
    """
    hidden_1SD = some_hidden(block, width)
    norms, expected = run_norms(block, hidden_1SD)
    found = [Feed(norm, tuple(readers)) for norm, readers in norms.items()] + products(block)
    order = list(block.layers)
    found.sort(key=lambda feed: order.index(feed.readers[0]))
    return [feed for feed in found if _holds(block, feed, hidden_1SD, expected)]


def some_hidden(block: Block, width: int) -> Tensor:
    """Hidden states [1, S, D] to see what a resident block does: the same for every block of a model."""
    like = next(block.module.parameters())
    return SIZE * torch.randn(1, TOKENS, width, generator=torch.Generator().manual_seed(0)).to(like)


def run_norms(block: Block, hidden_1SD: Tensor) -> tuple[dict[str, list[str]], Tensor]:
    """The block's norms with the linear layers that read the very tensor they return; and the block's output."""
    written: list[tuple[Tensor, str]] = []  # alive, so `is` is safe
    readers: dict[str, list[str]] = {}

    def wrote(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, args, out: written.append((out, name))

    def read(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            for tensor, norm in written:
                if tensor is args[0]:
                    readers.setdefault(norm, []).append(name)

        return see

    hooks = []
    for name, module in block.module.named_modules():
        gain = getattr(module, "weight", None)
        if name in block.layers:
            hooks.append(module.register_forward_pre_hook(read(name)))
        elif isinstance(gain, Tensor) and gain.dim() == 1:
            hooks.append(module.register_forward_hook(wrote(name)))
    try:
        return readers, block.forward(hidden_1SD)
    finally:
        for handle in hooks:
            handle.remove()


def products(block: Block) -> list[Feed]:
    """Linear layers whose output is multiplied by something else before another one reads it."""
    found = []
    for reader in block.layers:
        parent, _, name = reader.rpartition(".")
        writer = f"{parent}.{PRODUCTS[name]}" if name in PRODUCTS else ""
        if writer not in block.layers:
            continue
        read, written = block.shape(reader)[1], block.shape(writer)[0]
        run = int(getattr(block.module.get_submodule(parent), "head_dim", 1))
        if read % written == 0 and written % run == 0:
            found.append(Feed(writer, (reader,), run, read // written))
    return found


def _holds(block: Block, feed: Feed, hidden_1SD: Tensor, expected: Tensor) -> bool:
    """Whether the block computes the same with the feed's channels scaled."""
    channels = len(block.module.get_parameter(f"{feed.writer}.weight")) if feed.writer not in block.layers else 0
    channels = channels or block.shape(feed.writer)[0]
    factors = 2.0 ** torch.randint(-1, 2, (channels,), generator=torch.Generator().manual_seed(0))
    changed = {name: new.to(hidden_1SD) for name, new in rescaled(block, feed, factors.to(hidden_1SD.device), {}).items()}
    missed = block.forward(hidden_1SD, changed) - expected
    return bool(missed.norm() <= SAME * (expected - hidden_1SD).norm())


def gain_offset(norm: nn.Module) -> float:
    """Return what a norm adds to its weight before multiplying: 1 where a weight of zero leaves the input unchanged, as in
    Gemma.
    """
    weight = norm.get_parameter("weight")
    ramp = torch.linspace(-1, 1, len(weight))[None]
    zeros = {name: torch.zeros(parameter.shape) for name, parameter in norm.named_parameters()}
    return float(torch.func.functional_call(norm, zeros, (ramp,)).any())


def rescaled(block: Block, feed: Feed, s_W: Tensor, changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters with the channels of a feed divided by positive numbers where they are written, multiplied where read.

    A norm's gain is rounded to the dtype it is stored in, and the readers make up for what that leaves of the division.

    Args:
        block: Resident.
        feed: Where.
        s_W: The numbers, fp32.
        changed: Parameters that were changed before, named as in `Edits`, to be taken instead of the block's.

    Returns: those that are new, fp32.
    """

    def now(name: str) -> Tensor:
        value = changed[name] if name in changed else block.weight(name) if name in block.layers else parameters[name]
        return value.float()

    parameters = dict(block.module.named_parameters())
    new: dict[str, Tensor] = {}
    if feed.writer in block.layers:
        new[feed.writer] = now(feed.writer) / s_W[:, None]
    else:
        name = f"{feed.writer}.weight"
        offset = gain_offset(block.module.get_submodule(feed.writer))
        gain_W = now(name) + offset
        new[name] = (gain_W / s_W - offset).to(block.dtypes[name]).float()
        s_W = torch.where(new[name] + offset == 0, s_W, gain_W / (new[name] + offset))
    if f"{feed.writer}.bias" in parameters:
        new[f"{feed.writer}.bias"] = now(f"{feed.writer}.bias") / s_W
    return new | {reader: now(reader) * feed.spread(s_W) for reader in feed.readers}
