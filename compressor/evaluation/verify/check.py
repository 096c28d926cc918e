"""One thing that was looked at, and what was found."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from compressor.errors import CompressorError

Outcome = Literal["passed", "failed", "skipped"]
Progress = Callable[[int, int, str], None]  # done, total, what


@dataclass(frozen=True, slots=True)
class Check:
    """The answer to one question about a directory."""

    check: str
    outcome: Outcome
    detail: str  # what was found, with its figures; why, if it was skipped

    def to_dict(self) -> dict[str, str]:
        """Plain data for JSON."""
        return {"check": self.check, "outcome": self.outcome, "detail": self.detail}


class WrongError(CompressorError):
    """The directory does not hold what it should. What to do about that, whoever asked knows."""

    status = 1


class NotCheckedError(CompressorError):
    """There is nothing to check, or nothing to check it with."""


def attempt(check: str, work: Callable[[], str]) -> Check:
    """Do one check: `work` returns what it found, or raises."""
    try:
        return Check(check, "passed", work())
    except NotCheckedError as error:
        return Check(check, "skipped", str(error))
    except CompressorError as error:
        return Check(check, "failed", str(error))


def refuse(problems: Sequence[str]) -> None:
    """Say the first of some problems and how many there are.

    Raises:
        WrongError: there is a problem.
    """
    if problems:
        raise WrongError(problems[0] + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""))
