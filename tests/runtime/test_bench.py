"""Measuring speed: what is asked of whom and when, which bytes count, what is refused, what is saved. Never how fast."""

import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import typer
from tiny_models import POSITIONS, change_config
from transformers.cache_utils import DynamicCache
from typer.testing import CliRunner

from compressor.api import quantize
from compressor.cli.bench import bench as verb
from compressor.errors import OutputError, RecipeError, SourceError
from compressor.runtime import bench as module
from compressor.runtime.bench import Load, Speed, bench, take_turns
from compressor.runtime.load import load as load_model
from compressor.runtime.measure import About, Bandwidth, Resident, Taken, weight_bytes

Tiny = Callable[..., Path]
SMALL: dict[str, Any] = {"batches": (3,), "prompt": 5, "new_tokens": 4, "rounds": 2, "threads": 1}
KEYS = {"device", "threads", "dtype", "prompt", "new_tokens", "rounds", "bandwidth_gb_s", "rows", "runtime",
        "load_seconds", "peak_memory_bytes", "peak_device_memory_bytes"}  # fmt: skip
ROW_KEYS = {"model", "phase", "batch", "tokens_per_second", "gb_per_second", "first_token_seconds", "speedup",
            "bytes_per_step", "seconds", "spread"}  # fmt: skip


@pytest.fixture(scope="module")
def packed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in 4 bits, with its report."""
    out = tmp_path_factory.mktemp("packed") / "tiny-int4"
    quantize(tiny("llama"), out, bits=4, method="rtn", evaluate=False)
    return out


@pytest.fixture(scope="module")
def speed(tiny: Tiny, packed: Path) -> Speed:
    """A whole measurement, once for all tests of what it holds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BUFFER_BYTES", 2**20)
        return bench(packed, tiny("llama"), **SMALL)


class Recorder:
    """Stands for a worker: writes down what is asked and answers with the figures it was given."""

    def __init__(self, name: str, asked: list[tuple[Any, ...]], seconds: list[float]) -> None:
        self.name, self.asked, self.seconds = name, asked, seconds

    def ask(self, method: str, *arguments: Any) -> Any:
        self.asked.append((self.name, method, *arguments))
        if method == "best":
            return self.seconds.pop(0)
        return Taken(self.seconds.pop(0), 10**9 if method == "decode" else None)


class Here:
    """Stands for a worker: what it makes lives in this process."""

    def __init__(self, thing: object) -> None:
        self.thing = thing

    def ask(self, method: str, *arguments: Any) -> Any:
        return getattr(self.thing, method)(*arguments)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """No worker processes, and a small buffer: saves seconds where the processes are not what is tested."""

    @contextmanager
    def make_here(where: str, make: Callable[..., object], *arguments: Any) -> Iterator[Here]:
        yield Here(make(*arguments))

    monkeypatch.setattr(module, "started", make_here)
    monkeypatch.setattr(module, "BUFFER_BYTES", 2**16)


class TestTurns:
    LOAD = Load(batches=(8, 1), prompt=16, new_tokens=4, rounds=2)

    def test_models_alternate_and_the_first_to_go_changes_with_every_round(self) -> None:
        asked: list[tuple[Any, ...]] = []
        workers = {name: Recorder(name, asked, [1.0] * 12) for name in ("dense", "int4")}
        take_turns(workers, Recorder("memory", asked, [1.0] * 3), self.LOAD, lambda done, total, what: None)
        runs = [("prefill", 1, 16), ("prefill", 8, 16), ("decode", 1, 16, 4), ("decode", 8, 16, 4)]
        forward = [(name, *run) for run in runs for name in ("dense", "int4")]
        backward = [(name, *run) for run in runs for name in ("int4", "dense")]
        best = ("memory", "best")
        assert asked == [*forward, best, *backward, best, *forward, best]

    def test_the_first_round_does_not_count_and_medians_are_taken_of_the_others(self) -> None:
        load = Load(batches=(1,), prompt=10, new_tokens=4, rounds=3)
        dense = Recorder("dense", [], [99, 99, 2, 4, 1, 8, 4, 8])  # prefill, decode of each of four rounds
        int4 = Recorder("int4", [], [99, 99, 1, 2, 1, 1, 1, 2])
        memory = Recorder("memory", [], [3e9, 5e9, 4e9, 1e9])
        rows, bandwidth = take_turns({"dense": dense, "int4": int4}, memory, load, lambda done, total, what: None)
        about = {name: About("cpu", 1, "dense weights", 0.5) for name in ("dense", "int4")}
        peaks = {"dense": (7, 0), "int4": (5, 0)}
        data = Speed(load, "float32", about, rows, bandwidth, peaks).to_dict()
        found = [
            tuple(row[key] for key in ("model", "phase", "tokens_per_second", "speedup", "spread")) for row in data["rows"]
        ]
        assert found == [
            ("dense", "prefill", 10 / 2, 1, 1.5),
            ("int4", "prefill", 10, 2, 0),  # ratios 2, 1, 4
            ("dense", "decode", 1 / 8, 1, 0.5),
            ("int4", "decode", 1 / 2, 4, 0.5),  # ratios 2, 8, 4
        ]
        assert [row["gb_per_second"] for row in data["rows"]] == [None, None, 1 / 8, 1 / 2]
        assert [row["first_token_seconds"] for row in data["rows"]] == [2, 1, None, None]
        assert (data["bandwidth_gb_s"], data["peak_memory_bytes"]) == (5, {"dense": 7, "int4": 5})

    def test_progress_counts_every_measurement(self) -> None:
        told: list[tuple[int, int, str]] = []
        one = Recorder("one", [], [1.0] * 12)
        take_turns({"one": one}, Recorder("memory", [], [1.0] * 3), self.LOAD, lambda *event: told.append(event))
        assert [done for done, _, what in told if what] == list(range(12))
        assert [done for done, _, what in told if not what] == [4, 8, 12]
        assert {total for _, total, _ in told} == {12}
        assert told[3] == (3, 12, "one, decode, batch 8")


class TestBytes:
    """Against a count by hand from the shapes in tiny_models."""

    BLOCK = 128 * (128 + 64 + 64 + 128) + 3 * 128 * 256 + 2 * 128  # q, k, v, o; gate, up, down; norms
    HEAD = 384 * 128
    CACHE = 2 * 2 * 2 * 32 * 4  # bytes a token: blocks, keys and values, heads, width, fp32

    @pytest.mark.parametrize("family", ["llama", "llama_tied"])
    def test_the_embedding_counts_once_if_it_is_the_head_and_else_not_at_all(self, family: str, tiny: Tiny) -> None:
        assert weight_bytes(load_model(tiny(family))) == 4 * (2 * self.BLOCK + 128 + self.HEAD)

    def test_position_tables_do_not_count(self, tiny: Tiny) -> None:
        model = load_model(tiny("gpt2"))
        everything = sum(parameter.nbytes for parameter in model.parameters())
        assert weight_bytes(model) == everything - 4 * POSITIONS * 128

    def test_a_vision_tower_does_not_count(self, tiny: Tiny) -> None:
        text = sum(p.nbytes for name, p in load_model(tiny("gemma3_vision")).named_parameters() if "language_model" in name)
        assert weight_bytes(load_model(tiny("gemma3_vision"))) == text

    def test_half_the_width_is_half_the_bytes(self, tiny: Tiny) -> None:
        model = tiny("llama")
        assert 2 * weight_bytes(load_model(model, dtype=torch.bfloat16)) == weight_bytes(load_model(model))

    @pytest.mark.parametrize("batch", [1, 3])
    def test_a_step_reads_the_weights_and_the_cache_of_its_sequences(self, batch: int, tiny: Tiny) -> None:
        resident = Resident(str(tiny("llama")), "cpu", torch.float32, None)
        lengths = [5 + 1 + step for step in (1, 2, 3, 4)]  # prompt, untimed step, timed steps: what each attends to
        expected = 4 * (2 * self.BLOCK + 128 + self.HEAD) + batch * self.CACHE * sum(lengths) / 4
        assert resident.decode(batch, 5, 4).bytes_read == expected

    def test_a_cache_with_a_window_stops_growing(self, tiny: Tiny) -> None:
        """All layers of this model attend to 8 tokens and keep 7."""
        resident = Resident(str(tiny("mistral")), "cpu", torch.float32, None)
        assert resident.decode(2, 20, 4).bytes_read == weight_bytes(resident.model) + 2 * self.CACHE * 7


class TestResident:
    @pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3_vision", "phi3", "gpt_neox", "opt", "gpt2"])
    def test_decoding_writes_what_generate_does(self, family: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
        resident = Resident(str(tiny(family)), "cpu", torch.float32, None)
        prompt = resident._prompt(1, 9)
        expected = resident.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False, eos_token_id=None
        )
        written, step = [], resident._step

        def recorded(tokens: torch.Tensor, cache: DynamicCache | None) -> Any:
            token, cache = step(tokens, cache)
            written.append(token)
            return token, cache

        monkeypatch.setattr(resident, "_step", recorded)
        resident.decode(2, 9, 4)
        assert [token.shape[0] for token in written] == [1, 2, 2, 2, 2, 2]
        assert torch.stack([token[-1, 0] for token in written]).tolist() == expected[0, 9:].tolist()

    def test_it_says_what_it_runs(self, tiny: Tiny, packed: Path) -> None:
        dense, compressed = (Resident(str(path), "cpu", torch.float32, None) for path in (tiny("llama"), packed))
        assert dense.about().runtime.startswith("dense weights, transformers ")
        assert compressed.about().runtime.startswith("packed weights (int4-g")

    def test_the_memory_has_a_bandwidth(self) -> None:
        assert Bandwidth("cpu", None, 2**16).best() > 0


class TestSpeed:
    def test_the_keys_are_those_that_a_report_shows(self, speed: Speed) -> None:
        data = speed.to_dict()
        assert data.keys() == KEYS
        assert {key for row in data["rows"] for key in row} == ROW_KEYS
        assert json.loads(json.dumps(data)) == data

    def test_all_figures_are_positive(self, speed: Speed) -> None:
        data = speed.to_dict()
        for row in data["rows"]:
            assert row["tokens_per_second"] > 0
            assert row["speedup"] > 0
            assert len(row["seconds"]) == 2
            assert all(seconds > 0 for seconds in row["seconds"])
            assert (row["gb_per_second"] or 0) * (row["bytes_per_step"] or 0) > 0 or row["phase"] == "prefill"
            assert (row["first_token_seconds"] or 0) > 0 or row["phase"] == "decode"
        assert data["bandwidth_gb_s"] > 0
        assert all(seconds > 0 for seconds in data["load_seconds"].values())
        assert set(data["peak_device_memory_bytes"].values()) == {0}

    def test_the_original_is_measured_first_and_a_single_prompt_always(self, speed: Speed, tiny: Tiny) -> None:
        names = (tiny("llama").name, "tiny-int4")
        runs = (("prefill", 1), ("prefill", 3), ("decode", 3))
        assert [(row.model, row.phase, row.batch) for row in speed.rows] == [(n, *run) for run in runs for n in names]

    def test_a_process_holds_one_model_and_the_libraries(self, speed: Speed) -> None:
        for host, _ in speed.peaks.values():
            assert 50 * 2**20 < host < psutil.virtual_memory().total

    def test_the_threads_are_those_asked_for(self, speed: Speed) -> None:
        assert speed.to_dict()["threads"] == 1

    def test_a_step_reads_fewer_bytes_of_packed_weights(self, speed: Speed) -> None:
        original, packed = (
            {row.bytes_read or 0 for row in speed.rows if (row.phase, row.model) == ("decode", name)} for name in speed.about
        )
        assert max(packed) < min(original)

    def test_no_worker_is_left(self, speed: Speed) -> None:
        assert multiprocessing.active_children() == []

    @pytest.mark.usefixtures("in_process")
    def test_a_model_beside_itself_keeps_its_figures_apart(self, tiny: Tiny) -> None:
        data = bench(tiny("llama"), tiny("llama"), **{**SMALL, "rounds": 1}).to_dict()
        name = tiny("llama").name
        assert list(data["peak_memory_bytes"]) == [f"{name} (original)", name]
        first, second = (row["bytes_per_step"] for row in data["rows"] if row["phase"] == "decode")
        assert first == second

    @pytest.mark.usefixtures("in_process")
    def test_alone_a_model_is_compared_with_nothing(self, tiny: Tiny) -> None:
        data = bench(tiny("llama"), **{**SMALL, "rounds": 1, "prompt": None}).to_dict()
        assert {row["speedup"] for row in data["rows"]} == {None}
        assert data["prompt"] == POSITIONS - 5  # what is left beside 4 timed steps and the untimed one


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"batches": (1, 0)}, "--batch 0"),
            ({"batches": ()}, "--batch"),
            ({"new_tokens": 0}, "--new-tokens 0"),
            ({"rounds": 0}, "--rounds 0"),
            ({"prompt": 0}, "--prompt-len 0"),
            ({"threads": -1}, "--threads -1"),
            ({"prompt": POSITIONS - 4}, f"65 positions, the model has {POSITIONS}; lower --prompt-len"),
            ({"prompt": None, "new_tokens": POSITIONS - 1}, f"65 positions, the model has {POSITIONS}; lower --new-tokens"),
        ],
    )
    def test_a_number_that_cannot_be_is_named(self, changes: dict[str, Any], named: str, tiny: Tiny) -> None:
        with pytest.raises(RecipeError, match=named):
            bench(tiny("llama"), **{**SMALL, **changes})

    def test_the_model_with_less_room_decides(self, tiny: Tiny, tiny_copy: Tiny) -> None:
        short = tiny_copy("llama")
        change_config(short, max_position_embeddings=9)
        with pytest.raises(RecipeError, match=rf"{short}: .* 10 positions, the model has 9"):
            bench(tiny("llama"), short, **SMALL)

    def test_a_directory_that_is_not_there_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match="no such directory"):
            bench(tmp_path / "nowhere")

    def test_what_a_model_cannot_be_loaded_for_comes_from_its_process(self, tiny_copy: Tiny) -> None:
        damaged = tiny_copy("llama")
        whole = (damaged / "model.safetensors").read_bytes()
        start = 8 + int.from_bytes(whole[:8], "little")
        (damaged / "model.safetensors").write_bytes(whole[:start] + b"\xff" * (len(whole) - start))
        with pytest.raises(SourceError, match="NaN"):
            bench(damaged, **SMALL)
        assert multiprocessing.active_children() == []


@pytest.mark.usefixtures("in_process")
class TestVerb:
    """`compress bench`, without the words before it."""

    OPTIONS = ("--batch", "2", "--prompt-len", "6", "--new-tokens", "3", "--rounds", "1", "--device", "cpu")

    def run(self, *arguments: object) -> Any:
        app = typer.Typer()
        app.command()(verb)
        return CliRunner().invoke(app, [str(argument) for argument in (*arguments, *self.OPTIONS)])

    def test_json_is_one_object_on_stdout(self, tiny: Tiny) -> None:
        result = self.run(tiny("llama"), "--json")
        assert result.exit_code == 0
        answer = json.loads(result.stdout)
        assert answer.keys() == KEYS
        assert [(row["phase"], row["batch"]) for row in answer["rows"]] == [("prefill", 1), ("prefill", 2), ("decode", 2)]

    def test_the_tables_name_both_models_and_how_they_ran(self, tiny: Tiny, packed: Path) -> None:
        result = self.run(packed, "--reference", tiny("llama"))
        assert result.exit_code == 0
        for part in ("decode, batch 2, tiny-int4", f"decode, batch 2, {tiny('llama').name}", "packed weights", "memory"):
            assert part in result.stdout
        assert "on the GPU" not in result.stdout

    def test_save_adds_what_was_printed_to_the_report(self, packed: Path, tmp_path: Path) -> None:
        copy = Path(shutil.copytree(packed, tmp_path / "copy"))
        before = json.loads((copy / "report.json").read_text())
        answer = json.loads(self.run(copy, "--save", "--json").stdout)
        assert json.loads((copy / "report.json").read_text()) == {**before, "speed": answer}
        assert f"{answer['rows'][0]['tokens_per_second']:,.0f}" in (copy / "report.html").read_text()

    def test_save_is_refused_before_the_work_where_there_is_no_report(
        self, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "bench", lambda *_, **__: pytest.fail("it began to measure"))
        error = self.run(tiny("llama"), "--save").exception
        assert isinstance(error, OutputError)
        assert "report.json" in str(error)
