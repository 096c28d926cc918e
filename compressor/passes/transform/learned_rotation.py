"""A rotation learned from the weights alone, under which weights have few outliers.

    minimise over orthogonal R   f(R) = mean of (x R)⁴      over vectors x of the weights, each scaled to a mean square of one

f is 3 for normally distributed entries, as after any random rotation. Outliers make it large, and a shared scale inefficient.
Each step draws some vectors and follows the gradient along the orthogonal matrices, with momentum, by an angle that decays to
zero as a cosine. A QR decomposition makes R orthogonal again. The computation is in fp64 and without branches, so that
results agree between machines.

Source: Liu et al., "SpinQuant", ICLR 2025, for learned rotations. It minimises the loss of the network; here no data is
needed, as in Gadhikar et al., "OptRot", 2025.

Shape suffixes: X vectors, N their size.
"""

from collections.abc import Callable
from math import cos, pi

import torch
from torch import Tensor

from compressor.model.edited import Progress, silent
from compressor.passes.transform.rotation import Rotation

STRIP = 2**22  # numbers held in fp64 at a time
ANGLE = 0.1  # of the first step: root mean square over the directions
MOMENTUM = 0.9
Vectors = Callable[[int], Tensor]  # number of a step -> its vectors [X, N], of any length, all on one device
EACH, LEAST = 4, 4096  # vectors of a step: number per dimension, and minimum


def batch(size: int) -> int:
    """Return the number of vectors of a size that a step uses."""
    return max(EACH * size, LEAST)


def some_vectors(w_XN: Tensor, count: int, seed: int) -> Tensor:
    """Return at most `count` rows of a weight, drawn at random."""
    return w_XN[torch.randperm(len(w_XN), generator=torch.Generator().manual_seed(seed))[:count]]


def of_one_length(x_XN: Tensor) -> Tensor:
    """Return vectors scaled to a mean square of one, fp64. Zero vectors are left out."""
    x_XN = x_XN.double()
    scale_X1 = x_XN.square().mean(1, keepdim=True).sqrt()
    return (x_XN / scale_X1)[scale_X1[:, 0] > 0]


def gradient(x_XN: Tensor, r_NN: Tensor) -> Tensor:
    """Return the gradient with respect to R of a quarter of the sum of fourth powers of x R."""
    total_NN = torch.zeros_like(r_NN)
    for strip in x_XN.split(max(1, STRIP // len(r_NN))):  # limits the memory of fp64 copies
        x = of_one_length(strip)
        total_NN.addmm_(x.T, (x @ r_NN).pow_(3))
    return total_NN


def learned(start: Rotation, vectors: Vectors, steps: int, tell: Progress = silent) -> Rotation:
    """Learn a rotation that lowers f.

    Args:
        start: Initial rotation, random.
        vectors: Vectors of each step.
        steps: Number of steps, at least one.
        tell: Callback for progress, called ten times.
    """
    x_XN = vectors(0)
    r_NN = start(torch.eye(x_XN.shape[1])).to(x_XN.device, torch.float64)
    velocity_NN = torch.zeros_like(r_NN)
    for step in range(steps):
        x_XN = vectors(step) if step else x_XN
        slope_NN = r_NN.T @ gradient(x_XN, r_NN)
        velocity_NN = MOMENTUM * velocity_NN + (slope_NN - slope_NN.T)
        angle = ANGLE * (1 + cos(pi * step / steps)) / 2
        pace = velocity_NN.square().sum(1).mean().sqrt().clamp_min(torch.finfo(r_NN.dtype).tiny)
        r_NN = _orthogonal(r_NN - r_NN @ velocity_NN * (angle / pace))
        if (step + 1) * 10 // steps > step * 10 // steps:
            tell(step + 1, steps)
    return Rotation(torch.ones(len(r_NN), dtype=torch.float64), (r_NN.cpu(),))


def _orthogonal(m_NN: Tensor) -> Tensor:
    """Return the Q of a QR decomposition whose R has a positive diagonal. It is close to an almost orthogonal input."""
    q, r = torch.linalg.qr(m_NN)
    orthogonal: Tensor = q * r.diagonal().sign()
    return orthogonal
