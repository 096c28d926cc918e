"""A rotation learned from the weights alone: turned by it, they have few values that stand out.

    least over orthogonal R of   f(R) = mean of (x R)⁴      over vectors x of the weights, each scaled to a mean square of one

f is 3 where entries are as normally distributed, as after any random rotation; outliers make it large, and a scale wasteful.
R follows the gradient and is made orthogonal again after every step, by a QR decomposition; steps that would increase f are
not taken, but tried again half as long.

Source: Liu et al., "SpinQuant", ICLR 2025, for rotations that are learned; the loss there is the network's, here no data is
needed, as in Gadhikar et al., "OptRot", 2025.

Shape suffixes: X vectors, N their size.
"""

import torch
from torch import Tensor

from compressor.passes._rotation import Rotation

VECTORS = 8  # for every dimension: they outnumber what they are to determine, N · (N − 1) / 2 angles, 16 to 1
GROWTH = 1.3  # of the step, after one that was taken
SMALLEST = 2.0**-20  # step, against the first


def some_vectors(w_XN: Tensor, count: int) -> Tensor:
    """At most so many rows of a weight, evenly apart, each of mean square one; rows of zeros are left out."""
    rows = torch.linspace(0, len(w_XN) - 1, min(count, len(w_XN))).round().long()
    chosen = w_XN[rows]
    scale = chosen.square().mean(1, keepdim=True).sqrt()
    return (chosen / scale)[scale[:, 0] > 0]


def learned(start: Rotation, x_XN: Tensor, steps: int) -> Rotation:
    """A rotation at which f is not larger than at the start.

    Args:
        start: From where; a random one.
        x_XN: The vectors.
        steps: How many.
    """
    r_NN = start(torch.eye(x_XN.shape[1]))
    loss, slope = _loss(x_XN @ r_NN), _slope(x_XN, r_NN)
    step = first = 0.1 / max(float(torch.linalg.matrix_norm(slope)) / len(r_NN) ** 0.5, 1e-12)
    for _ in range(steps):
        tried = _orthogonal(r_NN - step * slope)
        new = _loss(x_XN @ tried)
        if new < loss:
            r_NN, loss, step = tried, new, step * GROWTH
            slope = _slope(x_XN, r_NN)
        else:
            step /= 2
        if step < SMALLEST * first:
            break
    return Rotation(torch.ones(len(r_NN), dtype=torch.float64), (_orthogonal(r_NN.double()),))


def _loss(y_XN: Tensor) -> float:
    """f, given the turned vectors."""
    return float(y_XN.square().square_().mean(dtype=torch.float64))


def _slope(x_XN: Tensor, r_NN: Tensor) -> Tensor:
    """The gradient of f along the orthogonal matrices: R times an antisymmetric matrix."""
    y_XN = x_XN @ r_NN
    gradient = x_XN.T @ y_XN.pow(3) * (4 / y_XN.numel())
    across = r_NN.T @ gradient
    return r_NN @ (across - across.T) / 2


def _orthogonal(m_NN: Tensor) -> Tensor:
    """The orthogonal matrix of a QR decomposition whose R has a positive diagonal: near to a matrix that nearly is one."""
    q, r = torch.linalg.qr(m_NN)
    orthogonal: Tensor = q * r.diagonal().sign()
    return orthogonal
