"""Learned masks over hidden channels: what operators do while they are trained is what the written model does."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_residual import CPU, logits
from tiny_models import some_tokens, stock_logits, tensors

from compressor import api
from compressor.errors import RecipeError
from compressor.model.source import ModelSource
from compressor.passes.prune.pat_operators import Masked, Operator, frozen, gates, largest, start
from compressor.passes.prune.residual import Residual
from compressor.passes.train.distillation import Training
from compressor.recipe.schema import make_recipe

STEPS = 10


def run(model: Path, out: Path, text: Path, *, resume: bool = False, **options: Any) -> dict[str, Any]:
    """What `pat` reports."""
    calibration = {"source": str(text), "samples": 8, "seq_len": 32}
    step = {"pass": "pat", "steps": STEPS, "batch": 4, "ratio": 0.3, **options}
    recipe = make_recipe({"passes": [step], "calibration": calibration, "evaluation": None})
    (report,) = api.run(recipe, model, out, verify=False, resume=resume).pruning
    return dict(report)


def masked(source: ModelSource, size: int) -> Masked:
    """A model with operators and changes in which every parameter matters."""
    torch.manual_seed(0)
    writers = [f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.o_proj", "mlp.down_proj")]
    made = Masked(source, writers, torch.randn(128), size, STEPS, 6, (3, 4))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return made


@pytest.mark.parametrize("family", ["llama", "llama_tied", "llama_biased", "gemma2"])
def test_what_is_cut_computes_what_was_trained(family: str, tiny: Callable[..., Path]) -> None:
    source = ModelSource(tiny(family), CPU)
    trained = masked(source, 96)
    with torch.no_grad():
        expected = trained.at(STEPS - 1, some_tokens(), use_cache=False).logits
        plain = stock_logits(tiny(family), some_tokens())
    found, kept = trained.tensors(), trained.mask_D.argsort(descending=True)[:96].sort().values
    gone = torch.ones(128, dtype=torch.bool).index_fill(0, kept, False)
    for name, tensor in found.items():
        if "o_proj" in name or "down_proj" in name:
            assert torch.equal(tensor[gone], torch.zeros_like(tensor[gone]))
            assert (tensor[~gone] != 0).any()
    assert ("model.embed_tokens.weight" in found) == (family in ("llama", "llama_biased"))
    new = {source.names[name]: (lambda old, tensor=tensor: tensor) for name, tensor in found.items()}
    cut = Residual.narrowed(ModelSource(tiny(family), CPU), 96).rewriting(kept)
    written = ModelSource(tiny(family), CPU, rewritings=[type(cut)(new), cut])
    torch.testing.assert_close(logits(written), expected, rtol=0, atol=5e-5)
    assert (expected - plain).abs().max() > 1e-2


def test_at_the_start_a_model_with_gates_of_one_is_the_model(tiny: Callable[..., Path]) -> None:
    made = Masked(ModelSource(tiny("llama"), CPU), ["model.layers.0.mlp.down_proj"], torch.zeros(128), 128, STEPS, 6, (3, 4))
    with torch.no_grad():
        found = made.at(STEPS - 1, some_tokens(), use_cache=False).logits
    torch.testing.assert_close(found, stock_logits(tiny("llama"), some_tokens()), rtol=0, atol=2e-5)


def test_gates_grow_sharper_until_they_are_ones_and_zeros() -> None:
    mask, steps = torch.tensor([0.5, 0.1, -0.1, -0.5]), 100
    torch.testing.assert_close(gates(torch.zeros(4), 0, steps, 2), torch.full((4,), 0.99))  # ½ + ½ - 1/G
    at = 49  # t = 50: nothing is added any more
    sharpness = 1 / (1 - math.log(50) / math.log(100))
    torch.testing.assert_close(gates(mask, at, steps, 2), 1 / (1 + (-sharpness * mask).exp()))
    spread = [float(gates(mask, step, steps, 2)[0] - gates(mask, step, steps, 2)[3]) for step in range(steps)]
    assert spread == sorted(spread)
    assert [step for step in range(steps) if frozen(step, steps)] == list(range(80, 100))
    for step in range(80, 100):
        assert gates(mask, step, steps, 1).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_gates_of_a_short_training_are_numbers(steps: int) -> None:
    assert all(gates(torch.tensor([0.5, -0.5]), step, steps, 1).isfinite().all() for step in range(steps))


def test_a_mask_starts_with_the_strongest_above_zero() -> None:
    strength = torch.tensor([3.0, 0.0, 9.0, 1.0, 2.0])
    mask = start(strength, 3)
    assert (mask >= 0).tolist() == [True, False, True, False, True]
    assert mask.argsort().tolist() == strength.argsort().tolist()
    assert mask.abs().max() <= 0.5


def test_penalties_are_what_the_paper_says(tiny: Callable[..., Path]) -> None:
    made = masked(ModelSource(tiny("llama"), CPU), 100)
    made.mask_D.data = torch.cat([torch.full((90,), 0.25), torch.full((38,), -0.5)])
    skews = [(operator.down_RD @ operator.down_RD.T - torch.eye(6)).square().sum() for operator in made.operators.values()]
    expected = torch.stack(skews).mean() + 10 * 10 / 100 + 90 / 128 * 0.25**2
    penalty = made.penalty(0)
    torch.testing.assert_close(penalty, expected)
    (slope,) = torch.autograd.grad(penalty, made.mask_D)
    torch.testing.assert_close(slope[90:], torch.full((38,), -10 / 100))  # straight through: more of them
    torch.testing.assert_close(made.penalty(STEPS - 1), torch.stack(skews).mean())


def test_the_first_matrix_of_an_operator_starts_orthonormal() -> None:
    assert float(Operator(32, 5).skew) < 1e-10


def test_a_frozen_mask_stays_whatever_an_optimizer_makes_of_it(tiny: Callable[..., Path]) -> None:
    made = masked(ModelSource(tiny("llama"), CPU), 96)
    before = largest(made.mask_D, 96)
    made.settle(int(0.8 * STEPS) - 1)
    assert made.mask_D.abs().max() > 0.5
    for done in range(int(0.8 * STEPS), STEPS + 1):
        made.settle(done)
        made.mask_D.data += 0.05 * torch.randn(128)
        assert torch.equal(largest(made.mask_D, 96), before)


def test_exactly_as_many_channels_stay_and_less_is_lost_than_without_training(
    tiny: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    report = run(tiny("llama_tied"), tmp_path / "out", text_file, lr=5e-3, steps=20)
    still = run(tiny("llama_tied"), tmp_path / "still", text_file, lr=1e-9, mask_lr=1e-9, steps=2)
    size = json.loads((tmp_path / "out" / "config.json").read_text())["hidden_size"]
    assert report["keep"] == still["keep"] == {"hidden": size}
    assert report["parameters"][1] == sum(t.numel() for t in tensors(tmp_path / "out").values())
    assert report["parameters"][1] <= 0.7 * report["parameters"][0]
    assert report["loss"][1] < 0.9 * still["loss"][1]
    assert not (tmp_path / "out.pruning").exists()


def test_a_training_that_is_broken_off_goes_on_to_the_same(
    tiny: Callable[..., Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compressor.passes.train.distillation.OFTEN", 4)
    run(tiny("llama"), tmp_path / "whole", text_file)
    step = Training.step

    def dies(training: Training, loss: float) -> None:
        step(training, loss)
        if training.done == 9:  # put down after 8 steps, with which the mask is frozen
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Training, "step", dies)
        run(tiny("llama"), tmp_path / "out", text_file)
    taken: list[int] = []

    def counts(training: Training, loss: float) -> None:
        step(training, loss)
        taken.append(training.done)

    monkeypatch.setattr(Training, "step", counts)
    run(tiny("llama"), tmp_path / "out", text_file, resume=True)
    assert taken == [9, 10]
    one, two = tensors(tmp_path / "whole"), tensors(tmp_path / "out")
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("key", ["steps", "batch", "rank", "operator_rank", "lr", "mask_lr"])
def test_settings_that_make_no_sense(key: str) -> None:
    with pytest.raises(RecipeError, match=f"{key}: "):
        make_recipe({"passes": [{"pass": "pat", "ratio": 0.2, key: 0}]})
