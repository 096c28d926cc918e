"""Several ranks do what one does, and end together when one of them fails."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from harness import DEADLINE, CommandLine, Fate, Fork, build_model, contents, dies_at_call, fails_with, on_ranks

Launcher = Callable[..., subprocess.CompletedProcess[str]]
REPORTS = ("report.json", "report.html", "README.md")  # name the place and the time
QUICK = ("--method", "gptq", "--set", "passes.0.refine=1", "--no-eval", "--no-verify")
FOUR_BATCHES = ("--samples", 64, "--seq-len", 256, *QUICK)
TWO_BATCHES = ("--samples", 32, "--seq-len", 256, *QUICK)
ONE_BATCH = ("--samples", 4, "--seq-len", 64, *QUICK)
DENSE = ("asymmetric_calibration=0.5",)
SETTINGS = {
    "gptq with an odd number of batches": ("--samples", 48, "--seq-len", 256, *QUICK),
    "gptq against dense activations": (*FOUR_BATCHES, *(x for k in DENSE for x in ("--set", f"passes.0.{k}"))),
    "rotated, with a short batch more on one rank": (
        *("--samples", 40, "--seq-len", 256, "--method", "rotated-learned", "--no-eval", "--no-verify"),
        *("--set", "passes.0.learn=3", "--set", "passes.1.refine=1", "--set", "passes.2.steps=3"),
    ),
    "learned": (*FOUR_BATCHES, "--method", "learned", "--set", "passes.1.steps=3"),
    "nvfp4 with a scale of activations from calibration": (*FOUR_BATCHES, "--format", "nvfp4", "--activations", 4),
    "fpq": (
        *("--samples", 32, "--seq-len", 256, "--method", "fpq", "--format", "fp4", "--activations", 4, "--no-eval"),
        *("--no-verify", "--set", "passes.1.refine=1", "--set", "passes.1.search=false", "--set", "passes.2.steps=2"),
    ),
    "rtn": ("--method", "rtn", "--no-eval", "--no-verify"),
}


@pytest.fixture(scope="module")
def two_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with half the blocks of `tiny`, not to be changed."""
    return build_model(tmp_path_factory.mktemp("models") / "two", blocks=2)


@pytest.fixture
def torchrun(tmp_path: Path) -> Launcher:
    """`torchrun -m compressor ARGUMENTS` with two ranks on this machine's CPU."""

    def start(*arguments: object) -> subprocess.CompletedProcess[str]:
        launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "compressor")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(
            [*launcher, *map(str, arguments)],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=DEADLINE,
        )  # fmt: skip

    return start


class TestTwoRanks:
    def test_started_by_torchrun_write_what_one_writes(
        self, tiny: Path, tmp_path: Path, torchrun: Launcher, compress: CommandLine
    ) -> None:
        compress("quantize", tiny, "--out", tmp_path / "one", *FOUR_BATCHES)
        result = torchrun("quantize", tiny, "--out", tmp_path / "two", *FOUR_BATCHES)
        assert result.returncode == 0, result.stderr
        assert contents(tmp_path / "two", REPORTS) == contents(tmp_path / "one", REPORTS)

    @pytest.mark.parametrize("case", SETTINGS)
    def test_write_what_one_writes(self, case: str, two_blocks: Path, tmp_path: Path, compress: CommandLine) -> None:
        assert compress("quantize", two_blocks, "--out", tmp_path / "one", *SETTINGS[case]).code == 0
        on_ranks(tmp_path / "log", "quantize", two_blocks, "--out", tmp_path / "two", *SETTINGS[case])
        assert contents(tmp_path / "two", REPORTS) == contents(tmp_path / "one", REPORTS)

    def test_find_the_same_scales_of_the_cache(self, tiny: Path, tmp_path: Path, compress: CommandLine) -> None:
        """Each sees keys and values of its own samples; the largest are those of all."""
        data = {"passes": [{"pass": "rtn", "options": [{"format": "int_group"}]}, {"pass": "kv_cache"}], "evaluation": None}
        (tmp_path / "recipe.yaml").write_text(json.dumps({**data, "calibration": {"samples": 32, "seq_len": 256}}))
        command = ("run", tmp_path / "recipe.yaml", tiny, "--no-verify", "--out")
        assert compress(*command, tmp_path / "one").code == 0
        assert [rank.code for rank in on_ranks(tmp_path / "log", *command, tmp_path / "two")] == [0, 0]
        assert contents(tmp_path / "two", REPORTS) == contents(tmp_path / "one", REPORTS)

    def test_answer_once(self, tiny: Path, out: Path, tmp_path: Path) -> None:
        first, second = on_ranks(tmp_path / "log", "quantize", tiny, "--out", out, *TWO_BATCHES, "--json")
        assert (first.json["out"], second.out, second.err) == ("out", "", "")

    def test_go_on_from_where_one_was_killed(self, tiny: Path, out: Path, tmp_path: Path, compress: CommandLine) -> None:
        command = ("quantize", tiny, "--out", out, *TWO_BATCHES)
        fate = (dies_at_call, ("compressor.model.shards", "assemble"))
        Fork(tmp_path / "log", *command, fate=fate).result()
        (out.with_name("out.partial") / "work" / "block-00002.safetensors").unlink()
        assert [rank.code for rank in on_ranks(tmp_path / "log", *command, "--resume")] == [0, 0]
        compress("quantize", tiny, "--out", tmp_path / "one", *TWO_BATCHES)
        assert contents(out, REPORTS) == contents(tmp_path / "one", REPORTS)

    def test_find_a_complete_run_complete(self, tiny: Path, out: Path, tmp_path: Path, compress: CommandLine) -> None:
        compress("quantize", tiny, "--out", out, *TWO_BATCHES)
        command = ("quantize", tiny, "--out", out, *TWO_BATCHES, "--resume")
        assert [rank.code for rank in on_ranks(tmp_path / "log", *command)] == [0, 0]


class TestAnErrorOnOneRank:
    """Both end, with status 2 and one sentence between them."""

    def test_of_a_place_that_is_taken_is_said_once(self, tiny: Path, out: Path, tmp_path: Path) -> None:
        out.mkdir()
        ranks = on_ranks(tmp_path / "log", "quantize", tiny, "--out", out, *TWO_BATCHES)
        assert [rank.code for rank in ranks] == [2, 2]
        assert re.fullmatch(r"error: .* exists already; .*\n", "".join(rank.err for rank in ranks))

    def test_of_too_little_text_for_two_is_said_once(self, tiny: Path, out: Path, tmp_path: Path) -> None:
        ranks = on_ranks(tmp_path / "log", "quantize", tiny, "--out", out, *ONE_BATCH)
        assert [rank.code for rank in ranks] == [2, 2]
        assert re.fullmatch(r"error: calibration: 1 batches .* for 2 processes; .*\n", "".join(rank.err for rank in ranks))

    def test_of_a_wrong_option_is_said_once(self, tiny: Path, out: Path, tmp_path: Path) -> None:
        ranks = on_ranks(tmp_path / "log", "quantize", tiny, "--out", out, "--bits", 9)
        assert [rank.code for rank in ranks] == [2, 2]
        assert re.fullmatch(r"error: .*bits: 9.*\n", "".join(rank.err for rank in ranks))

    def test_only_the_first_rank_can_meet_is_said_once(
        self, tiny: Path, out: Path, tmp_path: Path, compress: CommandLine
    ) -> None:
        fate = (dies_at_call, ("compressor.model.shards", "assemble"))
        Fork(tmp_path / "log", "quantize", tiny, "--out", out, *TWO_BATCHES, fate=fate).result()
        ranks = on_ranks(tmp_path / "log", "quantize", tiny, "--out", out, *TWO_BATCHES)
        assert [rank.code for rank in ranks] == [2, 2]
        assert re.fullmatch(r"error: .* finished parts of an interrupted run; .*\n", "".join(rank.err for rank in ranks))

    @pytest.mark.parametrize("rank", [0, 1])
    def test_in_the_middle_is_said_once(self, rank: int, tiny: Path, out: Path, tmp_path: Path) -> None:
        fates: list[Fate | None] = [None, None]
        fates[rank] = (fails_with, ("model.layers.0: no good; use another",))
        ranks = on_ranks(tmp_path / "log", "quantize", tiny, "--out", out, *TWO_BATCHES, fates=fates)
        assert [rank.code for rank in ranks] == [2, 2]
        assert "".join(rank.err for rank in ranks) == "error: model.layers.0: no good; use another\n"

    def test_that_kills_it_is_noticed_by_the_other(self, tiny: Path, out: Path, tmp_path: Path) -> None:
        fates = (None, (dies_at_call, ("compressor.pipeline.blocks", "compress_block")))
        first, second = on_ranks(tmp_path / "log", "quantize", tiny, "--out", out, *TWO_BATCHES, fates=fates)
        assert second.code == -signal.SIGKILL
        assert "lost the connection" in first.late_error

    def test_leaves_no_result(self, tiny: Path, out: Path, tmp_path: Path) -> None:
        fates = (None, (dies_at_call, ("compressor.pipeline.blocks", "compress_block")))
        on_ranks(tmp_path / "log", "quantize", tiny, "--out", out, *TWO_BATCHES, fates=fates)
        assert not out.exists()

    def test_under_torchrun_is_said_once(self, tiny: Path, out: Path, torchrun: Launcher) -> None:
        out.with_name("out.partial").touch()  # a file where the first rank wants a directory
        result = torchrun("quantize", tiny, "--out", out, *TWO_BATCHES)
        assert result.returncode != 0
        assert len(re.findall("^error: ", result.stderr, re.MULTILINE)) == 1
        assert "[rank" not in result.stderr  # how torch marks a rank's traceback
        assert result.stderr.splitlines()[-1].startswith("error: "), result.stderr

    def test_that_kills_one_under_torchrun_ends_with_how_to_resume(
        self, tiny: Path, out: Path, tmp_path: Path, compress: CommandLine
    ) -> None:
        compress("quantize", tiny, "--out", tmp_path / "one", *FOUR_BATCHES)
        launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "compressor")
        command = [*launcher, "quantize", *map(str, (tiny, "--out", out, *FOUR_BATCHES))]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as started:
            journal, deadline = out.with_name("out.partial") / "work" / "journal.jsonl", time.monotonic() + DEADLINE
            while not journal.exists():
                assert time.monotonic() < deadline
                time.sleep(0.02)
            ranks = psutil.Process(started.pid).children()
            next(rank for rank in ranks if rank.environ()["RANK"] == "1").kill()
            assert started.stderr is not None
            said = started.stderr.read().splitlines()[-1]
        assert f"resume with: {shlex.join([*command, '--resume'])}" in said
        assert not out.exists()
        assert compress("quantize", tiny, "--out", out, *FOUR_BATCHES, "--resume").code == 0
        assert contents(out, REPORTS) == contents(tmp_path / "one", REPORTS)
