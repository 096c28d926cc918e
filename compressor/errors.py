"""Errors a user can cause and fix. Anything else is a bug and stays an assert or a plain exception.

* CompressorError
  x RecipeError        the recipe or the command line does not describe a run
  x SourceError        the checkpoint cannot be read, or holds what cannot be compressed
  x CalibrationError   the data does not determine the statistics a pass needs
  x OutputError        the result cannot be written where it was asked for
  x KernelError        a kernel that was asked for is missing or cannot do what it should
  x LostRankError      another rank has ended; if it could say why, it has
"""


class CompressorError(Exception):
    """Base class; the CLI prints its message without a traceback and exits with its status."""

    status = 2  # could not run; 1 is for a check that failed


class RecipeError(CompressorError): ...


class SourceError(CompressorError): ...


class CalibrationError(CompressorError): ...


class OutputError(CompressorError): ...


class KernelError(CompressorError): ...


class LostRankError(CompressorError): ...
