"""Gates before the writers of parts, one for each unit, that learn which units to drop.

Values are from 0 to 1, often exactly 0 or 1. A gate is a hard concrete variable. With u uniform in (0, 1), drawn anew in
every step,

    z = min(1, max(0, s (ζ - γ) + γ))    s = σ((log u - log(1 - u) + log α) / β)    β = 2/3, γ = -0.1, ζ = 1.1

so it is open (above 0) with probability σ(log α - β log(-γ / ζ)). The mean of that over the units of a part is the expected
fraction of units kept. Multipliers hold the expected sparsity s of every part to its target t. The loss gets the term

    λ₁ (s - t) + λ₂ (s - t)²

which the gates minimise and the multipliers maximise. After training, a unit is kept or dropped. The gate without noise,
min(1, max(0, σ(log α) (ζ - γ) + γ)), is folded into the columns of the writer.

Sources: Louizos et al., "Learning Sparse Neural Networks through L0 Regularization", ICLR 2018, equations 10 to 13; Wang et
al., "Structured Pruning of Large Language Models", EMNLP 2020, equation 7, for the multipliers.

Shape suffixes: G gates of all parts, one part after the other; P parts; U units of one part.
"""

import math
import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compressor.model.source import ModelSource
from compressor.passes.prune.prunable import Part

BETA, LOW, HIGH = 2 / 3, -0.1, 1.1  # β, γ, ζ
CLOSED = 0.01  # initial 1 - σ(log α)


def sampled(log_alpha: Tensor, noise: Tensor) -> Tensor:
    """Return gates for given noise, uniform in (0, 1)."""
    return _stretched(torch.sigmoid((noise.log() - (1 - noise).log() + log_alpha) / BETA))


def settled(log_alpha: Tensor) -> Tensor:
    """Return gates without noise."""
    return _stretched(torch.sigmoid(log_alpha))


def chance(log_alpha: Tensor) -> Tensor:
    """Return the probability that a gate is above 0."""
    return torch.sigmoid(log_alpha - BETA * math.log(-LOW / HIGH))


def _stretched(s: Tensor) -> Tensor:
    return (s * (HIGH - LOW) + LOW).clamp(0, 1)


class Gates:
    """Gates of a model in memory, with the multipliers that enforce how many units are kept.

    Args:
        model: Model of transformers, or of peft, whose writers have no low-rank change.
        source: Checkpoint that the model was loaded from.
        parts: Parts that get gates, by full name.
        keep: Number of units of each part to keep.
        seed: Seed of the noise.
    """

    def __init__(self, model: nn.Module, source: ModelSource, parts: Mapping[str, Part], keep: Mapping[str, int], seed: int):
        self.model, self.parts, self.seed = model, parts, seed
        counts = [part.count for part in parts.values()]
        start = math.log(1 - CLOSED) - math.log(CLOSED)
        self.log_alpha_G = nn.Parameter(torch.full((sum(counts),), start, device=source.device))
        self.multipliers_2P = nn.Parameter(torch.zeros(2, len(counts), device=source.device))
        self.targets_P = torch.tensor([1 - keep[name] / part.count for name, part in parts.items()], device=source.device)
        self.open = self.by_part(torch.ones_like(self.log_alpha_G))
        modules = {name.removeprefix("base_model.model."): module for name, module in model.named_modules()}
        for name, part in parts.items():
            writer = modules[f"{name.removesuffix(part.name)}{part.writer}"]
            writer.register_forward_pre_hook(self._gate(name, part.columns))

    def _gate(self, name: str, columns: int) -> Any:
        return lambda module, args: (args[0] * self.open[name].repeat_interleave(columns), *args[1:])

    def by_part(self, all_G: Tensor) -> dict[str, Tensor]:
        """Return the entries of each part, [U]."""
        return dict(zip(self.parts, all_G.split([part.count for part in self.parts.values()]), strict=True))

    def at(self, step: int, tokens: Tensor, **options: Any) -> Any:
        """Run the model with the gates of a training step."""
        numbers = torch.Generator().manual_seed(random.Random(f"{self.seed}-{step}").getrandbits(63))
        tiny = torch.finfo(torch.float32).eps
        noise_G = torch.rand(len(self.log_alpha_G), generator=numbers).clamp(tiny, 1 - tiny)
        self.open = self.by_part(sampled(self.log_alpha_G, noise_G.to(self.log_alpha_G.device)))
        return self.model(tokens, **options)

    def sparsity(self) -> Tensor:
        """Return the expected fraction of units dropped [P]."""
        return 1 - torch.stack([chance_U.mean() for chance_U in self.by_part(chance(self.log_alpha_G)).values()])

    def penalty(self, share: float) -> Tensor:
        """Return the term added to the loss when a fraction `share` of the target sparsities is demanded."""
        over_P = self.sparsity() - share * self.targets_P
        first_P, second_P = self.multipliers_2P
        penalty: Tensor = (first_P * over_P + second_P * over_P.square()).sum()
        return penalty
