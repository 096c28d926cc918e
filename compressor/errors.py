"""Errors that a user can cause and fix. Anything else is a bug and raises an assert or a plain exception.

* CompressorError
  x RecipeError        the recipe or the command line does not describe a run
  x SourceError        the checkpoint cannot be read, or holds something that cannot be compressed
  x CalibrationError   the data does not determine the statistics that a pass needs
  x OutputError        the result cannot be written to the given place
  x KernelError        a requested kernel is missing or does not support the task
  x LostRankError      another rank has ended; that rank reports the cause if it can
"""

MAX_MESSAGE = 300  # characters


class CompressorError(Exception):
    """Base class. The CLI prints the message without a traceback and exits with the status.

    Args:
        message: One sentence. If it is too long, its middle is left out: the start names the place, the end the remedy.
            Unprintable characters become spaces, because values from files could break the line or control the terminal.
    """

    status = 2  # could not run; 1 is for a check that failed

    def __init__(self, message: str = "") -> None:
        printable = "".join(character if character.isprintable() else " " for character in message)
        super().__init__(shorten(printable, MAX_MESSAGE))


def shorten(text: str, limit: int) -> str:
    """Return a text of at most `limit` characters, its middle left out if it is longer."""
    if len(text) <= limit:
        return text
    tail = (limit - 1) // 2
    return f"{text[: limit - 1 - tail]}…{text[len(text) - tail :]}"


class RecipeError(CompressorError): ...


class SourceError(CompressorError): ...


class CalibrationError(CompressorError): ...


class OutputError(CompressorError): ...


class KernelError(CompressorError): ...


class LostRankError(CompressorError): ...
