"""Formats of floating-point numbers: the search of scales, the layouts of compressed-tensors, what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from tiny_models import change_config, change_tensors, some_tokens, stock_logits, tensors
from torch import Tensor

import compressor
from compressor import api
from compressor.errors import SourceError
from compressor.formats.base import Format, QuantizedTensor
from compressor.formats.fp8 import FP8
from compressor.formats.mxfp4 import MXFP4
from compressor.formats.mxfp8 import MXFP8
from compressor.formats.numerics.minifloat import E2M1, E4M3Scale, E8M0Scale, ScaleType
from compressor.formats.nvfp4 import NVFP4
from compressor.model.source import ModelSource
from compressor.recipe.schema import Recipe, make_recipe
from compressor.report.inspect import inspect_model

FORMATS = {"nvfp4": NVFP4(), "mxfp4": MXFP4()}
KINDS: dict[str, ScaleType] = {"nvfp4": E4M3Scale(), "mxfp4": E8M0Scale()}
Tiny = Callable[..., Path]


@pytest.fixture(params=FORMATS)
def fmt(request: pytest.FixtureRequest) -> Format:
    return FORMATS[request.param]


def recipe(name: str, pass_: str = "rtn", **more: object) -> Recipe:
    return make_recipe({"passes": [{"pass": pass_, "options": [{"format": name}], **more}], "evaluation": None})


def some_weight(rows: int = 32, columns: int = 128) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02


def squared_error(fmt: Format, weight: Tensor, importance: Tensor | None = None, *, search: bool = True) -> Tensor:
    """By weight, weighted by column."""
    grid = fmt.fit(weight, importance, search=search)
    missed = (grid.decode(grid.round(weight, 0), 0) - weight).square()
    return missed if importance is None else missed * importance


class TestFit:
    def test_a_group_takes_the_best_of_all_scales(self, fmt: Format) -> None:
        """Oracle: every scale there is, weighted by column."""
        weight, importance = some_weight(), torch.rand(128, generator=torch.Generator().manual_seed(1)) + 0.1
        grid = fmt.fit(weight, importance)
        kind, size = KINDS[fmt.label], grid.group_size  # type: ignore[attr-defined]
        places = range(1, 127) if fmt.label == "nvfp4" else range(-40, 10)
        errors = []
        for place in places:
            scale = kind.at(torch.tensor([place])) * grid.factor  # type: ignore[attr-defined]
            missed = (E2M1.round(weight / scale) * scale - weight).square() * importance
            errors.append(missed.unflatten(1, (-1, size)).sum(-1))
        found = squared_error(fmt, weight, importance).unflatten(1, (-1, size)).sum(-1)
        torch.testing.assert_close(found, torch.stack(errors).amin(0), rtol=1e-5, atol=0)

    def test_a_search_is_never_worse_than_the_range(self, fmt: Format) -> None:
        size = fmt.fit(some_weight()).group_size  # type: ignore[attr-defined]
        searched, ranged = (
            squared_error(fmt, some_weight(), search=s).unflatten(1, (-1, size)).sum(-1) for s in (True, False)
        )
        assert (searched <= ranged).all()
        assert searched.sum() < {"nvfp4": 0.9, "mxfp4": 0.99}[fmt.label] * ranged.sum()

    def test_from_the_range_a_largest_weight_is_cut_off_by_a_seventh_at_most(self, fmt: Format) -> None:
        weight = some_weight(256) * torch.linspace(0.1, 10, 256)[:, None]
        grid = fmt.fit(weight, search=False)
        largest = weight.unflatten(1, (-1, grid.group_size)).abs().amax(-1)  # type: ignore[attr-defined]
        held = 6 * grid.scale_NG * grid.factor / largest  # type: ignore[attr-defined]
        assert 6 / 7 - 1e-6 < held.min() < held.max() < 2 * 6 / 7 + 1e-6

    def test_zeros_stay_zero(self, fmt: Format) -> None:
        weight = some_weight()
        weight[3], weight[:, :32] = 0, 0
        grid = fmt.fit(weight)
        decoded = grid.pack(grid.round(weight, 0)).dequantize()
        assert not decoded[3].any()
        assert not decoded[:, :32].any()
        nothing = torch.zeros(4, 64)
        assert not fmt.fit(nothing).decode(fmt.fit(nothing).round(nothing, 0), 0).any()

    @pytest.mark.parametrize("size", [1e-37, 1e-20, 1e-3, 1e3, 1e20])
    def test_any_magnitude_is_held(self, size: float, fmt: Format) -> None:
        weight = some_weight() / some_weight().abs().max() * size
        decoded = fmt.fit(weight).pack(fmt.fit(weight).round(weight, 0)).dequantize()
        assert float((decoded / size - weight / size).norm() / (weight / size).norm()) < 0.13

    @pytest.mark.parametrize(("name", "width"), [("nvfp4", 24), ("mxfp4", 48)])
    def test_a_width_that_groups_do_not_divide_is_refused(self, name: str, width: int) -> None:
        with pytest.raises(ValueError, match=f"in_features {width} is not a multiple of group_size"):
            FORMATS[name].stored_bits((8, width))

    @pytest.mark.parametrize(("name", "bits"), [("nvfp4", 4.5 + 32 / (32 * 128)), ("mxfp4", 4.25)])
    def test_bits_are_counted_with_scales(self, name: str, bits: float) -> None:
        assert FORMATS[name].stored_bits((32, 128)) == bits * 32 * 128


@pytest.mark.parametrize("name", FORMATS)
class TestCompressedTensors:
    def decompressed(self, packed: QuantizedTensor) -> Tensor:
        """Oracle: compressed-tensors' own decompression."""
        scheme = packed.format.compressed_tensors()
        assert scheme is not None
        args = QuantizationArgs(**scheme["weights"])
        compressor = BaseCompressor.get_value_from_registry(scheme["format"])
        found = compressor.decompress(dict(packed.parts), QuantizationScheme(targets=["Linear"], weights=args))
        weight: Tensor = found["weight"]
        return weight.float()

    def test_decompresses_to_the_same_numbers(self, name: str) -> None:
        grid = FORMATS[name].fit(some_weight())
        packed = grid.pack(grid.round(some_weight(), 0))
        expected = packed.dequantize()
        assert torch.equal(self.decompressed(packed), expected)

    def test_stock_transformers_computes_the_same_logits(self, name: str, tiny: Tiny, tmp_path: Path) -> None:
        api.run(recipe(name), tiny("llama", dtype="bfloat16"), tmp_path / "out", device="cpu")
        stock = stock_logits(tmp_path / "out", some_tokens(), torch.bfloat16)
        ours = compressor.load(tmp_path / "out", dtype=torch.bfloat16, dense=True)(some_tokens()).logits
        assert torch.equal(stock, ours.float())
        assert {r.name for r in inspect_model(tmp_path / "out").runtimes if r.loads} >= {"compressor", "transformers"}

    @pytest.mark.parametrize(
        "change", [{"num_bits": 8}, {"group_size": 64}, {"type": "int"}, {"strategy": "channel"}], ids=str
    )
    def test_another_kind_is_refused(self, name: str, change: dict[str, object], tiny: Tiny, tmp_path: Path) -> None:
        api.run(recipe(name), tiny("llama"), tmp_path / "out", device="cpu", verify=False)
        config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
        config["config_groups"]["group_0"]["weights"].update(change)
        change_config(tmp_path / "out", quantization_config=config)
        with pytest.raises(SourceError, match=f"{name}-pack-quantized of .* cannot be read; only 4/float/"):
            ModelSource(tmp_path / "out", torch.device("cpu"))

    def test_activations_rounded_in_another_way_are_refused(self, name: str, tiny: Tiny, tmp_path: Path) -> None:
        api.run(recipe(name), tiny("llama"), tmp_path / "out", device="cpu", verify=False)
        config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
        config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 4, "type": "float"}
        change_config(tmp_path / "out", quantization_config=config)
        with pytest.raises(SourceError, match=r"activations are quantized as 4 float None dynamic, .*; only 4 float"):
            ModelSource(tmp_path / "out", torch.device("cpu"))


class TestReading:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"weight_scale": torch.ones(128, 8)},
                "weight_scale is stored as torch.float32 where torch.float8_e4m3fn is needed",
            ),
            ({"weight_global_scale": torch.zeros(1)}, "weight_global_scale is 0, by which nothing can be divided"),
            ({"weight_global_scale": torch.full((1,), float("nan"))}, "weight_global_scale is nan"),
        ],
        ids=["scale", "zero", "nan"],
    )
    def test_parts_that_make_no_sense_are_refused(
        self, change: dict[str, Tensor], message: str, tiny: Tiny, tmp_path: Path
    ) -> None:
        api.run(recipe("nvfp4"), tiny("llama"), tmp_path / "out", device="cpu", verify=False)
        layer = "model.layers.0.self_attn.q_proj"
        change_tensors(tmp_path / "out", lambda t: t.update({f"{layer}.{part}": new for part, new in change.items()}))
        with pytest.raises(SourceError, match=message):
            ModelSource(tmp_path / "out", torch.device("cpu")).block(0)

    @pytest.mark.parametrize("fmt", [FP8(), MXFP8()], ids=lambda fmt: fmt.label)
    def test_numbers_of_another_kind_are_refused(self, fmt: Format, tiny: Tiny, tmp_path: Path) -> None:
        """A loader takes one floating-point dtype for another where nothing is said: here that would change the numbers."""
        api.run(recipe(fmt.label.partition("-")[0]), tiny("llama"), tmp_path / "out", device="cpu", verify=False)
        layer = "model.layers.0.mlp.up_proj.weight"
        change_tensors(tmp_path / "out", lambda t: t.update({layer: t[layer].float().to(torch.float8_e5m2)}))
        with pytest.raises(SourceError, match=r"weight is stored as torch.float8_e5m2 where torch.float8_e4m3fn is needed"):
            ModelSource(tmp_path / "out", torch.device("cpu")).block(0)


class TestRuns:
    @pytest.mark.parametrize("name", FORMATS)
    def test_gptq_loses_less_than_rounding(self, name: str, tiny: Tiny, tmp_path: Path, text_file: Path) -> None:
        errors = []
        for step in ({"pass_": "rtn"}, {"pass_": "rtn", "search": True}, {"pass_": "gptq"}):
            made = recipe(name, **step)  # type: ignore[arg-type]
            calibration = {"source": str(text_file), "samples": 8, "seq_len": 64}
            data = {"passes": made.passes, "calibration": calibration, "evaluation": {"samples": 4, "seq_len": 64}}
            report = api.run(make_recipe(data), tiny("llama"), tmp_path / "out", device="cpu", verify=False, overwrite=True)
            assert report.quality is not None
            errors.append(report.quality["kl"])
        assert errors[2] < 0.95 * min(errors[:2])


class TestFusedLayers:
    @pytest.mark.parametrize("step", [{"pass": "rtn"}, {"pass": "gptq"}], ids=str)
    def test_share_their_divisor(self, step: dict[str, object], tiny: Tiny, tmp_path: Path, text_file: Path) -> None:
        """One of them is made a thousand times as large: alone it would take another."""
        model = tmp_path / "model"
        shutil.copytree(tiny("llama"), model)
        change_tensors(model, lambda t: t["model.layers.0.self_attn.k_proj.weight"].mul_(1000))
        calibration = {"source": str(text_file), "samples": 4, "seq_len": 32}
        data = {"passes": [{**step, "options": [{"format": "nvfp4"}]}], "calibration": calibration, "evaluation": None}
        api.run(make_recipe(data), model, tmp_path / "out", device="cpu", verify=False)
        found = tensors(tmp_path / "out")
        divisors = [
            [float(found[f"model.layers.{i}.self_attn.{name}_proj.weight_global_scale"]) for name in "qkvo"] for i in range(2)
        ]
        assert divisors[0][0] == divisors[0][1] == divisors[0][2] < divisors[0][3]
        assert divisors[1][0] == divisors[1][1] == divisors[1][2] > divisors[0][0]
        assert [r.name for r in inspect_model(tmp_path / "out").runtimes if r.loads] == [
            "compressor", "transformers", "vLLM", "SGLang"]  # fmt: skip
        config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
        assert list(config["config_groups"]) == ["group_0"]

    def test_that_do_not_are_told(self, tiny: Tiny, tmp_path: Path) -> None:
        api.run(recipe("nvfp4"), tiny("llama"), tmp_path / "out", device="cpu", verify=False)
        change_tensors(tmp_path / "out", lambda t: t["model.layers.1.mlp.up_proj.weight_global_scale"].mul_(2))
        reasons = {r.name: r for r in inspect_model(tmp_path / "out").runtimes}
        assert reasons["transformers"].loads
        assert not reasons["vLLM"].loads
        assert reasons["vLLM"].reason.startswith("model.layers.1.mlp.gate_up_proj: its layers are fused, and the largest")
