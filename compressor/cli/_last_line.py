"""Run by `compressor.cli._say` in a process of its own: write a sentence to stderr once another process has ended.

    python _last_line.py PROCESS SENTENCE

torchrun writes a traceback of its own when a rank has failed, after all ranks have ended. This process outlives it.
"""

import os
import select
import sys
from contextlib import suppress

PATIENCE = 60.0  # seconds; torchrun gives ranks 30 to end


def wait(process: int) -> None:
    """Return when a process has ended, or after `PATIENCE`."""
    with suppress(OSError, AttributeError):  # it has ended already, or the system has no such descriptors
        select.select([os.pidfd_open(process)], [], [], PATIENCE)


if __name__ == "__main__":
    wait(int(sys.argv[1]))
    sys.stderr.write(f"{sys.argv[2]}\n")
