"""End a command in order when a signal or a closed pipe ends it.

SIGINT, SIGTERM and SIGHUP raise `Interrupted` in the main thread, so that locks are released and processes that were started
are ended. The command then writes one sentence, with the command that resumes, and exits with 128 + the signal's number.
A second signal ends the process at once. What is on disk can be resumed at every moment, so nothing is lost by that.
"""

import functools
import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec

from compressor.cli._again import again
from compressor.cli._say import say, under_torchrun
from compressor.cli._show import opening

P = ParamSpec("P")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PATIENCE = 10.0  # seconds that a command has to end by itself after a signal


class Interrupted(KeyboardInterrupt):
    """A signal asks the command to end.

    Args:
        number: Number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number

    def __str__(self) -> str:
        by_launcher = self.status == 128 + signal.SIGTERM and under_torchrun()
        sender = ", which torchrun sends when another rank has ended" if by_launcher else ""
        return f"interrupted by {self.args[0]}{sender}; {again()}"


def ending(verb: Callable[P, None]) -> Callable[P, None]:
    """Return a verb that ends as this module says when it is interrupted."""

    @functools.wraps(verb)
    def guarded(*arguments: P.args, **options: P.kwargs) -> None:
        try:
            with caught(), opening():
                verb(*arguments, **options)
        except KeyboardInterrupt as stop:
            interrupted = stop if isinstance(stop, Interrupted) else Interrupted(signal.SIGINT)
            say(str(interrupted))
            raise SystemExit(interrupted.status) from None

    return guarded


@contextmanager
def caught() -> Iterator[None]:
    """Raise `Interrupted` in the main thread when a signal of `SIGNALS` arrives.

    Signals that the process was told to ignore stay ignored, as `nohup` wants SIGHUP to be.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers can be set by the main thread alone
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}
    fd_before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    watch = threading.Thread(target=_end_late, args=(reading,), daemon=True)
    watch.start()
    try:
        for number in before:
            signal.signal(number, _interrupt)
        yield
    except BaseException:
        if under_torchrun():  # it ends all ranks as soon as one has failed, but this one still has something to say
            before = dict.fromkeys(before, signal.SIG_IGN)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(fd_before)
        os.close(writing)  # ends the thread
        watch.join()
        os.close(reading)


def _interrupt(number: int, _: object) -> None:
    for other in SIGNALS:
        if signal.getsignal(other) is _interrupt:
            # A second signal ends the process wherever it is. torchrun sends one of its own after the user's.
            signal.signal(other, signal.SIG_IGN if under_torchrun() else signal.SIG_DFL)
    raise Interrupted(number)


def _end_late(reading: int) -> None:
    """End the process if the main thread does not do so in time after a signal, or if a second signal arrives.

    Python handles a signal only between two of its own instructions. A rank that waits for another one, or a long operation
    of torch, would hold it up.
    """
    number = os.read(reading, 1)
    if not number:
        return  # the command has ended
    ended, _, _ = select.select([reading], [], [], PATIENCE)
    if ended and not os.read(reading, 1):
        return
    say(str(Interrupted(number[0])))
    os._exit(128 + number[0])
