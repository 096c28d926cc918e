"""The time that a search may take if the complete run has a time limit."""

import math
import time
from dataclasses import dataclass, replace

from compressor.pipeline.ranks import Ranks

MEASURING = 0.6  # largest share of the time for measuring levels; fewer levels leave less to improve afterwards
WRITING = 2.0  # time to write a model, relative to making one level of all units: includes packing and verifying
JUDGING = 3.0  # time to evaluate the result, relative to scoring one choice on the same text: two models, all logits
TRAINING = 4.0  # time to train all blocks on a sample, relative to scoring one choice on it: forward, backward, latents
TRAINED = 0.4  # largest share for training of the time left for search and training


@dataclass(frozen=True)
class Clock:
    """The time left until a deadline, the same on all ranks.

    Args:
        deadline: Deadline on the first rank's clock (`time.monotonic`).
        reserve: Seconds before the deadline that are reserved for later work.
        ranks: The ranks that share the clock.
    """

    deadline: float
    reserve: float
    ranks: Ranks

    @classmethod
    def of(cls, minutes: float | None, started: float, ranks: Ranks) -> "Clock":
        """Return the clock of work that began at `started` and may take `minutes`; None for no limit."""
        return cls(math.inf if minutes is None else started + 60 * minutes, 0.0, ranks)

    def keeping(self, seconds: float) -> "Clock":
        """Return a clock with more seconds in reserve."""
        return replace(self, reserve=self.reserve + seconds)

    def left(self) -> float:
        """Return the seconds left. They may be negative; without a deadline they are infinite."""
        if math.isinf(self.deadline):
            return math.inf
        return self.ranks.agree(self.deadline - self.reserve - time.monotonic())
