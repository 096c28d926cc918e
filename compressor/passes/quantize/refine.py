"""Coordinate descent after GPTQ: one scale or one code at a time is set to the best value that can be stored.

The loss tr((W - Q) H (W - Q)ᵀ) is quadratic in any single scale and in any single code. The storable value nearest to the
minimum is therefore the best, and no step raises the loss. GPTQ cannot revise a code once later columns have moved; these
sweeps can.

Source: our own. Scales of fixed codes by least squares are folklore; the descent over codes is that of Nair and Suggala,
"CDQuant", 2024.

Shape suffixes: O out_features, I in_features, C adjacent columns.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from compressor.formats.base import Rescalable

AT_ONCE = 128  # columns whose changes are collected before the rest of the gradient is updated; affects speed only

Step = Callable[[int, Tensor, Tensor], Tensor]  # first column, slopes [C, O], Hessian [C, C] -> change of values [O, C]


@torch.no_grad()
def refined(w_OI: Tensor, h_II: Tensor, codes: Tensor, grid: Rescalable, *, sweeps: int) -> tuple[Tensor, Rescalable]:
    """Improve codes and scales. The loss does not rise.

    Args:
        w_OI: Weight, fp32; not modified.
        h_II: Second moment of the layer's input, fp32; not modified.
        codes: Initial codes [O, I]; not modified.
        grid: Grid of the codes.
        sweeps: Number of sweeps, each over all scales, then over all codes.
    """
    codes = codes.clone()
    slope_IO = h_II @ (w_OI - grid.decode(codes, 0)).T  # minus half the gradient with respect to the values

    def rescale(column: int, slope_CO: Tensor, h_CC: Tensor) -> Tensor:
        nonlocal grid
        now = codes[:, column : column + len(h_CC)]
        values = grid.decode(now, column)
        grid = grid.rescaled(column, (slope_CO.T * values).sum(1), ((values @ h_CC) * values).sum(1))
        return grid.decode(now, column) - values

    def recode(column: int, slope_CO: Tensor, h_CC: Tensor) -> Tensor:
        now = codes[:, column : column + 1]
        values = grid.decode(now, column)
        if h_CC > 0:  # no token used this input: keep its code
            now.copy_(grid.round(values + slope_CO.T / h_CC, column))
        return grid.decode(now, column) - values

    for _ in range(sweeps):
        sweep(slope_IO, h_II, grid.width, rescale)
        sweep(slope_IO, h_II, 1, recode)
    return codes, grid


def sweep(slope_IO: Tensor, h_II: Tensor, width: int, step: Step) -> None:
    """Take a step for every `width` adjacent columns, keeping the slopes up to date."""
    size = max(AT_ONCE // width, 1) * width
    for lo in range(0, len(h_II), size):
        hi = min(lo + size, len(h_II))
        near_CO, near_CC = slope_IO[lo:hi].clone(), h_II[lo:hi, lo:hi]
        changes = []
        for c in range(0, hi - lo, width):
            now = slice(c, c + width)
            changes.append(step(lo + c, near_CO[now], near_CC[now, now]))
            near_CO[now.stop :].addmm_(near_CC[now.stop :, now], changes[-1].T, alpha=-1)
        slope_IO.addmm_(h_II[:, lo:hi], torch.cat(changes, dim=1).T, alpha=-1)
