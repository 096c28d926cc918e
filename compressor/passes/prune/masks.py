"""Scores by which single weights are dropped, and the least squares refit of those that are kept.

Shape suffixes: O out_features, I in_features.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

CLOSE = 1e-6  # relative gradient at which a row counts as solved (1: at zero weights): stored numbers are coarser
MOST_STEPS = 300


def magnitude(w_OI: Tensor, square_I: Tensor) -> Tensor:
    """Score by |w|, regardless of the input."""
    return w_OI.abs()


def wanda(w_OI: Tensor, square_I: Tensor) -> Tensor:
    """Score by |w| · ‖x‖: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024, eq. 1.

    Args:
        w_OI: Weight, fp32.
        square_I: Mean square of each channel of the layer's input.
    """
    return w_OI.abs() * square_I.sqrt()


def ria(w_OI: Tensor, square_I: Tensor) -> Tensor:
    """Score by (|w| / sum of its column + |w| / sum of its row) · ‖x‖^½.

    Source: Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models" (RIA), ICLR
    2024, section 3. The arguments are those of `wanda`.
    """
    size_OI = w_OI.abs()
    share_OI = size_OI / size_OI.sum(0).clamp(min=1e-30) + size_OI / size_OI.sum(1, keepdim=True).clamp(min=1e-30)
    return share_OI * square_I.pow(0.25)


SCORES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"magnitude": magnitude, "wanda": wanda, "ria": ria}


@torch.no_grad()
def least_squares(w_OI: Tensor, start_OI: Tensor, stays_OI: Tensor, h_II: Tensor) -> Tensor:
    """Compute the weight V that minimises tr((W - V) H (W - V)ᵀ) and is zero where weights are dropped.

    Each row is a separate problem, V_S = (W H)_S H_SS⁻¹, where S are its kept columns. All rows are solved at once by
    conjugate gradients with H's diagonal as preconditioner. A step is one product with H; an inverse for each row would
    take as long as hundreds of them. No step raises the loss of any row.

    Args:
        w_OI: Weight, fp32.
        start_OI: Initial V, zero where weights are dropped.
        stays_OI: Mask of the kept weights, bool.
        h_II: Second moment of the layer's input, damped: positive definite.
    """
    inverse_OI = stays_OI / h_II.diagonal()  # zero for dropped weights, so no step changes them
    v_OI = start_OI.clone()
    goal_O = ((w_OI @ h_II).square() * inverse_OI).sum(1) * CLOSE**2
    residual_OI = (w_OI - v_OI) @ h_II
    toward_OI = residual_OI * inverse_OI
    left_O = (residual_OI * toward_OI).sum(1)
    for _ in range(MOST_STEPS):
        going_O = left_O > goal_O
        if not going_O.any():
            break
        bent_OI = toward_OI @ h_II
        step_O1 = torch.where(going_O, left_O / (toward_OI * bent_OI).sum(1), 0)[:, None]
        v_OI += step_O1 * toward_OI
        residual_OI -= step_O1 * bent_OI
        before_O, left_O = left_O, (residual_OI.square() * inverse_OI).sum(1)
        toward_OI = residual_OI * inverse_OI + (left_O / before_O.clamp(min=1e-30))[:, None] * toward_OI
    return v_OI


def damped(h_II: Tensor, damp: float) -> Tensor:
    """Add a fraction of the mean diagonal to the diagonal. If H is zero, `damp` times the identity results."""
    mean = float(h_II.diagonal().mean()) or 1.0
    h_II = h_II.clone()
    h_II.diagonal().add_(max(damp, 1e-12) * mean)
    return h_II
