"""Requests of lm-evaluation-harness as tokens, by its conventions.

Spaces that end a context belong to the continuation; context and continuation are tokenised as one text, of which the
context's number of tokens is cut off; an empty context is the begin token, or the end token where there is none. What is
too long for the model loses its beginning. (The harness's own models keep one token more, which they do not feed.)
"""

import torch
from transformers import PreTrainedTokenizerBase

from compressor.errors import RecipeError
from compressor.evaluation.score import Passage


class Encoder:
    """Tokenises each request once, for as many models as there are."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if begin is None:
            raise RecipeError(
                "tasks: the tokenizer has neither a begin nor an end token to start a text with; set one of them"
            )
        self.begin = int(begin)
        self._begin_text = tokenizer.decode([self.begin])
        self._pairs: dict[tuple[str, str], Passage] = {}
        self.cut: set[str] = set()  # contexts that lost their beginning

    def ids(self, text: str) -> list[int]:
        """Tokens of a text; the begin token where the tokenizer puts one, but not twice."""
        return self._ids(text, special=not text.startswith(self._begin_text))

    def pair(self, context: str, continuation: str) -> Passage:
        """A continuation to be predicted from its context.

        Raises:
            RecipeError: the continuation has no token of its own, or more than the model takes.
        """
        known = self._pairs.get((context, continuation))
        if known is None:
            known = self._pairs[context, continuation] = self._pair(context, continuation)
        return known

    def _pair(self, context: str, continuation: str) -> Passage:
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        if not kept:
            predicted = self._ids(continuation, special=False)
            before, predicted = ([self.begin], predicted) if predicted[:1] != [self.begin] else (predicted[:1], predicted[1:])
        else:
            before = self.ids(kept)
            predicted = self.ids(kept + continuation)[len(before) :]
        if not 1 <= len(predicted) < self.max_length:
            raise RecipeError(
                f"tasks: {continuation[:40]!r} after {context[-40:]!r} has {len(predicted)} tokens of its own where "
                f"1 … {self.max_length - 1} can be judged; leave the task out"
            )
        self._note_cut(context, len(before) + len(predicted), self.max_length)
        tokens = torch.tensor([*before, *predicted])[-self.max_length :]
        return Passage(tokens, len(tokens) - len(predicted))

    def rolling(self, text: str) -> list[Passage]:
        """All of a text to be predicted, in windows that share nothing but what is needed to fill the last."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows = get_rolling_token_windows(
            token_list=self.ids(text), prefix_token=self.begin, max_seq_len=self.max_length - 1, context_len=1
        )
        disjoint = [make_disjoint_window(window) for window in windows]
        return [Passage(torch.tensor([*before, *predicted]), len(before)) for before, predicted in disjoint]

    def prompt(self, context: str, max_tokens: int) -> list[int]:
        """A context that is to be continued by so many tokens.

        Raises:
            RecipeError: the model is not made for as many.
        """
        if max_tokens >= self.max_length:
            raise RecipeError(
                f"tasks: answers of up to {max_tokens} tokens are to be written where the model was made for "
                f"{self.max_length}; leave the task out"
            )
        ids, room = self.ids(context) or [self.begin], self.max_length - max_tokens
        self._note_cut(context, len(ids), room)
        return ids[-room:]

    def _note_cut(self, context: str, length: int, room: int) -> None:
        if length > room:
            self.cut.add(context)

    def _ids(self, text: str, special: bool) -> list[int]:
        return [int(one) for one in self.tokenizer.encode(text, add_special_tokens=special, verbose=False)]
