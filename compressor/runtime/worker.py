"""A process of its own for each thing that is measured, so that its memory and its threads are its own.

The parent sends what to make and then the methods to call; the worker makes it, calls them one by one and sleeps in between.
This module imports nothing heavy, so a new process is deaf to signals before it spends seconds on importing torch.
"""

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from compressor.errors import CompressorError, RecipeError

REMEDY = "lower --batch or --prompt-len, or measure one model without --reference"


class Worker:
    """The parent's end: something that lives in another process and answers questions."""

    def __init__(self, where: str, process: BaseProcess, connection: "Connection[Any, Any]") -> None:
        self.where = where  # for messages
        self._process, self._connection = process, connection

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of the thing, and return its result.

        Raises:
            CompressorError: the method raised one, memory ran out, or the process died.
        """
        return self.call(method, arguments, method)

    def call(self, what: Any, arguments: tuple[Any, ...], doing: str) -> Any:
        """Send one message and wait for its answer."""
        try:
            self._connection.send((what, arguments))
            outcome, value = self._connection.recv()
        except (EOFError, OSError) as error:
            raise RecipeError(self._death(doing)) from error
        if outcome == "error":
            raise value
        if outcome == "memory":
            raise RecipeError(f"{self.where}: not enough memory during {doing} ({value}); {REMEDY}")
        if outcome == "bug":
            raise RuntimeError(f"{self.where}: in its process:\n{value}")
        return value

    def _death(self, doing: str) -> str:
        self._process.join()
        code = self._process.exitcode or 0
        if code == -signal.SIGKILL:
            return f"{self.where}: its process was ended by SIGKILL during {doing}, as if memory had run out; {REMEDY}"
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
        return f"{self.where}: its process {how} during {doing}; what it wrote to stderr may say why, else {REMEDY}"


@contextmanager
def started(where: str, make: Callable[..., object], *arguments: Any) -> Iterator[Worker]:
    """A worker that has made its thing; it ends with the context, however that is left.

    Args:
        where: Name of the thing, for messages.
        make: Called in the new process; importable by name.
        arguments: Arguments of `make`.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()  # else the end of the process would not be seen
    try:
        worker = Worker(where, process, ours)
        worker.call(make, arguments, "loading")
        yield worker
    finally:
        process.kill()  # it holds nothing that must be kept
        process.join()
        ours.close()


def serve(connection: "Connection[Any, Any]") -> None:
    """The life of a worker, until the parent is gone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they reach the whole group; the parent ends its workers
    thing: Any = None
    try:
        while True:
            what, arguments = connection.recv()
            if isinstance(what, str):
                connection.send(_attempt(getattr(thing, what), arguments))
            else:
                outcome, thing = _attempt(what, arguments)
                connection.send((outcome, None if outcome == "done" else thing))
    except (EOFError, OSError):
        return  # nobody is there any more


def _attempt(work: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[str, Any]:
    """How a call ended and what came of it."""
    try:
        return "done", work(*arguments)
    except CompressorError as error:
        return "error", error
    except Exception as error:
        from torch import OutOfMemoryError

        if isinstance(error, MemoryError | OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            return "memory", (str(error).splitlines() or ["MemoryError"])[0]
        return "bug", traceback.format_exc()
