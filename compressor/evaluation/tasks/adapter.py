"""Our models as lm-evaluation-harness sees them. Imports the harness: import this inside functions only."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.api.model import LM

from compressor.errors import RecipeError
from compressor.evaluation.score import Passage, Scores, score
from compressor.evaluation.tasks.encode import Encoder
from compressor.evaluation.tasks.generation import AT_ONCE, continuations
from compressor.evaluation.tasks.questions import LONGEST_ANSWER
from compressor.evaluation.tasks.subject import Subject
from compressor.evaluation.tasks.work import Work
from compressor.pipeline.calibration.data import check_vocabulary

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the harness knows all of them


def passages(encoder: Encoder, requests: Sequence[Any]) -> list[Passage]:
    """Return the passages that a model has to predict for requests of any kind but generation."""
    found: list[Passage] = []
    for request in requests:
        found += [encoder.pair(*request.args)] if request.request_type == "loglikelihood" else encoder.rolling(*request.args)
    return found


def expected(encoder: Encoder, requests: Sequence[Any], questions: int) -> Work:
    """Return the work that answering requests takes. Find requests that cannot be answered.

    Raises:
        RecipeError: a request that does not suit the model, or that is not for greedy decoding.
    """
    written = [request for request in requests if request.request_type == "generate_until"]
    read = passages(encoder, [request for request in requests if request.request_type != "generate_until"])
    tokens = sum(len(passage.tokens) for passage in read)
    lengths = [_length(request.args[1]) for request in written]
    tokens += sum(len(encoder.prompt(r.args[0], length)) for r, length in zip(written, lengths, strict=True))
    return Work(questions, tokens, sum(lengths), len(encoder.cut))


class Adapter(LM):  # type: ignore[misc]
    """Answers requests with one model, all of a kind at once: a streamed model is read once for as many as possible."""

    def __init__(self, subject: Subject, encoder: Encoder, tell: Callable[[int, int], None]) -> None:
        super().__init__()
        self.subject, self.encoder, self.tell = subject, encoder, tell

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation after its context, and whether greedy decoding writes it."""
        asked = passages(self.encoder, requests)
        return [
            (-float(scores.nll.sum()), torch.equal(scores.best, passage.tokens[passage.start :]))
            for passage, scores in zip(asked, self._score(asked), strict=True)
        ]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Return the log-likelihood of texts as a whole."""
        windows = [self.encoder.rolling(*request.args) for request in requests]
        scores = iter(self._score([window for of_text in windows for window in of_text]))
        return [-sum(float(next(scores).nll.sum()) for _ in of_text) for of_text in windows]

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Greedy continuations, up to the first of their stop texts."""
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        answers = [""] * len(requests)
        model = self.subject.whole()
        done = 0
        for members in alike.values():
            kwargs = requests[members[0]].args[1]
            until, length = kwargs.get("until") or [], _length(kwargs)
            prompts = {m: self.encoder.prompt(requests[m].args[0], length) for m in members}
            order = sorted(members, key=lambda m: -len(prompts[m]))
            for first in range(0, len(order), AT_ONCE):
                batch = order[first : first + AT_ONCE]
                stops = [until] if isinstance(until, str) else until
                texts = continuations(model, self.encoder.tokenizer, [prompts[m] for m in batch], stops, length)
                for member, text in zip(batch, texts, strict=True):
                    answers[member] = text
                done += len(batch)
                self.tell(done, len(requests))
        return answers

    def _score(self, asked: list[Passage]) -> list[Scores]:
        predictor = self.subject.predictor
        check_vocabulary(torch.cat([p.tokens for p in asked]), predictor.vocab_size, "tasks")
        return score([predictor], asked, tell=self.tell).models[0]


def _length(kwargs: dict[str, Any]) -> int:
    """Tokens of an answer, at most.

    Raises:
        RecipeError: answers are to be drawn at random.
    """
    if kwargs.get("do_sample") or float(kwargs.get("temperature") or 0.0) > 0:
        raise RecipeError("tasks: a task asks for answers drawn at random, here they are greedy; leave it out")
    return next((int(kwargs[name]) for name in LENGTHS if kwargs.get(name) is not None), LONGEST_ANSWER)
