"""Gates: their chances, what holds them to a share, and what is left of them in the writers."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import some_tokens, tensors
from torch import Tensor
from transformers import AutoModelForCausalLM

from compressor import api
from compressor.errors import RecipeError
from compressor.model.source import ModelSource
from compressor.passes.prune import compresso
from compressor.passes.prune.gates import CLOSED, Gates, chance, sampled, settled
from compressor.passes.prune.prunable import find_all
from compressor.passes.train.lora import merged, student
from compressor.recipe.schema import Recipe, make_recipe

CPU = torch.device("cpu")
HALF = {"pass": "compresso", "ratio": 0.5, "of": "mlp", "multiple": 32, "steps": 30, "batch": 4}
KEEP = {"self_attn": 1, "mlp": 96}


def recipe(text: Path, *more: dict[str, Any], **changes: Any) -> Recipe:
    calibration = {"source": str(text), "samples": 8, "seq_len": 32}
    return make_recipe({"passes": [{**HALF, **changes}, *more], "calibration": calibration, "evaluation": None})


def gated(path: Path, seed: int = 0) -> Gates:
    """A tiny model with gates and a LoRA, neither as at the start."""
    source = ModelSource(path, CPU)
    parts = {name: part for name, (_, part) in find_all(source).items()}
    torch.manual_seed(seed)
    model = student(source, 4, 4, compresso.CHANGED)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    gates = Gates(model, source, parts, {name: KEEP[part.name] for name, part in parts.items()}, seed)
    torch.nn.init.normal_(gates.log_alpha_G, std=2.0)
    return gates


def test_the_chance_that_a_gate_is_open_is_that_of_draws() -> None:
    log_alpha = torch.linspace(-4, 4, 9, dtype=torch.float64)
    noise = torch.rand(200_000, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    opened = (sampled(log_alpha, noise) > 0).double().mean(0)
    torch.testing.assert_close(chance(log_alpha), opened, rtol=0, atol=5e-3)
    assert opened.min() < 0.1
    assert opened.max() > 0.9


def test_gates_are_often_exactly_zero_or_one_and_never_beyond() -> None:
    noise = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    z = sampled(torch.zeros(()), noise)
    assert ((z >= 0) & (z <= 1)).all()
    assert (z == 0).float().mean() > 0.1
    assert (z == 1).float().mean() > 0.1


def test_the_expected_sparsity_is_the_share_of_gates_that_draws_close(tiny: Callable[..., Path]) -> None:
    gates = gated(tiny("llama"))
    closed = torch.zeros(4)
    with torch.no_grad():
        for step in range(300):
            gates.at(step, some_tokens()[:1, :2])
            closed += torch.stack([(open_U == 0).float().mean() for open_U in gates.open.values()])
    torch.testing.assert_close(gates.sparsity(), closed / 300, rtol=0, atol=0.04)  # two gates in an attention


def test_a_step_draws_the_same_noise_again_and_another_step_other_noise(tiny: Callable[..., Path]) -> None:
    gates = gated(tiny("llama"))
    drawn = []
    for step in (3, 4, 3):
        gates.at(step, some_tokens()[:1, :2])
        drawn.append(gates.open["model.layers.0.mlp"].detach())
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_folded_and_merged_it_computes_what_it_did_with_gates(family: str, tiny: Callable[..., Path]) -> None:
    gates = gated(tiny(family))
    stays: dict[str, Tensor] = {}
    for name, log_alpha_U in gates.by_part(gates.log_alpha_G.detach()).items():
        best = log_alpha_U >= log_alpha_U.sort(descending=True).values[KEEP[gates.parts[name].name] - 1]
        stays[name] = best
        gates.open[name] = settled(log_alpha_U) * best
    with torch.no_grad():
        expected = gates.model(some_tokens()).logits
    source = ModelSource(tiny(family), CPU)
    keep = {name: int(best.sum()) for name, best in stays.items()}
    new, units = compresso.folded(merged(gates.model, source), gates, keep)
    model = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32)
    model.load_state_dict(new, strict=False)
    for name, best in stays.items():
        assert units[name].tolist() == best.nonzero().flatten().tolist()
        part = gates.parts[name]
        writer = model.get_submodule(f"{name.removesuffix(part.name)}{part.writer}")
        with torch.no_grad():
            writer.weight[:, ~best.repeat_interleave(part.columns)] = 0
            found = model(some_tokens()).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-5)


def test_multipliers_raise_the_sparsity_of_every_part(
    tiny: Callable[..., Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In few steps only towards its share: exactly as many go in the end whatever was reached."""
    reached: list[Tensor] = []
    folded = compresso.folded

    def spied(new: Any, gates: Gates, keep: Any) -> Any:
        begun = 1 - chance(torch.tensor(math.log(1 - CLOSED) - math.log(CLOSED)))
        reached.append((gates.sparsity().detach() - begun) / gates.targets_P)
        return folded(new, gates, keep)

    monkeypatch.setattr(compresso, "folded", spied)
    api.run(recipe(text_file, steps=120, batch=1), tiny("llama"), tmp_path / "out", verify=False)
    assert reached[0].shape == (2,)
    assert (reached[0] > 0.02).all()


def test_it_is_narrower_and_stock_software_reads_what_was_folded(
    tiny: Callable[..., Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads and channels; what is written is what training left, without another fit."""
    seen: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    folded = compresso.folded
    monkeypatch.setattr(compresso, "folded", lambda *given: seen.append(folded(*given)) or seen[-1])
    half = {"ratio": 0.4, "of": "blocks", "multiple": 128, "refit": False}
    (report,) = api.run(recipe(text_file, steps=6, **half), tiny("llama"), tmp_path / "out").pruning
    new, units = seen[0]
    assert report["keep"] == {"self_attn": 1, "mlp": 128}
    before, after = tensors(tiny("llama")), tensors(tmp_path / "out")
    name = "model.layers.1.mlp"
    stays = units[name]
    assert torch.equal(after[f"{name}.up_proj.weight"], before[f"{name}.up_proj.weight"][stays])
    assert torch.equal(after[f"{name}.down_proj.weight"], new[f"{name}.down_proj.weight"][:, stays])
    name = "model.layers.0.self_attn"
    group = int(units[name])
    at = slice(64 * group, 64 * (group + 1))
    assert torch.equal(after[f"{name}.q_proj.weight"], new[f"{name}.q_proj.weight"][at])
    assert not torch.equal(after[f"{name}.q_proj.weight"], before[f"{name}.q_proj.weight"][at])
    assert torch.equal(after[f"{name}.k_proj.weight"], before[f"{name}.k_proj.weight"][at.start // 2 : at.stop // 2])
    assert torch.equal(after[f"{name}.o_proj.weight"], new[f"{name}.o_proj.weight"][:, at])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_key_value_heads"], config["num_attention_heads"], config["intermediate_size"]) == (1, 2, 128)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out")(some_tokens()).logits.isfinite().all()


def test_a_run_that_is_broken_off_goes_on_to_the_same(tiny: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    class BrokenOffError(Exception):
        pass

    steps: list[int] = []

    def tell(event: Any) -> None:
        if event.stage == "train":
            steps.append(event.done)
            if len(steps) == 55:
                raise BrokenOffError

    one = recipe(text_file, batch=1)
    api.run(one, tiny("llama"), tmp_path / "whole", verify=False, tell=tell)
    with pytest.raises(BrokenOffError):
        api.run(one, tiny("llama"), tmp_path / "out", verify=False, tell=tell)
    api.run(one, tiny("llama"), tmp_path / "out", verify=False, tell=tell, resume=True)
    assert steps[30:] == [*range(1, 26), *range(21, 31)]  # put down after 20
    whole, resumed = tensors(tmp_path / "whole"), tensors(tmp_path / "out")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    ("key", "value"), [("steps", 0), ("batch", 0), ("lr", 0), ("gate_lr", 2), ("rank", 0), ("ratio", 1.0), ("damp", 0)]
)
def test_settings_that_make_no_sense_are_refused(key: str, value: object, text_file: Path) -> None:
    with pytest.raises(RecipeError, match=f"{key}: "):
        recipe(text_file, **{key: value})
