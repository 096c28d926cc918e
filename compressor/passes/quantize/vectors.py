"""Reduce a layer to what codebooks of vectors have to hold: its norms and its dense channels are taken out first.

Norms are a change of variables: W = V diag(n) has the loss of V with the second moment diag(n) H diag(n).

Dense channels D can always be set to what is best for the others R. What is left for these is the loss with the Schur
complement H_RR - H_RD H_DD⁻¹ H_DR, and the best are W_D + (W_R - Q_R) H_RD H_DD⁻¹.

Shape suffixes: O out_features, I in_features, R channels that are rounded, D that are dense.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compressor.formats.base import QuantizedTensor
from compressor.formats.numerics.codes import others
from compressor.formats.vq import VQ, VectorGrid
from compressor.passes.quantize.gptq import Factors, Layer, output_energy

LEAST = 1e-8  # of the largest norm: a column of zeros has one, too


@dataclass(frozen=True)
class Problem:
    """A weight for a grid of vectors."""

    w_OI: Tensor  # fp32, without norms and dense channels
    h_II: Tensor  # fp32, to match, in units that make the losses of several layers comparable
    factor: Factors  # of it, but for its unit
    norm: Tensor | None  # fp32, numbers that bf16 holds
    channels_D: Tensor | None  # int32, those that are dense
    dense: Callable[[Tensor], Tensor]  # from the values of the others, [O, R], with norms, to theirs, [O, D]

    def packed(self, grid: VectorGrid, codes: Tensor) -> QuantizedTensor:
        """Return the packed weight."""
        found = grid.vector_codes(codes)
        rows, columns = len(self.w_OI), self.w_OI.shape[1]
        if self.norm is not None:
            found = replace(found, norm=self.norm.bfloat16())
        if self.channels_D is not None:
            values_OR = grid.decode(codes, 0) * (1.0 if self.norm is None else self.norm)
            found = replace(found, channels_N=self.channels_D, dense_ON=self.dense(values_OR).bfloat16())
            columns += len(self.channels_D)
        return grid.format.stored(found, (rows, columns))


@torch.no_grad()
def reduced(layer: Layer, fmt: VQ, damp: float) -> Problem:
    """Take norms and dense channels out of a layer, and return the rest.

    Args:
        layer: Weight, and second moment of its input.
        fmt: Says which norms there are, and how many channels are dense: those with the largest second moments.
        damp: Added to the diagonal of H_DD, as a fraction of its mean.
    """
    w_OI, h_II, count = layer.w_OI, layer.h_II, fmt.dense_channels(layer.w_OI.shape[1])
    channels_D: Tensor | None = None
    dense: Callable[[Tensor], Tensor] = _none
    if count:
        channels_D = h_II.diagonal().topk(count).indices.sort().values
        w_OI, h_II, dense = _without(w_OI, h_II, channels_D, damp)
    norm = _norm(w_OI, h_II, fmt)
    if norm is not None:
        w_OI, h_II = w_OI / norm, h_II * norm * norm.expand(len(h_II))[:, None]
    if fmt.norm != "none":  # layers may share codebooks: each counts by what part of its output is lost
        h_II = h_II / max(output_energy(w_OI, h_II), 1e-30)
    alone = not count and fmt.norm != "channel"  # then the factor is that of the layer's input
    factor = layer.factor if alone else layer.factors_of(h_II)
    return Problem(w_OI, h_II, factor, norm, None if channels_D is None else channels_D.int(), dense)


def _norm(w_OI: Tensor, h_II: Tensor, fmt: VQ) -> Tensor | None:
    """Root mean squares, of a layer with its input channels weighed by their second moments."""
    if fmt.norm == "none":
        return None
    if fmt.norm == "channel":
        norm = w_OI.square().mean(0).sqrt()
    else:
        weight_I = h_II.diagonal().clamp(min=0)
        mean = (w_OI.square().mean(0) * weight_I).sum() / weight_I.sum().clamp(min=1e-30)
        norm = (mean if weight_I.any() else w_OI.square().mean()).sqrt()[None]
    stored: Tensor = norm.clamp(min=max(LEAST * float(norm.max()), 1e-30)).bfloat16().float()
    return stored


def _without(
    w_OI: Tensor, h_II: Tensor, channels_D: Tensor, damp: float
) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """Weight and second moment of the channels that are not dense, and what the dense ones become, given these' values."""
    rest_R = others(channels_D, len(h_II))
    h_DD = h_II[channels_D][:, channels_D].double()
    h_DD.diagonal().add_(max(damp, 1e-6) * float(h_DD.diagonal().mean()) + 1e-30)
    h_RD = h_II[rest_R][:, channels_D]
    made_up_DR = torch.linalg.solve(h_DD, h_RD.double().T).float()
    left_RR = h_II[rest_R][:, rest_R] - h_RD @ made_up_DR
    left_RR = (left_RR + left_RR.T) / 2
    left_RR.diagonal().clamp_(min=0)
    w_OR = w_OI[:, rest_R]

    def dense(values_OR: Tensor) -> Tensor:
        return w_OI[:, channels_D].addmm(w_OR - values_OR, made_up_DR.T)

    return w_OR, left_RR, dense


def _none(values_OR: Tensor) -> Tensor:
    return values_OR[:, :0]
