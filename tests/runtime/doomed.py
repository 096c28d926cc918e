"""What worker processes are made to hold in tests: imports nothing heavy, so they start at once."""

import os

from compressor.errors import SourceError


class Doomed:
    """Stands for a model in a worker: ends as it is told to."""

    def by_signal(self, number: int) -> None:
        """Die of a signal."""
        os.kill(os.getpid(), number)

    def by_exit(self, status: int) -> None:
        """Leave at once."""
        os._exit(status)

    def out_of_memory(self) -> None:
        """Ask torch for more than any machine has."""
        import torch

        torch.empty(2**60, dtype=torch.uint8)

    def by_mistake(self) -> None:
        """Have a bug."""
        raise KeyError("the name of a bug")

    def pid(self) -> int:
        """Of the process that it lives in."""
        return os.getpid()


def refuse_to_be_made(reason: str) -> None:
    """Raise an error that a user can mend."""
    raise SourceError(reason)
