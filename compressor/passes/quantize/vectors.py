"""Reduce a layer to the part that vector codebooks store: first its norms and its dense channels are separated.

Norms are a change of variables: W = V diag(n) has the loss of V with the second moment diag(n) H diag(n).

Dense channels D can always be set to the optimum given the others R, which is W_D + (W_R - Q_R) H_RD H_DD⁻¹. The loss of R
is then that with the Schur complement H_RR - H_RD H_DD⁻¹ H_DR as second moment.

Shape suffixes: O out_features, I in_features, R rounded channels, D dense channels.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compressor.formats.base import QuantizedTensor
from compressor.formats.numerics.codes import others
from compressor.formats.vq import VQ, VectorGrid
from compressor.passes.quantize.gptq import Factors, Layer, output_energy

LEAST = 1e-8  # lower limit of a norm, relative to the largest: a column of zeros must not get norm 0


@dataclass(frozen=True)
class Problem:
    """A weight to round to a grid of vectors."""

    w_OI: Tensor  # fp32, without norms and dense channels
    h_II: Tensor  # second moment to match, fp32, scaled so that the losses of several layers are comparable
    factor: Factors  # factors of `h_II`, up to its scale
    norm: Tensor | None  # fp32, values representable in bf16
    channels_D: Tensor | None  # indices of the dense channels, int32
    dense: Callable[[Tensor], Tensor]  # values of the other channels [O, R], norms included -> dense channels [O, D]

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
    """Separate norms and dense channels from a layer, and return the rest.

    Args:
        layer: Weight, and second moment of its input.
        fmt: Format, which defines the norms and the number of dense channels: those with the largest second moments.
        damp: Damping added to the diagonal of H_DD, as a fraction of its mean.
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
    if fmt.norm != "none":  # layers may share codebooks: weigh each by its relative output error
        h_II = h_II / max(output_energy(w_OI, h_II), 1e-30)
    alone = not count and fmt.norm != "channel"  # then the factor of the layer's input can be reused
    factor = layer.factor if alone else layer.factors_of(h_II)
    return Problem(w_OI, h_II, factor, norm, None if channels_D is None else channels_D.int(), dense)


def _norm(w_OI: Tensor, h_II: Tensor, fmt: VQ) -> Tensor | None:
    """Return root mean squares of the weight: [I] per channel, or [1] per layer, weighted by the channels' second moments."""
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
    """Return weight and second moment without the dense channels, and a function from the other values to the dense ones."""
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
