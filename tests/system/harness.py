"""What the system tests share: a tiny model, the command line in this process, and processes that may die.

A fresh process spends seconds on importing torch and transformers, so processes are forked from a server that has done so
once. They are real processes: they can be killed, limited and joined into a group of ranks.
"""

import importlib
import json
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

DEADLINE = 240  # seconds after which something hangs
MAX_POSITIONS = 256
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["compressor.api", "compressor.cli", "compressor.runtime.load", "datasets"])

TEXT = "\n\n".join(
    f"def power_{n}(base):\n    '''The base to the power of {n}, in {n * n} steps at most.'''\n    return base ** {n}"
    for n in range(1500)
)


def build_model(path: Path, *, vocab_size: int = 300, seed: int = 0, blocks: int = 4) -> Path:
    """A random Llama with its tokenizer, and other files such as a model directory has."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=vocab_size,
        max_position_embeddings=MAX_POSITIONS,
        dtype=torch.float32,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([TEXT], vocab_size=300, special_tokens=["<end>"], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<end>", bos_token="<end>").save_pretrained(path)
    (path / "README.md").write_text("# tiny\n\nThe card of the original.\n")
    (path / "LICENSE").write_bytes(b"do as you like\r\n")
    (path / "notes").mkdir()
    (path / "notes" / "history.json").write_text('{"made": "for tests"}')
    return path


def contents(directory: Path, but: Sequence[str] = ()) -> dict[str, bytes]:
    """Every file below a directory, by its path in there."""
    files = {file.relative_to(directory).as_posix(): file for file in sorted(directory.rglob("*")) if file.is_file()}
    return {name: file.read_bytes() for name, file in files.items() if name not in but}


@dataclass(frozen=True)
class Result:
    """What a command answered."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one sentence of a command that refused at once."""
        assert (self.code, self.out) == (2, ""), self
        assert self.err.startswith("error: "), self.err
        assert self.err.count("\n") == 1, self.err
        return self.err.removeprefix("error: ").rstrip()

    @property
    def late_error(self) -> str:
        """The sentence of a command that had begun to work."""
        assert (self.code, self.out) == (2, ""), self
        last = self.err.splitlines()[-1]
        assert [line for line in self.err.splitlines() if "rror" in line] == [last], self.err
        assert last.startswith("error: "), self.err
        return last.removeprefix("error: ")

    @property
    def json(self) -> dict[str, Any]:
        """The object that --json prints."""
        assert self.code == 0, self.err
        answer = json.loads(self.out)
        assert isinstance(answer, dict)
        return answer


def command(arguments: Sequence[object]) -> int:
    """Exit status of `compress ARGUMENTS` in this process."""
    from compressor.cli import main

    before, sys.argv = sys.argv, ["compress", *map(str, arguments)]
    try:
        main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        sys.argv = before
    return 0


class CommandLine:
    """`compress ARGUMENTS` in this process."""

    def __init__(self, captured: pytest.CaptureFixture[str]) -> None:
        self.captured = captured

    def __call__(self, *arguments: object) -> Result:
        self.captured.readouterr()
        code = command(arguments)
        out, err = self.captured.readouterr()
        return Result(code, out, err)


# What may befall a forked command, as picklable calls to be made before it starts.

Fate = tuple[Callable[..., None], tuple[Any, ...]]


def dies_at_rename(name: str, after: bool) -> None:
    """Kill this process when a file or directory is about to be given this name, or has just been."""
    rename = Path.rename

    def dying(self: Path, target: Path) -> Path:
        if Path(target).name == name and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        renamed = rename(self, target)
        if Path(target).name == name:
            os.kill(os.getpid(), signal.SIGKILL)
        return renamed

    Path.rename = dying  # type: ignore[method-assign,assignment]


def dies_at_call(module: str, function: str) -> None:
    """Kill this process when a function is called."""
    setattr(importlib.import_module(module), function, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))


def stops_at_third_block() -> None:
    """Wait for ever once two blocks are done."""
    from compressor.pipeline import blocks

    work, calls = blocks.compress_block, []

    def stopping(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) > 2:
            signal.pause()
        return work(*arguments)

    blocks.compress_block = stopping


def may_write(count: int) -> None:
    """Have every write beyond so many bytes of a file fail, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, count))


def fails_with(message: str) -> None:
    """Raise an error that a user can mend, when the first block is to be compressed."""
    from compressor.errors import CalibrationError
    from compressor.pipeline import blocks

    def failing(*_: Any) -> Any:
        raise CalibrationError(message)

    blocks.compress_block = failing


def _forked(arguments: Sequence[object], log: Path, fate: Fate | None, environment: dict[str, str]) -> None:
    import torch

    for descriptor, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(f"{log}{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.environ |= environment
    torch.set_num_threads(1)
    torch.cuda.is_available = lambda: False
    if fate is not None:
        fate[0](*fate[1])
    code = command(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


class Fork:
    """`compress ARGUMENTS` in a process of its own."""

    def __init__(
        self, log: Path, *arguments: object, fate: Fate | None = None, environment: dict[str, str] | None = None
    ) -> None:
        self.log = log
        self.process: BaseProcess = FORKS.Process(target=_forked, args=(arguments, log, fate, environment or {}))
        self.process.start()

    def result(self) -> Result:
        """Wait for its end."""
        self.process.join(DEADLINE)
        if self.process.exitcode is None:
            self.process.kill()
            pytest.fail(f"hangs: {self.log}")
        return Result(self.process.exitcode, *(Path(f"{self.log}{suffix}").read_text() for suffix in (".out", ".err")))


def on_ranks(log: Path, *arguments: object, fates: Sequence[Fate | None] = (None, None)) -> list[Result]:
    """The same command on several ranks, as torchrun starts it; each with its fate."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # where they meet
    common = {
        "WORLD_SIZE": str(len(fates)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    forks = [
        Fork(
            log.with_name(f"{log.name}-{rank}"),
            *arguments,
            fate=fate,
            environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, fate in enumerate(fates)
    ]
    return [fork.result() for fork in forks]
