"""Greedy continuations of prompts, several at a time.

Prompts are padded on the left, so that all of a batch continue at the same place. Shape suffixes: B prompts, S sequence.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from compressor.model.generation import generate_plainly

AT_ONCE = 16  # prompts


@torch.no_grad()
def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    stops: Sequence[str],
    max_tokens: int,
) -> list[str]:
    """Return a model's continuation of each prompt, up to the first stop text or the end token.

    Args:
        model: The whole of it, in memory.
        tokenizer: The model's.
        prompts: Tokens, none empty.
        stops: Texts.
        max_tokens: At most so many.
    """
    length = max(map(len, prompts))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    ids_BS = torch.tensor([[pad] * (length - len(ids)) + list(ids) for ids in prompts])
    mask_BS = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts])
    end = [tokenizer.decode([tokenizer.eos_token_id])] if tokenizer.eos_token_id is not None else []
    generate_plainly(model)
    out = model.generate(
        ids_BS.to(model.device),
        attention_mask=mask_BS.to(model.device),
        max_new_tokens=max_tokens,
        pad_token_id=pad,
        stopping_criteria=StoppingCriteriaList([_Stop(tokenizer, [*stops, *end], length)]),
    )
    texts = tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)
    return [_cut(text, stops) for text in texts]


def _cut(text: str, stops: Sequence[str]) -> str:
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


class _Stop(StoppingCriteria):  # type: ignore[misc]
    """Ends a continuation that holds a stop text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], first: int) -> None:
        self.tokenizer, self.stops, self.first = tokenizer, stops, first
        self.tail = max((len(stop.encode()) for stop in stops), default=0) + 1  # tokens: each has at least one byte

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        written = self.tokenizer.batch_decode(input_ids[:, self.first :][:, -self.tail :])
        return torch.tensor([any(stop in text for stop in self.stops) for text in written], device=input_ids.device)
