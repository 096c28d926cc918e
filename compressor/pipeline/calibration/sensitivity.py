"""Estimate the cost of an error in a block's output for the model's predictions: the Fisher information of the output
channels.

For a small error e of a token's hidden state after a block, KL(dense || perturbed) is about eᵀ F e / 2 with F = E[g gᵀ], g
being the gradient of log p(y) by that state, and y drawn from the model's own predictions. F averaged over tokens is [D, D];
a pass that fits a block's output weighs its error by it, and so spends its freedom on what the model reads.

The gradients come from one backward sweep through the dense model, block by block, of as many samples at a time as keep the
hidden states between all blocks as small as those that calibration holds anyway.

Source: Martens and Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", ICML 2015, section 3
(the factor of a layer's output); for quantization, Kim et al., "GuidedQuant", ICML 2025. Theirs is per layer, ours per block.

Shape suffixes: B samples of a batch, S sequence, D hidden, T tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from compressor.errors import CalibrationError
from compressor.model.source import ModelSource, return_freed_memory
from compressor.pipeline.ranks import Ranks

TOKENS = 2**13  # that are sent back, or twice the width of the hidden states if that is more
ISOTROPIC = 0.2  # share of the metric that is the plain squared error: F is an estimate, and blind to what the text lacks


def sensitivities(
    source: ModelSource, batches: Sequence[Tensor], ranks: Ranks, tell: Callable[[int, int], None]
) -> list[Tensor]:
    """The metric of each block's output error, fp32 [D, D] on the CPU, of mean diagonal 1.

    Args:
        source: The dense model.
        batches: This rank's tokens, [B, S] each; the first of them are used.
        ranks: Over which the sums are taken.
        tell: Called with the sweeps done and their number.
    """
    width = int(source.model.config.get_text_config().hidden_size)
    used = _first(batches, -(-max(TOKENS, 2 * width) // ranks.world))
    depth, groups = len(source.layers), min(len(source.layers), len(used))
    sums = [torch.zeros(0)] * depth
    for group in range(groups):
        mine = range(group, len(used), groups)
        hidden = source.first_inputs([used[i] for i in mine])
        between = _forward(source, hidden)
        seeds = [ranks.rank + ranks.world * i for i in mine]
        _backward(source, between, seeds, sums)
        tell(group + 1, groups)
    ranks.sum_(sums)
    for index, total in enumerate(sums):
        if not 0 < float(total.trace()) < float("inf"):
            raise CalibrationError(
                f"{source.prefix}.{index}: gradients through the dense model are zero or not finite on the calibration text; "
                "compute with --dtype float32, or give the pass `sensitivity: false`"
            )
    return [_metric(total) for total in sums]


def _first(batches: Sequence[Tensor], tokens: int) -> list[Tensor]:
    """The first batches that hold so many tokens together, at least one."""
    used: list[Tensor] = []
    for batch in batches:
        if used and sum(b.numel() for b in used) >= tokens:
            break
        used.append(batch)
    return used


@torch.no_grad()
def _forward(source: ModelSource, hidden: list[Tensor]) -> list[list[Tensor]]:
    """Hidden states [B, S, D] before each block and after the last, on the CPU."""
    between = [hidden]
    for block in source.blocks():
        between.append([block.forward(h.to(source.device)).cpu() for h in between[-1]])
    return between


def _backward(source: ModelSource, between: list[list[Tensor]], seeds: Sequence[int], sums: list[Tensor]) -> None:
    """Add g gᵀ of every token after each block to `sums`, and let go of the hidden states."""
    slopes = _at_the_end(source, between.pop(), seeds)
    for index in range(len(source.layers) - 1, -1, -1):
        for slope in slopes:
            g_TD = slope.to(source.device).flatten(0, 1).float()
            moment = (g_TD.T @ g_TD).double()
            sums[index] = moment if sums[index].numel() == 0 else sums[index].add_(moment)
        before = between.pop()
        if index == 0:
            return
        block = source.block(index)
        slopes = [_through(block.forward, h.to(source.device), slope) for h, slope in zip(before, slopes, strict=True)]
        source.release(block)
        return_freed_memory()


def _at_the_end(source: ModelSource, hidden: list[Tensor], seeds: Sequence[int]) -> list[Tensor]:
    """Gradients by the last block's outputs of the log-likelihood of tokens drawn from the predictions."""
    slopes = []
    with source.head() as head, torch.enable_grad():
        for h, seed in zip(hidden, seeds, strict=True):
            h_BSD = h.to(source.device).requires_grad_()
            log_p_TV = head(h_BSD).flatten(0, 1).float().log_softmax(-1)
            generator = torch.Generator(source.device).manual_seed(seed)
            drawn_T1 = torch.multinomial(log_p_TV.detach().exp(), 1, generator=generator)
            (slope,) = torch.autograd.grad(log_p_TV.gather(1, drawn_T1).sum(), h_BSD)
            slopes.append(slope.cpu())
    return slopes


def _through(forward: Callable[[Tensor], Tensor], hidden: Tensor, slope: Tensor) -> Tensor:
    """The gradient by a block's input, from that by its output."""
    with torch.enable_grad():
        hidden.requires_grad_()
        (before,) = torch.autograd.grad(forward(hidden), hidden, slope.to(hidden.device))
    return before.cpu()


def _metric(total_DD: Tensor) -> Tensor:
    """A sum of second moments, scaled, and with the plain squared error mixed in."""
    width = len(total_DD)
    scaled = total_DD.cpu() * (width / float(total_DD.trace()))
    return (ISOTROPIC * torch.eye(width, dtype=torch.float64) + (1 - ISOTROPIC) * scaled).float()
