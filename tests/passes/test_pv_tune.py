"""PV-Tuning: all blocks together, towards the dense model's predictions."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from compressor.formats.base import Format, QuantizedTensor
from compressor.formats.int_group import IntGroup
from compressor.formats.vq import VQ
from compressor.passes.train.latents import VectorRounding
from compressor.passes.train.loop import largest
from compressor.passes.train.pv_tune import PVTune
from compressor.pipeline.contract import Whole
from compressor.pipeline.ranks import Ranks


def packed(fmt: Format, w: Tensor) -> QuantizedTensor:
    """To the nearest."""
    grid = fmt.fit(w)
    return grid.pack(grid.round(w, 0))


def whole(fmt: Format, told: list[int] | None = None) -> Whole:
    """A model of two layers, one after the other."""
    g = torch.Generator().manual_seed(0)
    w = {name: torch.randn(32, 32, generator=g) / 32**0.5 for name in ("a", "b")}
    inputs = [torch.randn(8, 16, 32, generator=g) for _ in range(2)]

    def student(x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        return 3 * torch.tanh(x @ weights["a"].T) @ weights["b"].T

    return Whole(
        inputs=inputs,
        targets=[student(x, w) for x in inputs],
        student=student,
        teacher=lambda y: y,
        packed={name: packed(fmt, weight) for name, weight in w.items()},
        dense=w,
        dtype=torch.float32,
        ranks=Ranks(),
        progress=lambda done, total: None if told is None else told.append(done),
    )


def divergence(of: Whole, layers: Mapping[str, QuantizedTensor]) -> float:
    """KL of the predictions, by its definition."""
    weights = {name: new.dequantize() for name, new in layers.items()}
    p, q = (torch.cat(y).softmax(-1).double() for y in (of.targets, [of.student(x, weights) for x in of.inputs]))
    return float((p * (p.log() - q.log())).sum(-1).mean())


@pytest.mark.parametrize("fmt", [VQ(vector=4, bits=5), VQ(bits=3, residual_bits=3), IntGroup(bits=2, group_size=16)], ids=str)
@pytest.mark.parametrize("moving", [1.0, 0.1])
def test_the_predictions_come_nearer_to_the_dense_models(fmt: Format, moving: float) -> None:
    told: list[int] = []
    model = whole(fmt, told)
    tuned, warnings = PVTune(steps=60, moving=moving, lr=0.02, scale_lr=2e-3).tune(model)
    assert divergence(model, tuned) < 0.8 * divergence(model, model.packed)
    assert told == list(range(1, 61))
    assert not warnings
    for name, new in tuned.items():
        assert new.format == model.packed[name].format
        assert {part: t.shape for part, t in new.parts.items()} == {p: t.shape for p, t in model.packed[name].parts.items()}


def test_steps_of_no_length_change_nothing_and_say_so() -> None:
    tuned, warnings = PVTune(steps=2, lr=0.0, scale_lr=0.0).tune(whole(VQ(vector=4, bits=5)))
    assert not tuned
    assert "2 steps did not bring its predictions nearer" in warnings[0]


def test_a_step_moves_the_share_of_vectors_with_the_largest_gradients() -> None:
    model = whole(VQ(vector=4, bits=5))
    rounding = VectorRounding.at(model.packed["a"].format.codes(model.packed["a"]), model.dense["a"])  # type: ignore[arg-type]
    slope = torch.randn(32, 32, generator=torch.Generator().manual_seed(1))
    kept = largest(slope, rounding, 0.25)
    norms = {(v, i): float(slope[4 * v : 4 * v + 4, i].norm()) for v in range(8) for i in range(32)}
    strongest = sorted(norms, key=lambda at: -norms[at])[:64]
    for v, i in norms:
        expected = slope[4 * v : 4 * v + 4, i] if (v, i) in strongest else torch.zeros(4)
        assert torch.equal(kept[4 * v : 4 * v + 4, i], expected)


def test_a_share_that_cannot_be_is_refused() -> None:
    for share in (0.0, 1.5, -0.1):
        with pytest.raises(ValueError, match=r"moving: .* is not above 0 and at most 1"):
            PVTune(moving=share)
