"""Errors a user can cause and fix. Anything else is a bug and stays an assert or a plain exception.

* CompressorError
  x RecipeError        the recipe or the command line does not describe a run
  x SourceError        the checkpoint cannot be read, or holds what cannot be compressed
  x CalibrationError   the data does not determine the statistics a pass needs
  x OutputError        the result cannot be written where it was asked for
  x KernelError        a kernel that was asked for is missing or cannot do what it should
  x LostRankError      another rank has ended; if it could say why, it has
"""

MAX_MESSAGE = 300  # characters


class CompressorError(Exception):
    """Base class; the CLI prints its message without a traceback and exits with its status.

    Args:
        message: One sentence. Of one that is too long the middle is left out: its start names the place, its end the remedy.
            Characters that do not print become spaces: values from files could break the line or steer a terminal.
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
