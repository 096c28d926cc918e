"""Time that a search may take, when all that it is a part of may take only so long."""

import math
import time
from dataclasses import dataclass, replace

from compressor.pipeline.ranks import Ranks

MEASURING = 0.6  # of the time, at most, goes into levels; a choice among few is improved in less
WRITING = 2.0  # writing a model takes this many times what one level of all units took: packing, verifying
JUDGING = 3.0  # judging the result takes this many times what one choice takes on as much text: two models, all of the logits
TRAINING = 4.0  # a sample trains all blocks in this many times what one choice takes on it: forward, backward, latents
TRAINED = 0.4  # of what is left for search and training, at most, goes into training


@dataclass(frozen=True)
class Clock:
    """The time left until a deadline, the same on all ranks.

    Args:
        deadline: Deadline on the clock of `time.monotonic` of the first rank.
        reserve: Seconds before it that are for what comes after.
        ranks: The ranks that share the clock.
    """

    deadline: float
    reserve: float
    ranks: Ranks

    @classmethod
    def of(cls, minutes: float | None, started: float, ranks: Ranks) -> "Clock":
        """For work that began at `started` and may take some minutes, or any number of them."""
        return cls(math.inf if minutes is None else started + 60 * minutes, 0.0, ranks)

    def keeping(self, seconds: float) -> "Clock":
        """With more in reserve."""
        return replace(self, reserve=self.reserve + seconds)

    def left(self) -> float:
        """Seconds, which may be negative; without a deadline, infinite."""
        if math.isinf(self.deadline):
            return math.inf
        return self.ranks.agree(self.deadline - self.reserve - time.monotonic())
