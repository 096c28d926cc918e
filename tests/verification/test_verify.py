"""What `verify` finds wrong with a directory, what it lets pass, and what it says of it."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from tiny_models import change_config, change_tensors, tensors

from compressor import api
from compressor.errors import SourceError
from compressor.evaluation.verify import loaders, values
from compressor.evaluation.verify import verify as verification
from compressor.evaluation.verify.check import Check, NotCheckedError
from compressor.evaluation.verify.verify import verify
from compressor.formats.int_group import IntGroup
from compressor.model import shards
from compressor.model.checkpoint import INDEX, SINGLE
from compressor.model.header import spans
from compressor.model.source import ModelSource
from compressor.recipe.build import quantize_recipe

LAYER = "model.layers.1.mlp.up_proj"
SHARD_BYTES = 60_000


def rounded(model: Path, out: Path, **options: Any) -> Path:
    """What rounding makes of a model."""
    recipe = quantize_recipe(4, method="rtn", group_size=64, evaluate=False, **options)
    api.run(recipe, model, out, device="cpu", verify=False)
    return out


@pytest.fixture(scope="module")
def made(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A model, what was made of it, and what was made of another one of the same shapes. Not to be changed."""
    place = tmp_path_factory.mktemp("made")
    other = Path(shutil.copytree(tiny("llama"), place / "other"))
    change_tensors(other, lambda content: [tensor.neg_() for tensor in content.values()])
    return SimpleNamespace(
        model=tiny("llama"), out=rounded(tiny("llama"), place / "out"), other=rounded(other, place / "other-out")
    )


@pytest.fixture
def out(made: SimpleNamespace, tmp_path: Path) -> Path:
    """A copy for this test alone."""
    return Path(shutil.copytree(made.out, tmp_path / "out"))


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave stock transformers out: it takes a process of its own, seconds each time."""

    def skip(*_: Any) -> str:
        raise NotCheckedError("left out")

    monkeypatch.setattr(verification, "check_transformers", skip)


def answers(directory: Path, reference: Path | None = None) -> dict[str, Check]:
    return {check.check: check for check in verify(directory, reference)}


def failures(directory: Path, reference: Path | None = None) -> dict[str, str]:
    return {name: check.detail for name, check in answers(directory, reference).items() if check.outcome == "failed"}


def in_shards(directory: Path) -> list[Path]:
    """Spread the only shard of a directory over several."""
    whole = (directory / SINGLE).rename(directory / "whole")
    shards.assemble([whole], directory, SHARD_BYTES)
    whole.unlink()
    return sorted(directory.glob("*.safetensors"))


def flip_a_byte(directory: Path, name: str) -> None:
    span = spans(directory / SINGLE)[name]
    with (directory / SINGLE).open("r+b") as file:
        file.seek((span.begin + span.end) // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 16]))


class TestSoundOutput:
    def test_passes_every_check(self, made: SimpleNamespace) -> None:
        found = answers(made.out, made.model)
        assert list(found) == ["files", "hashes", "config", "copies", "values", "logits", "transformers", "reference"]
        assert {check.outcome for check in found.values()} == {"passed"}, found

    @pytest.mark.usefixtures("alone")
    def test_passes_in_several_shards(self, out: Path) -> None:
        assert len(in_shards(out)) > 2
        assert failures(out) == {}

    @pytest.mark.usefixtures("alone")
    @pytest.mark.parametrize("family", ["llama_tied", "gpt2", "gemma3_vision", "opt_projected"])
    def test_of_other_families_passes(self, family: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
        model = tiny(family)
        found = answers(rounded(model, tmp_path / "out"), model)
        assert {name: c for name, c in found.items() if c.outcome != "passed"}.keys() == {"transformers"}, found

    @pytest.mark.usefixtures("alone")
    def test_computed_in_sixteen_bits_passes(self, made: SimpleNamespace, tmp_path: Path) -> None:
        recipe = quantize_recipe(4, method="rtn", group_size=64, evaluate=False)
        api.run(recipe, made.model, tmp_path / "out", device="cpu", dtype="bfloat16", verify=False)
        assert answers(tmp_path / "out")["logits"].outcome == "passed"
        assert "bfloat16" in answers(tmp_path / "out")["logits"].detail

    def test_in_our_own_layout_is_not_for_transformers(self, made: SimpleNamespace, tmp_path: Path) -> None:
        found = answers(rounded(made.model, tmp_path / "out", symmetric=False))
        assert found["transformers"].outcome == "skipped"
        assert "compressor" in found["transformers"].detail
        assert {check.outcome for name, check in found.items() if name != "transformers"} == {"passed"}, found

    def test_dense_without_a_manifest_is_checked_as_far_as_possible(self, made: SimpleNamespace) -> None:
        outcomes = {name: check.outcome for name, check in answers(made.model).items()}
        assert outcomes == {
            "files": "passed",
            "hashes": "skipped",
            "config": "passed",
            "copies": "skipped",
            "values": "passed",
            "logits": "skipped",
            "transformers": "passed",
        }


@pytest.mark.usefixtures("alone")
class TestDamage:
    """Each kind is found, and the sentence names the tensor."""

    def test_a_flipped_byte(self, out: Path) -> None:
        flip_a_byte(out, f"{LAYER}.weight_packed")
        assert failures(out)["hashes"].startswith(f"{out / SINGLE}: {LAYER}.weight_packed holds other bytes")

    def test_a_shard_of_another_model(self, made: SimpleNamespace, out: Path, tmp_path: Path) -> None:
        other = Path(shutil.copytree(made.other, tmp_path / "other"))
        shard, foreign = in_shards(out)[-1], in_shards(other)[-1]
        assert spans(shard) == spans(foreign)
        shutil.copyfile(foreign, shard)
        found = failures(out)
        assert found["hashes"].startswith(f"{shard}: {LAYER}.weight_packed holds other bytes than the run computed (and ")
        assert "logits" in found

    def test_a_shard_of_a_model_of_other_shapes(self, out: Path, tiny: Callable[..., Path], tmp_path: Path) -> None:
        other = rounded(tiny("llama", intermediate_size=384), tmp_path / "other")
        shutil.copyfile(other / SINGLE, out / SINGLE)
        assert "mlp.down_proj.weight_packed is I32 [128, 48] where the run computed I32 [128, 32]" in failures(out)["hashes"]

    def test_a_wrong_scale(self, out: Path) -> None:
        change_tensors(out, lambda content: content[f"{LAYER}.weight_scale"].mul_(2))
        found = failures(out)
        assert f"{LAYER}.weight_scale holds other bytes" in found["hashes"]
        assert "log-probabilities differ" in found["logits"]

    def test_another_group_size_in_the_config(self, out: Path) -> None:
        config = json.loads((out / "config.json").read_text())
        config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 32
        change_config(out, **config)
        found = failures(out)
        assert "config.json: is not what the run wrote" in found["config"]
        assert re.search(r"model\.layers\.0\.\S+\.weight_scale has shape \[128, \d\] where int4g32", found["config"])
        assert "hashes" not in found

    def test_a_config_that_fits_but_is_not_the_run_s(self, out: Path) -> None:
        change_config(out, rms_norm_eps=1e-3)
        assert set(failures(out)) == {"config", "logits"}

    def test_a_truncated_shard(self, out: Path) -> None:
        last = max(spans(out / SINGLE).items(), key=lambda item: item[1].end)[0]
        content = (out / SINGLE).read_bytes()
        (out / SINGLE).write_bytes(content[:-1])
        found = answers(out)
        assert f"{last} needs {len(content):,}" in found["files"].detail
        assert f"{last} holds other bytes" in found["hashes"].detail
        assert found["values"].outcome == found["logits"].outcome == "skipped"

    @pytest.mark.parametrize("header", [b"[]", b"{", b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-99,4]}}', b'{"a":1}'])
    def test_a_header_that_makes_no_sense(self, header: bytes, out: Path) -> None:
        (out / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
        found = failures(out)
        assert found.keys() >= {"files", "hashes", "config"}
        assert "model.safetensors: not a whole safetensors file" in found["hashes"]

    def test_a_lost_shard(self, out: Path) -> None:
        lost = in_shards(out)[1]
        lost.unlink()
        assert lost.name in failures(out)["files"]

    def test_a_missing_tensor(self, out: Path) -> None:
        change_tensors(out, lambda content: content.pop(f"{LAYER}.weight_scale"))
        assert f"{LAYER}.weight_scale of manifest.json is missing" in failures(out)["hashes"]

    def test_an_added_tensor(self, out: Path) -> None:
        change_tensors(out, lambda content: content.update(more=torch.ones(3)))
        assert f"{out / SINGLE}: more was not written by the run" in failures(out)["hashes"]

    def test_a_tensor_that_the_index_has_elsewhere(self, out: Path) -> None:
        in_shards(out)
        index = json.loads((out / INDEX).read_text())
        index["weight_map"]["lm_head.weight"] = max(index["weight_map"].values())
        (out / INDEX).write_text(json.dumps(index))
        assert "lm_head.weight" in failures(out)["files"]

    def test_a_tensor_in_another_shard_than_the_index_names(self, out: Path) -> None:
        first = in_shards(out)[0].name
        index = json.loads((out / INDEX).read_text())
        name, holder = f"{LAYER}.weight_scale", index["weight_map"][f"{LAYER}.weight_scale"]
        assert holder != first
        index["weight_map"][name] = first
        (out / INDEX).write_text(json.dumps(index))
        assert failures(out)["files"] == f"{out}: {name} is in {holder} where the index has it in {first}"

    @pytest.mark.parametrize("there", [0, -1])
    def test_a_tensor_in_two_shards(self, there: int, out: Path) -> None:
        files = in_shards(out)
        name = "lm_head.weight" if there else f"{LAYER}.weight_scale"
        holder = next(file for file in files if name in spans(file))
        assert holder != files[there]
        content = load_file(files[there])
        save_file({**content, name: load_file(holder)[name] * 2}, files[there])
        found = failures(out)
        both = " and ".join(sorted((holder.name, files[there].name)))
        assert found["files"] == f"{out}: {name} is in {both} where the index has it in {holder.name}"
        assert found["hashes"] == f"{files[there]}: {name} holds other bytes than the run computed"

    def test_a_tensor_that_the_index_does_not_name(self, out: Path) -> None:
        shard = in_shards(out)[0]
        save_file({**load_file(shard), "more": torch.ones(3)}, shard)
        assert failures(out)["files"] == f"{out}: more is in {shard.name} where the index has it in none"

    def test_nan_in_a_scale(self, out: Path) -> None:
        change_tensors(out, lambda content: content[f"{LAYER}.weight_scale"][0, 0].fill_(torch.nan))
        assert f"{LAYER}.weight_scale holds 1 NaN or infinite values of 512 (and 1 more" in failures(out)["values"]

    def test_a_scale_too_large_to_multiply(self, out: Path) -> None:
        change_tensors(out, lambda content: content[f"{LAYER}.weight_scale"][0, 0].fill_(3e38))
        assert f"{LAYER}.weight, dequantized, holds" in failures(out)["values"]

    def test_all_that_is_wrong_is_found_in_one_go(self, out: Path) -> None:
        change_tensors(out, lambda content: content[f"{LAYER}.weight_scale"][0, 0].fill_(torch.nan))
        change_config(out, rms_norm_eps=1e-3)
        assert set(failures(out)) == {"hashes", "config", "values", "logits"}


class TestReaders:
    @pytest.mark.usefixtures("alone")
    @pytest.mark.parametrize("factor", [1.01, -1.0])
    def test_a_reader_that_decodes_wrongly_is_found_though_every_byte_is_right(
        self, factor: float, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        right = IntGroup.dequantize
        monkeypatch.setattr(IntGroup, "dequantize", lambda self, packed: right(self, packed) * factor)
        assert set(failures(out)) == {"logits"}

    def test_transformers_disagrees_with_a_reader_that_decodes_wrongly(
        self, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        right = IntGroup.dequantize
        monkeypatch.setattr(IntGroup, "dequantize", lambda self, packed: right(self, packed) * 1.01)
        assert "log-probabilities of transformers differ from ours" in failures(out)["transformers"]

    def test_what_transformers_draws_at_random_fails(self, out: Path) -> None:
        change_tensors(out, lambda content: content.pop(f"{LAYER}.weight_packed"))
        assert any(LAYER in key for key in loaders._ask(out, torch.tensor([[1, 2, 3]]))["missing_keys"])

    @pytest.mark.parametrize("kind", ["missing_keys", "mismatched_keys", "unexpected_keys"])
    def test_keys_that_transformers_stumbles_over_are_named(
        self, kind: str, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        said = {"missing_keys": [], "mismatched_keys": [], "unexpected_keys": [], kind: [f"{LAYER}.weight_scale"]}
        monkeypatch.setattr(loaders, "_ask", lambda *_, **__: said)
        assert f"{LAYER}.weight_scale" in failures(out)["transformers"]

    def test_transformers_that_cannot_load_it_fails_with_its_reason(self, out: Path) -> None:
        change_config(out, model_type="llama", rope_parameters={"rope_type": "nonsense"})
        with pytest.raises(loaders.WrongError, match="stock transformers cannot load it"):
            loaders._ask(out, torch.tensor([[1, 2]]))

    def test_without_compressed_tensors_transformers_is_skipped(self, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(loaders, "find_spec", lambda name: None)
        assert answers(out)["transformers"].detail.endswith("compressed-tensors, which is not installed here")

    def test_without_memory_transformers_is_skipped_with_both_numbers(
        self, made: SimpleNamespace, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dense = 4 * sum(tensor.numel() for tensor in tensors(made.model).values())
        needed = dense + (out / SINGLE).stat().st_size
        monkeypatch.setattr(loaders, "available_memory", lambda device: 2 * needed - 1)
        check = answers(out)["transformers"]
        assert check.outcome == "skipped"
        assert check.detail == (
            f"dense in float32 it takes {needed / 1e6:.1f} MB, more than half of the {2 * needed / 1e6:.1f} MB "
            "that are available"
        )
        monkeypatch.setattr(loaders, "available_memory", lambda device: 2 * needed)
        assert answers(out)["transformers"].outcome == "passed"

    @pytest.mark.parametrize(
        ("program", "said"),
        [
            ("import os; os.kill(os.getpid(), 9)", "it was ended by signal 9, most likely for lack of memory"),
            ("raise MemoryError", "it ran out of memory (MemoryError)"),
            (
                "raise OSError(12, 'Cannot allocate memory')",
                "it ran out of memory (OSError: [Errno 12] Cannot allocate memory)",
            ),
        ],
    )
    def test_transformers_that_runs_out_of_memory_is_skipped(
        self, program: str, said: str, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(loaders, "STOCK", tmp_path / "stock.py")
        loaders.STOCK.write_text(program)
        assert answers(out)["transformers"] == Check("transformers", "skipped", said)

    def test_what_transformers_is_compared_with_is_streamed(self, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(ModelSource, "whole")
        assert answers(out)["transformers"].outcome == "passed"

    def test_what_cannot_be_streamed_is_not_compared_with_transformers(self, tiny: Callable[..., Path]) -> None:
        check = answers(tiny("gptj"))["transformers"]
        assert check.outcome == "skipped"
        assert "finds every key, but its logits have none of ours to be compared with" in check.detail
        assert "cannot be streamed" in check.detail


@pytest.mark.usefixtures("alone")
class TestReference:
    def test_the_original_of_another_model_is_told_apart(self, made: SimpleNamespace, tmp_path: Path) -> None:
        other = Path(shutil.copytree(made.model, tmp_path / "other"))
        layer = "model.layers.0.mlp.gate_proj"

        def shuffle(content: tiny_models.Tensors) -> None:
            weight = content[f"{layer}.weight"]
            content[f"{layer}.weight"] = weight[torch.randperm(len(weight), generator=torch.Generator().manual_seed(0))]

        change_tensors(other, shuffle)
        assert f"{layer}.weight does not belong to {other}: cosine similarity" in failures(made.out, other)["reference"]

    def test_a_tensor_that_should_be_the_original_s(self, made: SimpleNamespace, tmp_path: Path) -> None:
        other = Path(shutil.copytree(made.model, tmp_path / "other"))
        change_tensors(other, lambda content: content["model.norm.weight"][3:4].add_(1e-3))
        assert f"model.norm.weight differs from that of {other}" in failures(made.out, other)["reference"]

    def test_logits_that_are_not_finite_are_reported_rather_than_a_divergence(
        self, made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert answers(made.out, made.model)["reference"].detail.endswith("nats/token on the 32 tokens of the probe")
        sound = values.streamed_logits

        def overflowing(source: ModelSource, *rest: Any) -> torch.Tensor:
            return sound(source, *rest) * (torch.nan if source.path == made.out else 1)

        monkeypatch.setattr(values, "streamed_logits", overflowing)
        detail = answers(made.out, made.model)["reference"].detail
        assert detail.endswith(f"KL not computed: the logits of {made.out} are not finite in torch.float32")

    def test_of_other_shapes_fails(self, made: SimpleNamespace, tiny: Callable[..., Path]) -> None:
        other = tiny("llama", intermediate_size=384)
        assert f"differs from that of {other} (and " in failures(made.out, other)["reference"]

    def test_that_is_not_there_is_refused(self, made: SimpleNamespace, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match="no such directory"):
            verify(made.out, tmp_path / "nowhere")
