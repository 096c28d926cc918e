"""Codebooks of vectors: k-means, and the nearest entry.

Vectors are weighted. Starting points are drawn in a few rounds; the chance of a vector is proportional to its error so far.
Entries to which no vector is nearest are moved to the vectors with the largest error.

Source: Lloyd, "Least Squares Quantization in PCM", 1982; Bahmani et al., "Scalable K-Means++", VLDB 2012; the weights are
those of Liu et al., "VPTQ", EMNLP 2024.

Shape suffixes: O out_features, C adjacent columns, N vectors, D their length, K entries of a codebook.
"""

import torch
from torch import Tensor

ROUNDS = 16  # number of rounds in which starting points are drawn
MOST = 2**18  # largest number of vectors that a codebook is fitted to; of more, an even sample is taken
AT_ONCE = 2**22  # distances computed together: bounds the temporaries


def vectors(w_OC: Tensor, length: int) -> Tensor:
    """Return the vectors of a weight, [O / length * C, length]."""
    found_ND: Tensor = w_OC.unflatten(0, (-1, length)).transpose(1, 2).flatten(0, 1)
    return found_ND


def nearest(x_ND: Tensor, codebook_KD: Tensor) -> Tensor:
    """Return the entry nearest to each vector, int64 [N]; of equally near ones the first."""
    half_K = codebook_KD.square().sum(1) / 2
    parts = x_ND.split(max(1, AT_ONCE // len(codebook_KD)))
    return torch.cat([torch.addmm(half_K, part, codebook_KD.T, alpha=-1).argmin(1) for part in parts])


def near(x_ND: Tensor, codebook_KD: Tensor, count: int) -> Tensor:
    """Return the `count` nearest entries of each vector, int64 [N, count], unsorted."""
    half_K = codebook_KD.square().sum(1) / 2
    parts = x_ND.split(max(1, AT_ONCE // len(codebook_KD)))
    scores = (torch.addmm(half_K, part, codebook_KD.T, alpha=-1) for part in parts)
    return torch.cat([score.topk(count, dim=1, largest=False, sorted=False).indices for score in scores])


def sample(x_ND: Tensor, weight_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return every n-th vector, so that at most `MOST` remain, and their weights."""
    every = -(-len(x_ND) // MOST)
    return x_ND[::every], weight_N[::every]


@torch.no_grad()
def kmeans(x_ND: Tensor, weight_N: Tensor, entries: int, *, iterations: int, seed: int = 0) -> tuple[Tensor, list[float]]:
    """Fit a codebook to vectors by weighted k-means.

    Args:
        x_ND: Vectors, fp32.
        weight_N: Weight of each vector's error, not negative.
        entries: Number of entries, K. If there are fewer distinct vectors, the remaining entries are zero.
        iterations: Largest number of iterations of Lloyd's algorithm; it stops early when nothing changes.
        seed: Seed for drawing the starting points.

    Returns:
        The codebook, fp32 [entries, D], and the weighted squared error at each iteration, which never rises.
    """
    codebook_KD = _start(x_ND, weight_N, entries, torch.Generator().manual_seed(seed))
    errors: list[float] = []
    for _ in range(iterations):
        index_N = nearest(x_ND, codebook_KD)
        missed_N = (x_ND - codebook_KD[index_N]).square().sum(1) * weight_N
        errors.append(float(missed_N.double().sum()))
        if errors[-1] == 0 or (len(errors) > 1 and errors[-1] >= errors[-2] * (1 - 1e-6)):
            break
        codebook_KD = _centres(x_ND, weight_N, index_N, codebook_KD, missed_N)
    return codebook_KD, errors


def _centres(x_ND: Tensor, weight_N: Tensor, index_N: Tensor, codebook_KD: Tensor, missed_N: Tensor) -> Tensor:
    """Return the weighted mean of the vectors of each entry; an entry without vectors becomes one with a large error."""
    total_K = torch.zeros(len(codebook_KD), dtype=torch.float64, device=x_ND.device).index_add_(0, index_N, weight_N.double())
    sums_KD = torch.zeros_like(codebook_KD, dtype=torch.float64)
    sums_KD.index_add_(0, index_N, x_ND.double() * weight_N[:, None])
    centres_KD = torch.where(total_K[:, None] > 0, sums_KD / total_K.clamp(min=1e-300)[:, None], codebook_KD).float()
    empty_K = (total_K == 0).nonzero()[:, 0]
    worst_N = missed_N.topk(min(len(empty_K), len(x_ND))).indices
    worst_N = worst_N[missed_N[worst_N] > 0]
    centres_KD[empty_K[: len(worst_N)]] = x_ND[worst_N]
    return centres_KD


def _start(x_ND: Tensor, weight_N: Tensor, entries: int, generator: torch.Generator) -> Tensor:
    """Draw vectors that are far from each other; if there are too few distinct ones, the remaining entries are zero."""
    codebook_KD = torch.zeros(entries, x_ND.shape[1], device=x_ND.device)
    missed_N = x_ND.square().sum(1)
    taken = 0
    for round_ in range(ROUNDS):
        chance_N = (missed_N * weight_N).double().cpu()
        wanted = min((round_ + 1) * entries // ROUNDS - taken, int((chance_N > 0).sum()))
        if wanted == 0:
            continue
        # sampling without replacement by the largest log(u) / chance, which works for any number of vectors
        clocks_N = torch.rand(len(x_ND), generator=generator, dtype=torch.float64).log() / chance_N
        new_N = clocks_N.topk(wanted).indices.to(x_ND.device)
        codebook_KD[taken : taken + wanted] = x_ND[new_N]
        fresh_KD = codebook_KD[taken : taken + wanted]
        taken += wanted
        gained_N = (x_ND - fresh_KD[nearest(x_ND, fresh_KD)]).square().sum(1)
        missed_N = torch.minimum(missed_N, gained_N) if round_ or taken > wanted else gained_N
    return codebook_KD
