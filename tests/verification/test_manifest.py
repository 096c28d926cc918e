"""What a run records: from memory, the same however often it was interrupted, and small."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny_models import stock_logits

from compressor import api
from compressor.errors import CalibrationError, CompressorError, SourceError
from compressor.evaluation.verify.verify import verify
from compressor.model.checkpoint import SINGLE
from compressor.model.source import ModelSource
from compressor.model.writer import Workspace
from compressor.pipeline import blocks
from compressor.pipeline.manifest import MANIFEST, read_manifest
from compressor.pipeline.probe import Record
from compressor.recipe.build import quantize_recipe
from compressor.recipe.schema import Recipe


@pytest.fixture(params=["rtn", "gptq"])
def recipe(request: pytest.FixtureRequest, text_file: Path) -> Recipe:
    options: dict[str, Any] = {"calibration": str(text_file), "samples": 4, "seq_len": 32, "evaluate": False}
    return quantize_recipe(4, method=request.param, group_size=64, **options)


def manifest(directory: Path) -> dict[str, Any]:
    found = json.loads((directory / MANIFEST).read_text())
    assert isinstance(found, dict)
    return found


def test_hashes_are_of_the_tensors_bytes_and_of_the_config(recipe: Recipe, tiny: Callable[..., Path], tmp_path: Path) -> None:
    api.run(recipe, tiny("llama"), tmp_path / "out", device="cpu", dtype="float32", verify=False)
    found = manifest(tmp_path / "out")
    assert found["config_sha256"] == hashlib.sha256((tmp_path / "out" / "config.json").read_bytes()).hexdigest()
    with safe_open(tmp_path / "out" / SINGLE, framework="pt") as opened:
        assert set(opened.keys()) == set(found["tensors"])
        for name, entry in found["tensors"].items():
            tensor = opened.get_tensor(name)
            raw = bytes(tensor.flatten().view(torch.uint8).tolist())
            assert entry["sha256"] == hashlib.sha256(raw).hexdigest()
            assert entry["shape"] == list(tensor.shape)
            assert entry["dtype"] == opened.get_slice(name).get_dtype()


def test_the_probe_holds_what_stock_transformers_computes_from_the_output(
    recipe: Recipe, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    api.run(recipe, tiny("qwen3"), tmp_path / "out", device="cpu", dtype="float32", verify=False)
    probe = manifest(tmp_path / "out")["probe"]
    log_probs = stock_logits(tmp_path / "out", torch.tensor([probe["tokens"]]))[0].double().log_softmax(-1)
    best = log_probs.topk(16)
    torch.testing.assert_close(torch.tensor(probe["logits"]["log_probabilities"]).double(), best.values, rtol=0, atol=1e-4)
    assert len(probe["tokens"]) == 32


def test_an_interrupted_run_leaves_the_same_manifest(
    recipe: Recipe, tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    api.run(recipe, tiny("llama"), whole, device="cpu", dtype="float32", verify=False)
    work = blocks.compress_block

    def failing(job: blocks.Job, block: Any, *rest: Any) -> Any:
        if block.index == 1:
            raise CalibrationError("stop here")
        return work(job, block, *rest)

    monkeypatch.setattr(blocks, "compress_block", failing)
    with pytest.raises(CalibrationError):
        api.run(recipe, tiny("llama"), resumed, device="cpu", dtype="float32", verify=False)
    monkeypatch.undo()
    api.run(recipe, tiny("llama"), resumed, device="cpu", dtype="float32", resume=True, verify=False)
    assert (resumed / MANIFEST).read_bytes() == (whole / MANIFEST).read_bytes()


SCALE = "model.layers.0.mlp.up_proj.weight_scale"


@pytest.fixture
def damaged_when_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale is doubled on its way from memory to the disk."""
    add = Workspace.add

    def damaging(self: Workspace, part: str, tensors: Any, **record: Any) -> None:
        add(self, part, {n: t * 2 if n == SCALE else t for n, t in tensors.items()}, **record)

    monkeypatch.setattr(Workspace, "add", damaging)


@pytest.mark.usefixtures("damaged_when_written")
def test_what_is_damaged_between_computing_and_publishing_shows(
    recipe: Recipe, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    api.run(recipe, tiny("llama"), tmp_path / "out", device="cpu", verify=False)
    failed = {check.check: check.detail for check in verify(tmp_path / "out") if check.outcome == "failed"}
    assert SCALE in failed["hashes"]
    assert "logits" in failed


@pytest.mark.usefixtures("damaged_when_written")
def test_a_run_does_not_publish_what_fails(tiny: Callable[..., Path], tmp_path: Path) -> None:
    recipe = quantize_recipe(4, method="rtn", group_size=64, evaluate=False)
    with pytest.raises(CompressorError, match=f"hashes: .*{SCALE}"):
        api.run(recipe, tiny("llama"), tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_a_run_reports_what_it_verified(tiny: Callable[..., Path], tmp_path: Path) -> None:
    recipe = quantize_recipe(4, method="rtn", group_size=64, evaluate=False)
    report = api.run(recipe, tiny("llama"), tmp_path / "out", device="cpu")
    assert {entry["outcome"] for entry in report.verification} == {"passed"}
    assert report.verification[0].keys() == {"check", "outcome", "detail"}


def test_a_block_that_returns_more_than_hidden_states_has_no_probe_but_is_compressed(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = quantize_recipe(4, method="rtn", group_size=64, evaluate=False)
    block = ModelSource.block

    def returning_a_tuple(self: ModelSource, index: int, load: bool = True) -> Any:
        made = block(self, index, load)
        if load:
            forward = type(made.module).forward
            monkeypatch.setattr(type(made.module), "forward", lambda *args, **kwargs: (forward(*args, **kwargs),))
        return made

    monkeypatch.setattr(ModelSource, "block", returning_a_tuple)
    report = api.run(recipe, tiny("llama"), tmp_path / "out", device="cpu", verify=False)
    assert manifest(tmp_path / "out")["probe"] is None
    assert any("model.layers.0: its blocks return a tuple" in warning for warning in report.warnings)


def test_a_model_that_cannot_be_streamed_has_no_probe_but_is_compressed(tiny: Callable[..., Path], tmp_path: Path) -> None:
    recipe = quantize_recipe(4, method="rtn", group_size=64, evaluate=False)
    report = api.run(recipe, tiny("gptj"), tmp_path / "out", device="cpu", verify=False)
    assert any("cannot be streamed" in warning for warning in report.warnings)
    found = {check.check: check for check in verify(tmp_path / "out")}
    skipped = {name for name, check in found.items() if check.outcome == "skipped"}
    assert skipped == {"logits", "transformers"}, found
    assert {check.outcome for name, check in found.items() if name not in skipped} == {"passed"}, found


def test_the_record_of_a_large_vocabulary_is_small() -> None:
    logits = torch.randn(32, 150_000, generator=torch.Generator().manual_seed(0))
    record = Record.of(torch.arange(32)[None], torch.float32, logits)
    text = json.dumps(record.to_dict())
    assert len(text) < 100_000
    again = Record.from_dict(json.loads(text))
    assert again.difference(logits) < 1e-6
    assert again.difference(logits + 5) < 1e-6  # the same probabilities
    assert again.difference(logits * 1.01) > 1e-2
    assert again.difference(logits[:, :1000]) == float("inf")
    assert again.difference(logits.index_fill(0, torch.tensor([3]), torch.nan)) == float("inf")


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"version": 2}', '{"version": 1}', '{"version":1,"config_sha256":"","files":{},"tensors":{},"probe":{}}'],
)
def test_a_manifest_of_another_kind_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(SourceError, match=r"manifest\.json: (cannot be read|not valid JSON|holds a JSON list)"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "..", "", "a\0b", "..\\secret"])
def test_a_path_that_leads_out_of_the_directory_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "secret").write_text("secret")
    text = {"version": 1, "config_sha256": "", "files": {name: "0" * 64}, "tensors": {}, "probe": None}
    (tmp_path / "model" / MANIFEST).write_text(json.dumps(text))
    with pytest.raises(SourceError, match=r"manifest\.json: cannot be read .* points outside the directory"):
        read_manifest(tmp_path / "model")


SOUND: dict[str, Any] = {
    "tokens": [1, 2],
    "dtype": "float32",
    "logits": {"ids": [[3, 4], [5, 6]], "log_probabilities": [[-1.0, -2.0]] * 2},
}


@pytest.mark.parametrize(
    ("tokens", "ids"),
    [
        ([1, 2.5], [[3, 4], [5, 6]]),
        ([1, 2.0], [[3, 4], [5, 6]]),
        ([1, True], [[3, 4], [5, 6]]),
        ([1, -2], [[3, 4], [5, 6]]),
        ([1, 2**70], [[3, 4], [5, 6]]),
        ([1], [[3, 4], [5, 6]]),
        ([1, 2], [[3, 4], [5, -6]]),
        ([1, 2], [[3, 4], [5, 6.5]]),
        ([1, 2], [[3, 4], [5]]),
        ([1, 2], [[], []]),
        ([1, 2], [3, 4]),
        ([], []),
    ],
)
def test_a_damaged_probe_is_refused(tokens: list[Any], ids: list[Any], tmp_path: Path) -> None:
    record: dict[str, Any] = {**SOUND, "logits": dict(SOUND["logits"])}
    text = {"version": 1, "config_sha256": "", "files": {}, "tensors": {}, "probe": record}
    (tmp_path / MANIFEST).write_text(json.dumps(text))
    assert read_manifest(tmp_path) is not None
    record["tokens"], record["logits"]["ids"] = tokens, ids
    if not all(ids):
        record["logits"]["log_probabilities"] = ids
    (tmp_path / MANIFEST).write_text(json.dumps(text))
    with pytest.raises(SourceError, match=r"manifest\.json: (cannot be read|not valid JSON) .*; get the directory again"):
        read_manifest(tmp_path)


def test_a_probe_beyond_the_vocabulary_fails(tiny: Callable[..., Path], tmp_path: Path) -> None:
    recipe = quantize_recipe(4, method="rtn", group_size=64, evaluate=False)
    api.run(recipe, tiny("llama"), tmp_path / "out", device="cpu", verify=False)
    found = manifest(tmp_path / "out")
    found["probe"]["tokens"][0] = 10**6
    (tmp_path / "out" / MANIFEST).write_text(json.dumps(found))
    details = [check.detail for check in verify(tmp_path / "out") if check.outcome == "failed"]
    assert len(details) == 2
    assert all("token 1000000 where the model knows 384" in detail for detail in details)


def test_another_model_s_manifest_in_the_source_is_not_taken_over(tiny: Callable[..., Path], tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    (model / MANIFEST).write_text("something else")
    recipe = quantize_recipe(4, method="rtn", group_size=64, evaluate=False)
    api.run(recipe, model, tmp_path / "out", device="cpu", verify=False)
    assert read_manifest(tmp_path / "out") is not None
