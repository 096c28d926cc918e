"""Operators on the outputs of all residual stream writers, with one mask over channels that learns which to drop.

    y = v ⊙ g ⊙ (x + D₂ D₁ x)        g(m, t) = sigmoid(T m) + max(½ - t/G, 0),    T = 1 / (1 - ln t / ln G)

follows the embedding, every attention and every MLP. All share the mask m. T grows, so that the gates g approach zeros and
ones. After 0.8 of the G steps they are exactly that, with ones for the S kept channels, and m is frozen. Operators are
linear, so at the end a writer W becomes diag(v g) (I + D₂ D₁) W, with zeros in the rows of dropped channels.

Penalties: 10 |#(m ≥ 0) - S| / S, with a straight-through gradient for the comparison; the mean of (m - ½)² where m ≥ 0 and
(m + ½)² elsewhere; and ‖D₁ D₁ᵀ - I‖², the mean over operators.

Source: Liu et al., "PAT: Pruning-Aware Tuning for Large Language Models", AAAI 2025. Differences: the mask is initialised
from the strength of channels, with the strongest S at or above 0. The second penalty is a mean, so that the first can
outweigh it. An embedding that is also the head is only masked, and remains tied.

Shape suffixes: D hidden, R rank of D₁ and D₂, S kept channels, I in_features.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compressor.model.source import ModelSource
from compressor.passes.train.lora import merged, student

FROZEN = 0.8  # fraction of the steps after which the mask is frozen
COUNT = 10.0  # weight of the first penalty


class Operator(nn.Module):
    """An operator x + D₂ D₁ x, scaled by v and by gates. Initially it is the identity, but for the gates.

    Args:
        width: Number of hidden channels D.
        rank: Rank R.
    """

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.scale_D = nn.Parameter(torch.ones(width))
        self.down_RD = nn.Parameter(nn.init.orthogonal_(torch.empty(rank, width)))
        self.up_DR = nn.Parameter(torch.zeros(width, rank))

    def forward(self, x: Tensor, gate_D: Tensor) -> Tensor:
        """Return the transformed output of a writer, [..., D]."""
        changed: Tensor = self.scale_D * gate_D * (x + x @ self.down_RD.T @ self.up_DR.T)
        return changed

    @torch.no_grad()
    def merged(self, w_DI: Tensor, gate_D: Tensor) -> Tensor:
        """Return the weight of the writer with the operator merged."""
        return (self.scale_D * gate_D)[:, None] * (w_DI + self.up_DR @ (self.down_RD @ w_DI))

    @property
    def skew(self) -> Tensor:
        """Return ‖D₁ D₁ᵀ - I‖²."""
        inner = self.down_RD @ self.down_RD.T
        return (inner - torch.eye(len(inner), device=inner.device)).square().sum()


class Masked:
    """A model in memory, in float32, with operators and a low-rank change to every linear layer of its blocks.

    Args:
        source: The model.
        writers: Layers of its blocks that write the residual stream, by full name.
        start_D: Initial values of the mask.
        size: Number of kept channels S.
        steps: Number of training steps G.
        rank: Rank R of the operators.
        changes: Rank and alpha of the low-rank changes.
    """

    def __init__(
        self,
        source: ModelSource,
        writers: Sequence[str],
        start_D: Tensor,
        size: int,
        steps: int,
        rank: int,
        changes: tuple[int, int],
    ) -> None:
        self.source, self.size, self.steps = source, size, steps
        self.model: Any = student(source, *changes)
        self.mask_D = nn.Parameter(start_D.float().to(source.device))
        self.embedding = source.ends[0].removesuffix(".weight")
        names = [*([] if source.tied else [self.embedding]), *writers]
        self.operators = {name: Operator(len(start_D), rank).to(source.device) for name in names}
        self.gate_D = self.mask_D.detach()
        for name in (self.embedding, *writers):
            self.model.get_submodule(f"base_model.model.{name}").register_forward_hook(self._operate(name))

    def _operate(self, name: str) -> Any:
        operator = self.operators.get(name)
        return lambda module, args, x: x * self.gate_D if operator is None else operator(x, self.gate_D)

    def at(self, step: int, tokens: Tensor, **options: Any) -> Any:
        """Run the model with the gates of a training step."""
        self.gate_D = gates(self.mask_D, step, self.steps, self.size)
        return self.model(tokens, **options)

    def parameters(self) -> list[nn.Parameter]:
        """Return all trained parameters except the mask."""
        inside = [p for p in self.model.parameters() if p.requires_grad]
        return [*inside, *(p for operator in self.operators.values() for p in operator.parameters())]

    def penalty(self, step: int) -> Tensor:
        """Return the term added to the loss of a step."""
        skew = torch.stack([operator.skew for operator in self.operators.values()]).mean()
        if frozen(step, self.steps):
            return skew
        up_D = (self.mask_D >= 0).float()
        count = (up_D + self.mask_D - self.mask_D.detach()).sum()  # straight-through: its gradient is that of the mask
        return skew + COUNT * (count - self.size).abs() / self.size + (self.mask_D + 0.5 - up_D).square().mean()

    @torch.no_grad()
    def settle(self, done: int) -> None:
        """Reset the mask once it is frozen, because the optimizer's momentum still moves it."""
        if frozen(done, self.steps):
            self.mask_D.copy_(largest(self.mask_D, self.size) - 0.5)

    def tensors(self) -> dict[str, Tensor]:
        """Return the trained tensors, with the operators merged, by their names in the model. The model must not be used
        afterwards.
        """
        found = merged(self.model, self.source)
        gate_D = largest(self.mask_D, self.size)
        for name, operator in self.operators.items():
            if name == self.embedding:
                w_VD = self.source.read(f"{name}.weight").float().to(gate_D.device)
                found[f"{name}.weight"] = operator.merged(w_VD.T, gate_D).T
                continue
            found[f"{name}.weight"] = operator.merged(found[f"{name}.weight"], gate_D)
            if f"{name}.bias" in found:
                found[f"{name}.bias"] = operator.merged(found[f"{name}.bias"][:, None], gate_D)[:, 0]
        return found


def start(strength_D: Tensor, size: int) -> Tensor:
    """Return the initial mask: at or above 0 for the strongest channels, farther from 0 the farther from the cut-off."""
    logs_D = strength_D.clamp(min=1e-9 * strength_D.max()).log()
    ordered = logs_D.sort(descending=True).values
    return torch.tanh(logs_D - (ordered[size - 1] + ordered[size]) / 2) / 2


def frozen(step: int, steps: int) -> bool:
    """Return whether gates are zeros and ones in a step, counted from 0."""
    return step + 1 > FROZEN * steps


def gates(mask_D: Tensor, step: int, steps: int, size: int) -> Tensor:
    """Return the gates of the channels in a training step."""
    if frozen(step, steps):
        return largest(mask_D, size)
    time = step + 1
    sharpness = 1 / (1 - math.log(time) / math.log(steps))
    return torch.sigmoid(sharpness * mask_D) + max(0.5 - time / steps, 0)


def largest(mask_D: Tensor, size: int) -> Tensor:
    """Return ones for the `size` channels with the largest mask, zeros for the others."""
    return torch.zeros_like(mask_D).index_fill(0, mask_D.detach().argsort(descending=True, stable=True)[:size], 1.0)
