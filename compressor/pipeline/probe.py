"""The probe: a few tokens sent through the model while a run has it in memory, and the resulting logits.

The probe passes through each block right after its new weights are installed, in the run's dtype, just as the calibration
text does. So its record shows what the model should compute, independently of how files are written and read later.

Shape suffixes: S positions, K of the likeliest tokens, D hidden, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressor.errors import SourceError
from compressor.model.block import Block
from compressor.model.source import ModelSource

LENGTH = 32
STRIDE = 7919  # a prime far from any regular structure of a vocabulary
KEPT = 16  # likeliest tokens kept per position: they hold nearly all of the probability and little of the noise
DIGITS = 6  # decimals of the stored log-probabilities


@dataclass(frozen=True)
class Record:
    """The log-probabilities of the likeliest tokens after each token of the probe."""

    tokens: tuple[int, ...]
    dtype: str  # dtype of the computation
    ids_SK: Tensor
    log_probs_SK: Tensor  # fp64

    @classmethod
    def of(cls, tokens_1S: Tensor, dtype: torch.dtype, logits_SV: Tensor) -> "Record":
        """Make a record of logits."""
        log_probs = logits_SV.double().log_softmax(-1)
        top = log_probs.topk(min(KEPT, log_probs.shape[-1]))
        return cls(tuple(tokens_1S[0].tolist()), str(dtype).removeprefix("torch."), top.indices.cpu(), top.values.cpu())

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Record":
        """Invert `to_dict`.

        Raises:
            ValueError, LookupError, TypeError: the data is not a record.
        """
        tokens, rows = data["tokens"], data["logits"]["ids"]
        for number in (*tokens, *(number for row in rows for number in row)):
            if type(number) is not int or not 0 <= number < 2**31:
                raise ValueError(f"{number!r} is no token")
        ids, values = torch.tensor(rows), torch.tensor(data["logits"]["log_probabilities"], dtype=torch.float64)
        if ids.numel() == 0 or ids.dim() != 2 or ids.shape != values.shape or len(ids) != len(tokens):
            raise ValueError(f"{len(tokens)} tokens, {list(ids.shape)} ids, {list(values.shape)} values")
        return cls(tuple(tokens), str(data["dtype"]), ids, values)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        values = [[round(value, DIGITS) for value in row] for row in self.log_probs_SK.tolist()]
        logits = {"ids": self.ids_SK.tolist(), "log_probabilities": values}
        return {"tokens": list(self.tokens), "dtype": self.dtype, "logits": logits}

    def difference(self, logits_SV: Tensor) -> float:
        """Return the mean absolute difference from the recorded log-probabilities, in nats.

        It is infinite if a log-probability is not a number, or if a recorded token is outside the vocabulary.
        """
        if int(self.ids_SK.max()) >= logits_SV.shape[-1]:
            return float("inf")
        found = logits_SV.double().log_softmax(-1).cpu().gather(-1, self.ids_SK)
        return float((found - self.log_probs_SK).abs().nan_to_num(nan=torch.inf).mean())


class Probe:
    """The state of the probe between two blocks. If the model cannot be streamed, `obstacle` holds the reason."""

    def __init__(self, source: ModelSource) -> None:
        self.source, self.tokens_1S = source, probe_tokens(source)
        self.obstacle: str | None = None  # reason why there will be no record
        self._hidden_1SD: Tensor | None = None
        try:
            self._hidden_1SD = source.first_inputs([self.tokens_1S])[0]
        except SourceError as error:
            self.obstacle = str(error)

    @torch.no_grad()
    def advance(self, block: Block) -> None:
        """Send the probe through a block with its current weights."""
        if self._hidden_1SD is None:
            return
        try:
            out = block.forward(self._hidden_1SD.to(self.source.device))
        except SourceError as error:
            self._stop(str(error))
            return
        if torch.isfinite(out).all():
            self._hidden_1SD = out.cpu()
        else:
            self._stop(f"{block.prefix}: its output is not finite in {self.source.dtype}")

    def record(self) -> Record | None:
        """Return the record of the model's logits, after all blocks; None if there can be no record."""
        if self._hidden_1SD is None:
            return None
        try:
            (logits_1SV,) = self.source.logits([self._hidden_1SD])
        except SourceError as error:
            self._stop(str(error))
            return None
        if logits_1SV.isnan().any():
            self._stop(f"{self.source.path}: its logits are not finite in {self.source.dtype}")
            return None
        return Record.of(self.tokens_1S, self.source.dtype, logits_1SV[0])

    def _stop(self, obstacle: str) -> None:
        self.obstacle, self._hidden_1SD = obstacle, None


def probe_tokens(source: ModelSource) -> Tensor:
    """Return a few tokens [1, S], spread over the vocabulary. Models of one vocabulary size get the same tokens."""
    length = min(LENGTH, source.max_positions)
    return torch.tensor([[(1 + i * STRIDE) % source.vocab_size for i in range(length)]])
