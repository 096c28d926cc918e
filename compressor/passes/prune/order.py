"""Rank the units of a part by importance, and refit its writer without the dropped ones.

The writer is refitted to the remaining entries of x so that its output stays as close as possible to W x. By least squares,

    W_S = W H[:, S] H[S, S]⁻¹        H = E[x xᵀ] + damping, S the kept columns.

Units are dropped one after the other, always the one of least cost when the rest is adjusted,

    cost of unit u = tr(W_u K W_uᵀ)    K = ([H⁻¹]_uu)⁻¹    W ← W - W_u K [H⁻¹]_u    H⁻¹ ← H⁻¹ - [H⁻¹]ᵀ_u K [H⁻¹]_u,

so the choices for all widths are nested, and each ends at the least squares above.

Sources: Hassibi and Stork, "Second Order Derivatives for Network Pruning: Optimal Brain Surgeon", NIPS 1992; Kurtic et al.,
"ZipLM", NeurIPS 2023, for units of several columns.

Shape suffixes: O out_features, I in_features, U units, C columns of a unit, S kept columns.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from compressor.passes.prune.prunable import spread

AT_ONCE = 16  # channels dropped before costs are computed again


def greedy(
    w_OI: Tensor, h_II: Tensor, columns: int, wanted: Sequence[int], damp: float = 0.01
) -> Iterator[tuple[Tensor, Tensor]]:
    """Drop units greedily. Yield for each wanted number, the largest first: the kept units [U] and the writer [O, S], fp64.

    Args:
        w_OI: Weight of the writer.
        h_II: Second moment of its input.
        columns: Number of columns per unit.
        wanted: Numbers of units to keep.
        damp: Damping added to the diagonal, as a fraction of its mean.
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
    """Keep the units with the highest scores, and yield as `greedy` does. Without `refit` the writer only loses columns."""
    order = score_U.argsort(descending=True, stable=True)
    columns = w_OI.shape[1] // len(score_U)
    for count in sorted(set(wanted), reverse=True):
        left = order[:count].sort().values
        at = spread(left, columns)
        yield left, least_squares(w_OI, h_II, at, damp) if refit else w_OI[:, at].double()


def least_squares(w_OI: Tensor, h_II: Tensor, at_S: Tensor, damp: float = 0.01) -> Tensor:
    """Refit a writer to some of its columns, so that its output is nearest to that with all. Returns [O, S], fp64."""
    h = damped(h_II, damp)
    factor = torch.linalg.cholesky(h[at_S][:, at_S])
    return torch.cholesky_solve(h[at_S] @ w_OI.double().T, factor).T


def damped(h_II: Tensor, damp: float) -> Tensor:
    """Return H in fp64, with a fraction of its mean diagonal added to the diagonal. A zero H becomes the identity."""
    h = h_II.double()
    h = h + damp * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype, device=h.device)
    return h if h.any() else torch.eye(len(h), dtype=h.dtype, device=h.device)
