"""AdaDim takes, layer by layer, the grouping with the smaller error; error feedback and groups of output channels agree."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import change_tensors, exact, some_tokens, tensors
from torch import Tensor

from compressor import api
from compressor.formats.base import Format, OneOf, QuantizedTensor
from compressor.formats.int_group import IntGroup
from compressor.formats.int_input_group import IntInputGroup
from compressor.model.block import Block
from compressor.model.source import ModelSource
from compressor.passes.quantize.adadim import AdaDim
from compressor.passes.quantize.adadim_rtn import AdaDimRTN
from compressor.passes.quantize.gptq import GPTQ, factorise, gptq, output_energy
from compressor.passes.quantize.rtn import RTN
from compressor.pipeline.calibration.stream import CalibrationStream
from compressor.pipeline.contract import Pass
from compressor.pipeline.ranks import Ranks
from compressor.recipe.schema import make_recipe

Tiny = Callable[..., Path]
CPU = torch.device("cpu")
AXES: tuple[Format, ...] = (IntGroup(bits=3, group_size=32), IntInputGroup(bits=3, group_size=32))
LAYERS = 7 * 2


@pytest.fixture
def uneven(tiny_copy: Tiny) -> Path:
    """A model with layers that suit one grouping, and layers that suit the other: large rows, large columns."""

    def change(content: dict[str, Tensor]) -> None:
        for name, tensor in content.items():
            if "up_proj" in name:
                tensor[::7] *= 4
            elif "down_proj" in name:
                tensor[:, ::32] *= 16

    model = tiny_copy("llama")
    change_tensors(model, change)
    return model


def problem(rows: int = 32, columns: int = 64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(256, columns, generator=g) @ torch.randn(columns, columns, generator=g)
    return torch.randn(rows, columns, generator=g), x.T @ x / 256


def outcomes(model: Path, chooser: Pass, single: Callable[[Format], Pass]) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """What a choosing pass makes of a whole model, and the errors of each of its formats on the same inputs."""
    source = ModelSource(model, CPU, torch.float32)
    stream = CalibrationStream(source.first_inputs([some_tokens(4, 32)]), Ranks(), CPU)
    chosen: dict[str, Any] = {}
    errors: list[dict[str, float]] = [{} for _ in AXES]
    for index in range(len(source.layers)):
        block = source.block(index)
        stream.enter(block)
        for i, fmt in enumerate(AXES):
            step = single(fmt)
            errors[i] |= named(block, applied(step, block, stream, OneOf((fmt,)) if step.chooses else fmt).errors)
        outcome = applied(chooser, block, stream, OneOf(AXES))
        chosen |= {n: (e, outcome.edits[n.removeprefix(f"{block.prefix}.")]) for n, e in named(block, outcome.errors).items()}
        block.install(outcome.edits)
        stream.advance(block)
    return chosen, errors


def applied(step: Pass, block: Block, stream: CalibrationStream, choice: Any) -> Any:
    stats = stream.collect(block, list(block.layers), step.needs, lambda done, total: None)
    return step.apply(block, stats, dict.fromkeys(step.units(block), choice))


def named(block: Block, errors: Mapping[str, float]) -> dict[str, float]:
    return {f"{block.prefix}.{name}": error for name, error in errors.items()}


@pytest.mark.parametrize("solver", ["gptq", "rtn", "rtn without data"])
def test_every_layer_has_the_smaller_error_of_both_axes(solver: str, uneven: Path) -> None:
    chooser: Pass = {
        "gptq": AdaDim(options=AXES, search=False),
        "rtn": AdaDimRTN(options=AXES),
        "rtn without data": AdaDimRTN(options=AXES, calibrated=False),
    }[solver]

    def single(fmt: Format) -> Pass:
        return {"gptq": GPTQ, "rtn": AdaDimRTN, "rtn without data": RTN}[solver](options=(fmt,), search=False)

    chosen, (by_input, by_output) = outcomes(uneven, chooser, single)
    assert len(chosen) == LAYERS
    for layer, (error, packed) in chosen.items():
        assert error == min(by_input[layer], by_output[layer]), layer
        assert packed.format == AXES[by_output[layer] < by_input[layer]], layer
    assert {packed.format for _, packed in chosen.values()} == set(AXES)  # else this shows nothing


def test_the_error_of_rounding_is_that_of_the_layers_output(tiny: Tiny) -> None:
    source = ModelSource(tiny("llama"), CPU, torch.float32)
    stream = CalibrationStream(source.first_inputs([some_tokens(4, 32)]), Ranks(), CPU)
    block = source.block(0)
    stream.enter(block)
    seen: list[Tensor] = []
    block.module.get_submodule("mlp.down_proj").register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    outcome = applied(AdaDimRTN(options=AXES), block, stream, OneOf(AXES))
    packed, x = outcome.edits["mlp.down_proj"], seen[0].flatten(0, 1)
    assert isinstance(packed, QuantizedTensor)
    weight = block.weight("mlp.down_proj")
    by_hand = (x @ (packed.dequantize() - weight).T).square().sum() / (x @ weight.T).square().sum()
    assert outcome.errors["mlp.down_proj"] == pytest.approx(float(by_hand), rel=1e-3)


@pytest.mark.parametrize("symmetric", [True, False])
def test_uncorrelated_inputs_leave_nothing_but_rounding(symmetric: bool) -> None:
    w_OI, _ = problem()
    grid = IntInputGroup(bits=3, group_size=16, symmetric=symmetric).fit(w_OI)
    codes, _, final = gptq(w_OI, factorise(torch.diag(torch.rand(64) + 0.1)), grid)
    assert torch.equal(codes, grid.round(w_OI, 0))
    assert torch.equal(final.pack(codes).dequantize(), grid.pack(codes).dequantize())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_error_feedback_beats_rounding_and_its_loss_is_exact(bits: int) -> None:
    w_OI, h_II = problem()
    grid = IntInputGroup(bits=bits, group_size=16).fit(w_OI)
    codes, loss, final = gptq(w_OI, factorise(h_II), grid)
    damped = h_II + 0.01 * h_II.diagonal().mean() * torch.eye(64)
    assert loss == pytest.approx(output_energy(w_OI - final.pack(codes).dequantize(), damped), rel=1e-4)
    rounded = output_energy(w_OI - grid.pack(grid.round(w_OI, 0)).dequantize(), h_II)
    assert output_energy(w_OI - final.pack(codes).dequantize(), h_II) < 0.7 * rounded


def test_each_column_is_fitted_to_what_it_has_become() -> None:
    """By explicit optimal-brain-surgeon updates: round a column in its groups, move those that are left, remove it."""
    w_OI, h_II = problem(rows=8, columns=16)
    fmt = IntInputGroup(bits=3, group_size=4)
    factor = factorise(h_II)
    codes, _, final = gptq(w_OI, factor, fmt.fit(w_OI))
    damped = h_II.double() + 0.01 * h_II.diagonal().double().mean() * torch.eye(16, dtype=torch.float64)
    work, expected, left = w_OI.double().clone(), torch.empty(8, 16), list(range(16))
    for c in factor.order_I.tolist():
        column = work[:, c : c + 1].float()
        alone = fmt.fit(column)
        expected[:, c : c + 1] = alone.pack(alone.round(column, 0)).dequantize()
        inverse, at = damped[left][:, left].inverse(), left.index(c)
        missed = work[:, c] - expected[:, c]
        work[:, left] -= torch.outer(missed / inverse[at, at], inverse[at])
        left.remove(c)
    assert torch.equal(final.pack(codes).dequantize(), expected)


def test_a_model_of_both_axes_loads_as_what_was_computed(uneven: Path, text_file: Path, tmp_path: Path) -> None:
    options = [{"format": name, "bits": 3, "group_size": 32} for name in ("int_group", "int_input_group")]
    step = {"pass": "adadim", "options": options, "search": False}
    calibration = {"source": str(text_file), "samples": 4, "seq_len": 32}
    recipe = make_recipe({"passes": [step], "calibration": calibration, "evaluation": None})
    report = api.run(recipe, uneven, tmp_path / "out", device="cpu")
    assert {row.option for row in report.rows} == {"int3g32", "int3g32-ic"}
    assert [check.get("outcome") for check in report.verification if check.get("outcome") == "failed"] == []
    packed, source = exact(tmp_path / "out"), ModelSource(tmp_path / "out", CPU, torch.float32)
    loaded = exact(uneven)
    for index in range(2):
        block = source.block(index)
        for name in block.layers:
            loaded.get_submodule(f"{block.prefix}.{name}").weight.data = block.weight(name).clone()
    for name, tensor in tensors(tmp_path / "out").items():
        if name.endswith("norm.weight"):
            assert torch.equal(loaded.state_dict()[name], tensor)
    tokens = some_tokens()
    with torch.no_grad():
        torch.testing.assert_close(packed(tokens).logits, loaded(tokens).logits, rtol=1e-4, atol=1e-4)
