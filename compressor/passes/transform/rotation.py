"""Random orthogonal matrices that are cheap to apply: Kronecker products of small factors.

    R = diag(signs) · (H ⊗ H ⊗ … ⊗ Q)        H: normalised Hadamard matrices, Q: a random orthogonal one of odd size

Multiplying a row by R spreads each entry over the entire row, so that no outlier remains.

Source: Ashkboos et al., "QuaRot", NeurIPS 2024, section 3. Difference: any size is possible, not only those with a known
Hadamard matrix.

Shape suffixes: X anything, N the size of the rotation.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from compressor.model.surgery.online_hadamard import FACTOR, sylvester

STRIP = 2**22  # numbers rotated at a time, in fp64


@dataclass(frozen=True)
class Rotation:
    """An orthogonal map x -> x R along the last axis."""

    signs_N: Tensor  # fp64, like the factors
    factors: tuple[Tensor, ...]

    @classmethod
    def random(cls, size: int, seed: int) -> "Rotation":
        """Return the rotation of a size that belongs to a seed. It is the same on every machine, up to the last digit."""
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
        odd, power = size, 1
        while odd % 2 == 0:
            odd, power = odd // 2, power * 2
        factors = []
        while power > 1:
            factors.append(_hadamard(min(power, FACTOR)))
            power //= len(factors[-1])
        if odd > 1:
            q, r = torch.linalg.qr(torch.randn(odd, odd, generator=generator, dtype=torch.float64))
            factors.append(q * r.diagonal().sign())  # uniform over the orthogonal matrices
        return cls(signs, tuple(factors))

    def __call__(self, x_XN: Tensor) -> Tensor:
        """Return x R, fp32. The last axis may hold several vectors of size N."""
        sizes = [len(factor) for factor in self.factors]
        rows_XN = x_XN.reshape(-1, prod(sizes))
        out_XN = torch.empty(rows_XN.shape)
        height = max(1, STRIP // prod(sizes))
        for done, strip in zip(out_XN.split(height), rows_XN.split(height), strict=True):
            turned = (strip.double() * self.signs_N).view(-1, *sizes)
            for factor in self.factors:  # each rotates the first axis and moves it to the end: finally all are in order
                turned = torch.tensordot(turned, factor, ([1], [0]))
            done.copy_(turned.reshape(strip.shape))
        return out_XN.view(x_XN.shape)

    def transposed(self, w_NX: Tensor) -> Tensor:
        """Return Rᵀ W, fp32, whose output is rotated. W has N output channels, or a multiple of N."""
        rotated_NX: Tensor = self(w_NX.T).T
        return rotated_NX


def _hadamard(size: int) -> Tensor:
    """Return a normalised Hadamard matrix, which is orthogonal and its own inverse."""
    normalised: Tensor = sylvester(size) / size**0.5
    return normalised
