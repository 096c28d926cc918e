"""Rank the units of a part by importance, and refit its writer without the dropped ones.

The writer's output W x, with what remains of x, is brought as near as possible to what it was: by least squares,

    W_S = W H[:, S] H[S, S]⁻¹        H = E[x xᵀ] + damping, S the columns that stay.

Units are removed one after the other, always the one whose loss costs least after that, with the rest adjusted,

    cost of unit u = tr(W_u K W_uᵀ)    K = ([H⁻¹]_uu)⁻¹    W ← W - W_u K [H⁻¹]_u    H⁻¹ ← H⁻¹ - [H⁻¹]ᵀ_u K [H⁻¹]_u,

so that the choices for all widths are nested and each ends at the least squares above.

Sources: Hassibi and Stork, "Second Order Derivatives for Network Pruning: Optimal Brain Surgeon", NIPS 1992; Kurtic et al.,
"ZipLM", NeurIPS 2023, for units of several columns.

Shape suffixes: O out_features, I in_features, U units, C columns of a unit, S columns that stay.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from compressor.passes.prune.prunable import spread

AT_ONCE = 16  # channels that are removed between two looks at what each would cost


def greedy(
    w_OI: Tensor, h_II: Tensor, columns: int, wanted: Sequence[int], damp: float = 0.01
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each wanted number of units, the most first: those that stay [U], in order, and the writer [O, S], fp64.

    Args:
        w_OI: Weight of the writer.
        h_II: Second moment of what it reads.
        columns: Columns of each unit.
        wanted: Numbers of units.
        damp: Added to the diagonal, in parts of its mean.
    """
    w, hinv = w_OI.double().clone(), torch.linalg.inv(damped(h_II, damp))
    left = torch.arange(w.shape[1] // columns, device=w.device)
    for count in sorted(set(wanted), reverse=True):
        while len(left) > count:
            at_UC = spread(left, columns).view(-1, columns)
            inner_UCC = torch.linalg.inv(hinv[at_UC[:, :, None], at_UC[:, None, :]])
            w_OUC = w[:, at_UC]
            cost_U = torch.einsum("ouc,ucd,oud->u", w_OUC, inner_UCC, w_OUC)
            going = cost_U.argsort(stable=True)[: min(AT_ONCE if columns == 1 else 1, len(left) - count)]
            gone = at_UC[going].flatten()
            gain = torch.linalg.solve(hinv[gone][:, gone], hinv[gone])
            w.addmm_(w[:, gone], gain, alpha=-1)
            hinv.addmm_(hinv[:, gone], gain, alpha=-1)
            left = left[~torch.isin(torch.arange(len(left), device=left.device), going)]
        yield left, w[:, spread(left, columns)]


def by_score(
    w_OI: Tensor, h_II: Tensor, score_U: Tensor, wanted: Sequence[int], damp: float = 0.01, *, refit: bool = True
) -> Iterator[tuple[Tensor, Tensor]]:
    """The same with the units of the highest scores; without `refit` the writer only loses its columns."""
    order = score_U.argsort(descending=True, stable=True)
    columns = w_OI.shape[1] // len(score_U)
    for count in sorted(set(wanted), reverse=True):
        left = order[:count].sort().values
        at = spread(left, columns)
        yield left, least_squares(w_OI, h_II, at, damp) if refit else w_OI[:, at].double()


def least_squares(w_OI: Tensor, h_II: Tensor, at_S: Tensor, damp: float = 0.01) -> Tensor:
    """The writer [O, S], fp64, that with some of its columns comes nearest to its output with all."""
    h = damped(h_II, damp)
    factor = torch.linalg.cholesky(h[at_S][:, at_S])
    return torch.cholesky_solve(h[at_S] @ w_OI.double().T, factor).T


def damped(h_II: Tensor, damp: float) -> Tensor:
    """fp64, with a part of its mean diagonal added to the diagonal; of nothing seen, the identity."""
    h = h_II.double()
    h = h + damp * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype, device=h.device)
    return h if h.any() else torch.eye(len(h), dtype=h.dtype, device=h.device)
