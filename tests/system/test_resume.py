"""A run that is cut short: nothing half-made appears, and going on from there gives what an uninterrupted run gives."""

import fcntl
import json
import os
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness import (
    DEADLINE,
    TEXT,
    CommandLine,
    Fate,
    Fork,
    build_model,
    contents,
    dies_at_call,
    dies_at_rename,
    may_write,
    stops_at_third_block,
)

from compressor import api
from compressor.model.checkpoint import SINGLE
from compressor.pipeline import blocks
from compressor.pipeline.job import Event
from compressor.recipe.build import quantize_recipe

# Both passes send two streams through what is done.
CHANGES = ("passes.0.asymmetric_calibration=0.5", "passes.0.refine=1", "passes.1.steps=3", "evaluation.samples=1")
REPORTS = ("report.json", "report.html", "README.md")  # name the place and the time

# Where a run is killed before OUT is there. The tensors outside the blocks are parts of their own.
BEFORE: dict[str, Fate] = {
    "before the journal is in place": (dies_at_rename, ("journal.jsonl", False)),
    "before the second block is in place": (dies_at_rename, ("block-00001.safetensors", False)),
    "between the second block and its line in the journal": (dies_at_rename, ("block-00001.safetensors", True)),
    "between two tensors outside the blocks": (dies_at_rename, ("rest-00001.safetensors", True)),
    "before the shards are assembled": (dies_at_call, ("compressor.model.shards", "assemble")),
    "before a shard is in place": (dies_at_rename, (SINGLE, False)),
    "before other files are copied": (dies_at_call, ("compressor.pipeline.write_model", "copy_other_files")),
    "before the comparison with the original": (dies_at_call, ("compressor.api", "judge_result")),
    "before the report is written": (dies_at_call, ("compressor.api", "model_card")),
    "before the result appears": (dies_at_rename, ("out", False)),
}
AFTER: Fate = (dies_at_rename, ("out", True))


@dataclass(frozen=True)
class Setting:
    """A model, a text to calibrate on, and what comes of them without interruption."""

    model: Path
    text: Path
    expected: dict[str, bytes]

    @property
    def options(self) -> tuple[object, ...]:
        changes = [option for change in CHANGES for option in ("--set", change)]
        return ("--calibration", self.text, "--samples", 4, "--seq-len", 64, *changes, "--no-verify")

    def quantize(self, out: Path) -> tuple[object, ...]:
        """The command."""
        return ("quantize", self.model, "--out", out, *self.options)


@pytest.fixture(scope="module")
def setting(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """Not to be changed."""
    place = tmp_path_factory.mktemp("setting")
    text = place / "text.txt"
    text.write_text(TEXT)
    plain = Setting(tiny, text, {})
    whole = place / "out"
    log = Fork(place / "log", *plain.quantize(whole)).result()
    assert log.code == 0, log.err
    return Setting(tiny, text, contents(whole, REPORTS))


@pytest.fixture(scope="module")
def killed(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT.partial of a run that was killed once two blocks were done. Not to be changed."""
    place = tmp_path_factory.mktemp("killed")
    fork = Fork(place / "log", *setting.quantize(place / "out"), fate=(stops_at_third_block, ()))
    journal = place / "out.partial" / "work" / "journal.jsonl"
    deadline = time.monotonic() + DEADLINE
    while not (journal.exists() and journal.read_text().count("\n") == 3):
        assert time.monotonic() < deadline
        assert fork.process.is_alive(), fork.result().err
        time.sleep(0.02)
    assert fork.process.pid is not None
    os.kill(fork.process.pid, signal.SIGKILL)
    assert fork.result().code == -signal.SIGKILL
    return place / "out.partial"


@pytest.fixture
def partial(killed: Path, out: Path) -> Path:
    """The same, the test's own, for the test's OUT."""
    return Path(shutil.copytree(killed, out.with_name("out.partial")))


class TestAKilledRun:
    @pytest.mark.parametrize("point", BEFORE)
    def test_leaves_no_result_and_resumes_to_the_same_bytes(
        self, point: str, setting: Setting, tmp_path: Path, out: Path, compress: CommandLine
    ) -> None:
        assert Fork(tmp_path / "log", *setting.quantize(out), fate=BEFORE[point]).result().code == -signal.SIGKILL
        assert not out.exists()
        compress(*setting.quantize(out), "--resume")
        assert contents(out, REPORTS) == setting.expected

    def test_that_had_just_published_is_complete(
        self, setting: Setting, tmp_path: Path, out: Path, compress: CommandLine
    ) -> None:
        Fork(tmp_path / "log", *setting.quantize(out), fate=AFTER).result()
        assert compress(*setting.quantize(out), "--resume").code == 0
        assert contents(out, REPORTS) == setting.expected

    def test_that_had_just_published_leaves_nothing_after_resuming(
        self, setting: Setting, tmp_path: Path, out: Path, compress: CommandLine
    ) -> None:
        Fork(tmp_path / "log", *setting.quantize(out), fate=AFTER).result()
        compress(*setting.quantize(out), "--resume")
        assert not out.with_name("out.partial").exists()

    def test_between_two_blocks_leaves_no_result(self, partial: Path, out: Path) -> None:
        assert not out.exists()

    def test_between_two_blocks_resumes_to_the_same_bytes(
        self, setting: Setting, partial: Path, out: Path, compress: CommandLine
    ) -> None:
        compress(*setting.quantize(out), "--resume")
        assert contents(out, REPORTS) == setting.expected

    def test_leaves_nothing_unfinished_after_resuming(
        self, setting: Setting, partial: Path, out: Path, compress: CommandLine
    ) -> None:
        compress(*setting.quantize(out), "--resume")
        assert not partial.exists()

    def test_is_not_computed_again(
        self, setting: Setting, partial: Path, out: Path, monkeypatch: pytest.MonkeyPatch, compress: CommandLine
    ) -> None:
        work, computed = blocks.compress_block, []
        monkeypatch.setattr(blocks, "compress_block", lambda job, block, *rest: computed.append(block.index) or work(job, block, *rest))  # fmt: skip # noqa: E501
        compress(*setting.quantize(out), "--resume")
        assert computed == [2, 3]

    def test_has_every_layer_once_in_its_report(
        self, setting: Setting, partial: Path, out: Path, compress: CommandLine
    ) -> None:
        answer = compress(*setting.quantize(out), "--resume", "--json").json
        layers = [row["layer"] for row in answer["rows"]]
        assert (len(layers), len(set(layers))) == (28, 28)

    def test_while_replacing_a_result_leaves_the_old_one(
        self, setting: Setting, tmp_path: Path, out: Path, compress: CommandLine
    ) -> None:
        compress("quantize", setting.model, "--out", out, "--method", "rtn", "--no-eval", "--no-verify")
        before = contents(out)
        fate = BEFORE["before the comparison with the original"]
        Fork(tmp_path / "log", *setting.quantize(out), "--overwrite", fate=fate).result()
        assert contents(out) == before

    def test_between_the_old_result_and_the_new_one_resumes_to_the_same_bytes(
        self, setting: Setting, tmp_path: Path, out: Path, compress: CommandLine
    ) -> None:
        compress("quantize", setting.model, "--out", out, "--method", "rtn", "--no-eval", "--no-verify")
        fate = (dies_at_rename, ("replaced", True))
        Fork(tmp_path / "log", *setting.quantize(out), "--overwrite", fate=fate).result()
        compress(*setting.quantize(out), "--resume")
        assert contents(out, REPORTS) == setting.expected

    @pytest.mark.parametrize("room", [50_000, 200_000])
    def test_by_a_full_disk_resumes_to_the_same_bytes(
        self, room: int, setting: Setting, tmp_path: Path, out: Path, compress: CommandLine
    ) -> None:
        assert Fork(tmp_path / "log", *setting.quantize(out), fate=(may_write, (room,))).result().code == 2
        compress(*setting.quantize(out), "--resume")
        assert contents(out, REPORTS) == setting.expected


class TestADamagedPartial:
    """What a crash of the machine may leave."""

    def test_line_torn_by_the_kill_is_ignored(
        self, setting: Setting, partial: Path, out: Path, compress: CommandLine
    ) -> None:
        with (partial / "work" / "journal.jsonl").open("a") as journal:
            journal.write('{"part": "block-00002", "ro')
        compress(*setting.quantize(out), "--resume")
        assert contents(out, REPORTS) == setting.expected

    @pytest.mark.parametrize("kept", [1, 10, 100, 2000])
    def test_journal_cut_anywhere_resumes_to_the_same_bytes(
        self, kept: int, setting: Setting, partial: Path, out: Path, compress: CommandLine
    ) -> None:
        journal = partial / "work" / "journal.jsonl"
        journal.write_bytes(journal.read_bytes()[:kept])
        compress(*setting.quantize(out), "--resume", "--overwrite")
        assert contents(out, REPORTS) == setting.expected

    def test_part_that_is_missing_is_computed_again(
        self, setting: Setting, partial: Path, out: Path, compress: CommandLine
    ) -> None:
        (partial / "work" / "block-00000.safetensors").unlink()
        compress(*setting.quantize(out), "--resume")
        assert contents(out, REPORTS) == setting.expected


class TestResume:
    @pytest.mark.parametrize(
        "options, field",
        [
            pytest.param(("--set", "passes.0.damp=0.02"), "recipe", id="recipe"),
            pytest.param(("--seed", 1), "recipe", id="seed"),
            pytest.param(("--dtype", "bfloat16"), "computation", id="dtype"),
        ],
    )
    def test_of_another_run_is_refused(
        self,
        options: tuple[object, ...],
        field: str,
        setting: Setting,
        partial: Path,
        out: Path,
        compress: CommandLine,
    ) -> None:
        assert f"cannot resume, {field}" in compress(*setting.quantize(out), *options, "--resume").error

    def test_with_another_model_is_refused(
        self, setting: Setting, partial: Path, tmp_path: Path, out: Path, compress: CommandLine
    ) -> None:
        other = build_model(tmp_path / "other", seed=1)
        error = compress("quantize", other, "--out", out, *setting.options, "--resume").error
        assert "cannot resume, model changed" in error

    def test_with_other_data_is_refused(self, setting: Setting, partial: Path, out: Path, compress: CommandLine) -> None:
        before = setting.text.read_text()
        setting.text.write_text(before.replace("power", "force"))
        try:
            error = compress(*setting.quantize(out), "--resume").error
        finally:
            setting.text.write_text(before)
        assert "cannot resume, data changed" in error

    def test_that_is_refused_keeps_the_finished_blocks(
        self, setting: Setting, partial: Path, out: Path, compress: CommandLine
    ) -> None:
        before = contents(partial)
        compress(*setting.quantize(out), "--seed", 1, "--resume")
        assert contents(partial) == before

    def test_without_an_interrupted_run_starts_one(self, setting: Setting, out: Path, compress: CommandLine) -> None:
        compress(*setting.quantize(out), "--resume")
        assert contents(out, REPORTS) == setting.expected

    def test_of_a_complete_run_succeeds(self, setting: Setting, out: Path, compress: CommandLine) -> None:
        first = compress(*setting.quantize(out), "--json").json
        assert compress(*setting.quantize(out), "--resume", "--json").json == first

    def test_of_a_complete_run_changes_nothing(self, setting: Setting, out: Path, compress: CommandLine) -> None:
        compress(*setting.quantize(out))
        before = contents(out)
        compress(*setting.quantize(out), "--resume")
        assert contents(out) == before

    def test_of_another_complete_run_is_refused(self, setting: Setting, out: Path, compress: CommandLine) -> None:
        compress(*setting.quantize(out))
        assert "not the result of this run" in compress(*setting.quantize(out), "--seed", 1, "--resume").error

    def test_of_a_complete_run_spares_what_another_run_has_begun(
        self, setting: Setting, partial: Path, out: Path, compress: CommandLine
    ) -> None:
        options = ("quantize", setting.model, "--out", out, "--method", "rtn", "--no-eval", "--no-verify")
        shutil.move(partial, partial.with_name("aside"))
        compress(*options)
        shutil.move(partial.with_name("aside"), partial)
        before = contents(partial)
        assert compress(*options, "--resume").code == 0
        assert contents(partial) == before


class TestAnInterruptedRun:
    def test_that_had_finished_nothing_is_started_again_unasked(
        self, setting: Setting, tmp_path: Path, out: Path, compress: CommandLine
    ) -> None:
        fate = (dies_at_rename, ("block-00000.safetensors", False))
        Fork(tmp_path / "log", *setting.quantize(out), fate=fate).result()
        assert compress(*setting.quantize(out)).code == 0

    def test_is_not_started_again_unasked(self, setting: Setting, partial: Path, out: Path, compress: CommandLine) -> None:
        error = compress(*setting.quantize(out)).error
        assert [part for part in ("2 finished parts", "--resume", "--overwrite") if part not in error] == []

    def test_is_started_again_by_overwrite(self, setting: Setting, partial: Path, out: Path, compress: CommandLine) -> None:
        compress(*setting.quantize(out), "--seed", 1, "--overwrite")
        assert json.loads((out / "report.json").read_text())["calibration"]["seed"] == 1

    def test_by_ctrl_c_says_how_to_go_on(
        self, setting: Setting, out: Path, monkeypatch: pytest.MonkeyPatch, compress: CommandLine
    ) -> None:
        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(blocks, "return_freed_memory", interrupted)
        result = compress(*setting.quantize(out))
        assert (result.code, "--resume" in result.err.splitlines()[-1]) == (130, True)

    def test_in_a_program_can_go_on(self, setting: Setting, out: Path) -> None:
        def impatient(event: Event) -> None:
            if event.done == 2:
                raise TimeoutError

        recipe = quantize_recipe(calibration=str(setting.text), samples=4, seq_len=64, changes=CHANGES)
        with pytest.raises(TimeoutError):
            api.run(recipe, setting.model, out, tell=impatient, verify=False)
        api.run(recipe, setting.model, out, resume=True, verify=False)
        assert contents(out, REPORTS) == setting.expected


class TestTwoRunsAtOnce:
    @pytest.mark.parametrize("option", [(), ("--resume",), ("--overwrite",)], ids=["plain", "resume", "overwrite"])
    def test_the_second_is_refused(
        self, option: tuple[str, ...], setting: Setting, partial: Path, out: Path, compress: CommandLine
    ) -> None:
        with (partial / "work" / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            assert "another run is writing" in compress(*setting.quantize(out), *option).error

    def test_the_first_is_not_disturbed(self, setting: Setting, partial: Path, out: Path, compress: CommandLine) -> None:
        before = contents(partial)
        with (partial / "work" / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            compress(*setting.quantize(out), "--overwrite")
        assert contents(partial) == before
