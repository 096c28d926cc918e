"""Stock transformers in a process of its own, without an interpreter that imports it anew each time.

A verification asks a new process what transformers alone makes of a model, and most of what that takes is importing torch and
transformers. Here that process is forked from one that has done so once, and nothing of this package.
"""

import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

PRELOADED = (
    "torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "compressed_tensors",
)


class StockServer:
    """Stands for the module `subprocess` where verification starts that process."""

    DEVNULL = subprocess.DEVNULL

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def run(self, command: Sequence[str], *, env: Mapping[str, str], **options: Any) -> subprocess.CompletedProcess[str]:
        """What `subprocess.run` would give for a Python script and its arguments."""
        if self.process is None:
            server = [sys.executable, "-P", __file__]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self.process = subprocess.Popen(server, text=True, env={**env, "OMP_NUM_THREADS": "1"}, **pipes)  # type: ignore[call-overload]
        assert self.process is not None
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"argv": list(command[2:]), "env": dict(env)}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return subprocess.CompletedProcess(command, answer["code"], "", answer["errors"])

    def close(self) -> None:
        """End it."""
        if self.process is not None:
            self.process.communicate()


def serve() -> None:
    """A fork for each line."""
    for name in PRELOADED:
        importlib.import_module(name)
    assert not any(name.partition(".")[0] == "compressor" for name in sys.modules)
    for line in sys.stdin:
        asked = json.loads(line)
        with tempfile.TemporaryFile("w+") as errors:
            child = os.fork()
            if child == 0:
                os._exit(_script(asked["argv"], asked["env"], errors.fileno()))
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            errors.seek(0)
            sys.stdout.write(json.dumps({"code": code, "errors": errors.read()}) + "\n")
            sys.stdout.flush()


def _script(argv: Sequence[str], env: Mapping[str, str], errors: int) -> int:
    """Run it here; the exit status."""
    os.dup2(errors, sys.stderr.fileno())
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.argv = list(argv)
    os.environ.clear()
    os.environ |= env
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        return 1
    return 0


if __name__ == "__main__":
    serve()
