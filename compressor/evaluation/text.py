"""Text to be judged on, cut into passages.

Two protocols. By default documents are joined and cut into samples of `seq_len` tokens, a new one every `stride` tokens; of
a sample that overlaps the one before, only the last `stride` tokens are predicted, so that no token is predicted twice.
Documents keep the order of their source (the built-in ones have a seeded one), and have the end token between them.
What a sample begins with is not predicted: it was cut out of a text, of which nothing is known yet. With `documents` each
document is a sample of its own, cut off at `seq_len` tokens. With `bos` every sample begins with the tokenizer's begin token,
which counts as one of its tokens and is never predicted; what follows it is, at the beginning of a document.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from compressor.errors import CalibrationError, RecipeError
from compressor.evaluation.score import Passage
from compressor.pipeline.calibration.data import Document, Split, documents, encode
from compressor.reading import elide

CHARACTERS = 64  # that a token stands for at most, on average: so much of a long text is tokenised


@dataclass(frozen=True)
class Protocol:
    """How text becomes predictions; without it a perplexity says little."""

    seq_len: int
    stride: int
    bos: bool
    documents: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Text:
    """One text, or one domain."""

    name: str
    split: Split
    passages: tuple[Passage, ...]
    bytes: int  # UTF-8, of what is predicted
    sha256: str  # of the tokens and of what is predicted


def make_protocol(
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    stride: int | None = None,
    bos: bool | None = None,
    *,
    one_by_one: bool = False,
) -> Protocol:
    """The protocol that some options ask for.

    Args:
        tokenizer: The model's.
        seq_len: Tokens of a sample.
        stride: New tokens of a sample; None for no overlap.
        bos: Begin every sample with the begin token; None does as the tokenizer does with a text.
        one_by_one: Each document is a sample.

    Raises:
        RecipeError: a stride that skips tokens or does not move, or no begin token to begin with.
    """
    begin = tokenizer.bos_token_id
    if bos and begin is None:
        raise RecipeError("bos: the tokenizer has no begin token; leave out --bos")
    if bos is None:
        bos = begin is not None and tokenizer("a", verbose=False)["input_ids"][0] == begin
    room = seq_len - bos
    if stride is not None and one_by_one:
        raise RecipeError("stride: documents are judged one by one, they do not overlap; leave out --stride or --documents")
    if stride is not None and not 1 <= stride <= room:
        raise RecipeError(f"stride {stride}: not in 1 … {room}, the new tokens that a sample has room for; change --stride")
    return Protocol(seq_len, stride or room, bos, one_by_one)


def load_text(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    protocol: Protocol,
    *,
    samples: int,
    seed: int = 0,
    split: Split = "all",
) -> Text:
    """Samples of a source.

    Args:
        source: See compressor.pipeline.calibration.data.
        tokenizer: The model's.
        protocol: How to cut it.
        samples: At most so many.
        seed: Seed of the order of documents.
        split: Split to take documents from.

    Raises:
        CalibrationError: the source cannot be read, or holds too little text.
    """
    begin = [tokenizer.bos_token_id] if protocol.bos else []
    rows = _documents if protocol.documents else _windows
    passages = tuple(rows(documents(source, seed, split), tokenizer, protocol, begin, samples))
    if not passages:
        least = "a document of 2 tokens" if protocol.documents else f"one sample of {protocol.seq_len}"
        which = "held-out " if split == "held-out" else ""
        raise CalibrationError(
            f"{elide(source, 100)}: its {which}text has not enough tokens for {least}; "
            "name a larger source, lower --seq-len, or when compressing give --no-eval"
        )
    digest = hashlib.sha256()
    for passage in passages:
        digest.update(passage.start.to_bytes(8, "little") + passage.tokens.numpy().tobytes())
    return Text(source, split, passages, sum(_bytes(tokenizer, passage) for passage in passages), digest.hexdigest())


def _documents(
    texts: Iterable[Document], tokenizer: PreTrainedTokenizerBase, protocol: Protocol, begin: list[int], samples: int
) -> Iterator[Passage]:
    for document in texts:
        if samples == 0:
            return
        ids = [*begin, *_ids(tokenizer, document)][: protocol.seq_len]
        if len(ids) >= 2:
            yield Passage(torch.tensor(ids))
            samples -= 1


def _windows(
    texts: Iterable[Document], tokenizer: PreTrainedTokenizerBase, protocol: Protocol, begin: list[int], samples: int
) -> Iterator[Passage]:
    room = protocol.seq_len - len(begin)
    wanted = room + (samples - 1) * protocol.stride
    ids: list[int] = []
    for document in texts:
        end = [tokenizer.eos_token_id] if ids and tokenizer.eos_token_id is not None else []
        enough = CHARACTERS * (wanted - len(ids))
        ids += [*end, *_ids(tokenizer, document[:enough] if isinstance(document, str) else document)]
        if len(ids) >= wanted:
            break
    for first in range(0, min(len(ids), wanted) - room + 1, protocol.stride):
        tokens = torch.tensor([*begin, *ids[first : first + room]])
        known = len(begin) + 1
        yield Passage(tokens, max(known, len(tokens) - protocol.stride) if first else known)


def _ids(tokenizer: PreTrainedTokenizerBase, document: Document) -> list[int]:
    """Tokens of a document without a begin token: whether samples begin with one is for the protocol to say."""
    ids = encode(tokenizer, document, joined=False, special=False)
    return ids[1:] if ids and ids[0] == tokenizer.bos_token_id else ids  # a chat template may write one


def _bytes(tokenizer: PreTrainedTokenizerBase, passage: Passage) -> int:
    """UTF-8 bytes of what is predicted; special tokens have none."""

    def count(ids: torch.Tensor) -> int:
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert isinstance(text, str)
        return len(text.encode())

    return count(passage.tokens) - count(passage.tokens[: passage.start])
