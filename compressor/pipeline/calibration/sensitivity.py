"""Estimate the cost of an error in a block's output for the model's predictions: the Fisher information of the output
channels.

For a small error e of a token's hidden state after a block, KL(dense || perturbed) is about eᵀ F e / 2 with F = E[g gᵀ].
Here g is the gradient of log p(y) with respect to that state, and y is drawn from the model's own predictions. F averaged
over tokens is [D, D]. A pass that fits a block's output weights its error by F, so that it is most exact where the model is
most sensitive.

The gradients come from backward sweeps through the dense model, block by block. Each sweep takes only as many batches as
keep the hidden states between all blocks as small as the ones that calibration holds anyway.

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

TOKENS = 2**13  # tokens for gradients, over all ranks, or twice the hidden size if that is more
ISOTROPIC = 0.2  # share of plain squared error in the metric, because F is an estimate from a limited text


def sensitivities(
    source: ModelSource, batches: Sequence[Tensor], ranks: Ranks, tell: Callable[[int, int], None]
) -> list[Tensor]:
    """Return the metric of each block's output error: fp32 [D, D] on the CPU, with a mean diagonal of 1.

    Args:
        source: The dense model.
        batches: This rank's tokens, [B, S] each; only the first batches are used.
        ranks: The ranks to sum over.
        tell: Called with the number of finished sweeps and their total.

    Raises:
        CalibrationError: the gradients are zero or not finite.
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
    """Return the first batches, at least one, that together hold `tokens` tokens."""
    used: list[Tensor] = []
    for batch in batches:
        if used and sum(b.numel() for b in used) >= tokens:
            break
        used.append(batch)
    return used


@torch.no_grad()
def _forward(source: ModelSource, hidden: list[Tensor]) -> list[list[Tensor]]:
    """Return the hidden states [B, S, D] before each block and after the last, on the CPU."""
    between = [hidden]
    for block in source.blocks():
        between.append([block.forward(h.to(source.device)).cpu() for h in between[-1]])
    return between


def _backward(source: ModelSource, between: list[list[Tensor]], seeds: Sequence[int], sums: list[Tensor]) -> None:
    """Add g gᵀ of every token after each block to `sums`, and free the hidden states."""
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
    """Return gradients of the log-likelihood of drawn tokens with respect to the last block's outputs.

    The tokens are drawn from the model's own predictions.
    """
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
    """Return the gradient with respect to a block's input, given that with respect to its output."""
    with torch.enable_grad():
        hidden.requires_grad_()
        (before,) = torch.autograd.grad(forward(hidden), hidden, slope.to(hidden.device))
    return before.cpu()


def _metric(total_DD: Tensor) -> Tensor:
    """Scale a sum of second moments to mean diagonal 1, and mix in the plain squared error."""
    width = len(total_DD)
    scaled = total_DD.cpu() * (width / float(total_DD.trace()))
    return (ISOTROPIC * torch.eye(width, dtype=torch.float64) + (1 - ISOTROPIC) * scaled).float()
