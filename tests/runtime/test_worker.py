"""A thing in a process of its own: how its end is told, and that it does end."""

import multiprocessing
import os
import signal
import time

import psutil
import pytest
from doomed import Doomed, refuse_to_be_made

from compressor.errors import CompressorError, RecipeError, SourceError
from compressor.runtime.worker import started


def children() -> list[int]:
    """Processes that multiprocessing has started and that have not ended."""
    return [child.pid for child in multiprocessing.active_children() if child.pid is not None]


class TestWorker:
    @pytest.mark.parametrize(
        ("method", "argument", "sentence"),
        [
            ("by_signal", signal.SIGKILL, "model-int4: its process was ended by SIGKILL during by_signal.* lower --batch"),
            ("by_signal", signal.SIGSEGV, "model-int4: its process was ended by SIGSEGV"),
            ("by_exit", 3, "model-int4: its process ended with exit status 3"),
        ],
    )
    def test_a_death_is_told_with_its_cause_and_a_remedy(self, method: str, argument: int, sentence: str) -> None:
        with started("model-int4", Doomed) as worker, pytest.raises(RecipeError, match=sentence):
            worker.ask(method, argument)

    def test_memory_that_is_not_there_is_told_as_such_and_the_worker_lives_on(self) -> None:
        with started("model-int4", Doomed) as worker:
            with pytest.raises(RecipeError, match=r"model-int4: not enough memory during out_of_memory .* lower --batch"):
                worker.ask("out_of_memory")
            assert worker.ask("pid") in children()

    def test_a_bug_comes_with_its_traceback(self) -> None:
        with started("model-int4", Doomed) as worker, pytest.raises(RuntimeError, match="the name of a bug") as caught:
            worker.ask("by_mistake")
        assert not isinstance(caught.value, CompressorError)

    def test_an_error_of_the_making_is_raised_here(self) -> None:
        with (
            pytest.raises(SourceError, match="not a model"),
            started("model-int4", refuse_to_be_made, "not a model"),
        ):
            pytest.fail("it was made")
        assert children() == []

    def test_an_interrupt_ends_the_workers_through_the_parent_only(self) -> None:
        """Ctrl-C goes to all of them: a worker does not heed it, and the parent's end is the end of them all."""
        with pytest.raises(KeyboardInterrupt), started("model-int4", Doomed) as worker:
            pid = worker.ask("pid")
            os.kill(pid, signal.SIGINT)
            assert worker.ask("pid") == pid
            raise KeyboardInterrupt
        assert not psutil.pid_exists(pid)

    def test_a_worker_ends_when_the_parent_is_gone_without_a_word(self) -> None:
        with started("model-int4", Doomed) as worker:
            process = psutil.Process(worker.ask("pid"))
            worker._connection.close()
            for _ in range(600):
                if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                    break
                time.sleep(0.1)
            else:
                pytest.fail("it is still there")
