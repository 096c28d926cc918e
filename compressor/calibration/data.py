"""Calibration and evaluation tokens: from where the text comes, and how it is cut into samples.

A source is `builtin` (the standard library's files), a `.txt`, `.jsonl` or `.parquet` file, or a data set of the hub,
`hf:NAME[:CONFIG][:SPLIT][:COLUMN]`.
Every source yields documents; a document belongs to the held-out split by the hash of its text (the built-in ones: of
their path), so calibration and evaluation never share one. Documents are visited in a seeded order (all of a source, for
evaluation, in its own order, a plain text uncut), tokenised only until there are enough tokens, joined (with the end token
between them, if the tokenizer has one) and cut into samples of exactly `seq_len` tokens: no padding enters any statistic.
"""

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from compressor.calibration import stdlib
from compressor.errors import CalibrationError
from compressor.model.block_configs import llama_config
from compressor.reading import cause

TEXT_COLUMNS = ("text", "content", "document")
CHAT_COLUMNS = ("messages", "conversations", "conversation")
CHUNK = 2000  # characters: a text file is cut at blank lines into documents of at least this many
SEPARATOR = "<|endoftext|>"  # unless it says by itself where they end
Document = str | list[dict[str, str]]  # a text, or the turns of a conversation
Split = Literal["calibration", "held-out", "all"]  # `all` of the built-in text is its held-out part, too
SHUFFLE_BUFFER = 1000  # rows of a streamed data set among which the next one is drawn


@dataclass(frozen=True)
class Samples:
    """Tokens, int64 [N, S], and what they are."""

    tokens: Tensor
    source: str
    sha256: str  # of the tokens

    def batches(self, tokens_at_once: int) -> list[Tensor]:
        """Batches [B, S] of at most so many tokens, at least one sample each."""
        return list(self.tokens.split(max(1, tokens_at_once // self.tokens.shape[1])))


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The model directory's tokenizer.

    Raises:
        CalibrationError: there is none that can be loaded without running code from the checkpoint.
    """
    if not any(
        (path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    ):
        raise CalibrationError(
            f"{path}: no tokenizer files here; copy tokenizer.json and tokenizer_config.json of the model, "
            "or, where no calibration is needed, give --no-eval"
        )
    try:
        known = {"config": llama} if (llama := llama_config(path)) is not None else {}
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False, **known)
        tokenizer("a")  # some entries are only looked at now
    except Exception as error:  # the files of a tokenizer can be wrong in as many ways as there are tokenizers
        raise CalibrationError(
            f"{path}: the tokenizer cannot be loaded ({cause(error)}); copy the tokenizer files of the original model"
        ) from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def load_samples(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    seq_len: int,
    seed: int = 0,
) -> Samples:
    """Tokenise just as much of a source's calibration split as is needed.

    Args:
        source: As the module says.
        tokenizer: The model's.
        samples: How many.
        seq_len: Tokens of each.
        seed: Of the order of the documents.

    Raises:
        CalibrationError: the source cannot be read or holds too little text.
    """
    ids: list[int] = []
    wanted = samples * seq_len
    for document in documents(source, seed, "calibration"):
        ids += encode(tokenizer, document, joined=bool(ids))
        if len(ids) >= wanted:
            break
    if len(ids) < wanted:
        raise CalibrationError(
            f"{source}: {len(ids)} tokens of text, where {samples} samples of {seq_len} tokens need {wanted}; "
            "name a larger source, or lower --samples or --seq-len"
        )
    tokens = torch.tensor(ids[:wanted]).view(samples, seq_len)
    return Samples(tokens, source, hashlib.sha256(tokens.numpy().tobytes()).hexdigest())


def check_vocabulary(tokens: Tensor, vocab_size: int, source: str) -> None:
    """Refuse tokens that the model has no embedding for."""
    top = int(tokens.max())
    if top >= vocab_size:
        raise CalibrationError(
            f"{source}: token {top} is not in the model's vocabulary of {vocab_size}; tokenizer and model differ"
        )


def encode(tokenizer: PreTrainedTokenizerBase, document: Document, joined: bool, special: bool = True) -> list[int]:
    """Token ids of a text or a conversation, after an end token if something stands before it.

    Without `special`, nothing stands around a text that the tokenizer would put there.
    """
    end = [tokenizer.eos_token_id] if joined and tokenizer.eos_token_id is not None else []
    if isinstance(document, str):
        return [*end, *tokenizer(document, add_special_tokens=special, verbose=False)["input_ids"]]
    if tokenizer.chat_template is None:
        raise CalibrationError(
            "the data holds conversations but the tokenizer has no chat template; use a data set of plain text"
        )
    text = tokenizer.apply_chat_template(document, tokenize=False)
    return [*end, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool) -> list[int]:
    """Token ids to continue from: the prompt as it is, or as the user's turn of a conversation."""
    if not chat:
        ids: list[int] = tokenizer(prompt)["input_ids"]
        if not ids and tokenizer.bos_token_id is None:
            raise CalibrationError("the prompt is empty and the tokenizer has no begin token; give --prompt some text")
        return ids or [tokenizer.bos_token_id]
    if tokenizer.chat_template is None:
        raise CalibrationError("the tokenizer has no chat template; leave out --chat")
    text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def documents(source: str, seed: int, split: Split) -> Iterator[Document]:
    """The documents of one split of a source, in seeded order; all of a source, but the built-in, in its own."""
    if source == "builtin":
        texts: list[Any] = [text for _, text in stdlib.documents(held_out=split != "calibration")]
        random.Random(seed).shuffle(texts)
        yield from texts
    elif source.startswith("hf:"):
        yield from (d for d in _dataset(source, None if split == "all" else seed) if in_split(d, split))
    else:
        rows = list(_file(Path(source), whole=split == "all"))
        if not rows:
            raise CalibrationError(f"{source}: holds no text; calibration needs some")
        if split != "all":
            random.Random(seed).shuffle(rows)
        yield from (row for row in rows if in_split(row, split))


def in_split(document: str | Sequence[Any], split: Split) -> bool:
    """Whether a document belongs to a split."""
    return split == "all" or is_held_out(document) == (split == "held-out")


def is_held_out(document: str | Sequence[Any]) -> bool:
    """Whether a document is kept for evaluation: one in twenty, by the hash of its content."""
    text = document if isinstance(document, str) else json.dumps(document, sort_keys=True)
    return stdlib.in_held_out_share(text)


def _file(path: Path, whole: bool) -> Iterable[Document]:
    """The documents of a file; `whole` leaves a plain text in one piece."""
    if not path.is_file():
        raise CalibrationError(
            f"{path}: no such file; data is `builtin`, a .txt, .jsonl or .parquet file, or hf:NAME[:CONFIG][:SPLIT][:COLUMN]"
        )
    try:
        if path.suffix == ".txt":
            return list(_chunks(path.read_text(encoding="utf-8"), whole))
        if path.suffix == ".jsonl":
            return list(_lines(path))
        if path.suffix == ".parquet":
            import pyarrow.parquet

            rows = pyarrow.parquet.read_table(path).to_pylist()
            return [content(row, None, f"{path}: row {n}") for n, row in enumerate(rows)]
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{path}: cannot be read as {path.suffix} ({error}); check the file") from error
    raise CalibrationError(f"{path}: unknown kind of file; data is .txt, .jsonl or .parquet")


def _lines(path: Path) -> Iterator[Document]:
    for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            raise CalibrationError(f"{path}:{n}: cannot be read as JSON ({error}); correct this line") from error
        if row is not None:
            yield content(row, None, f"{path}:{n}")


def _chunks(text: str, whole: bool) -> Iterator[str]:
    """Documents of a plain text: what stands between separators, or paragraphs joined until they have CHUNK characters."""
    if SEPARATOR in text:
        yield from filter(None, map(str.strip, text.split(SEPARATOR)))
        return
    if whole:
        yield from filter(str.strip, [text])
        return
    pending = ""
    for paragraph in text.split("\n\n"):
        pending = f"{pending}\n\n{paragraph}" if pending else paragraph
        if len(pending) >= CHUNK:
            yield pending
            pending = ""
    if pending.strip():
        yield pending


def content(row: Any, column: str | None, where: str) -> Document:
    """The text or conversation of one row of a data set.

    Raises:
        CalibrationError: the row has no column that is known to hold text.
    """
    if isinstance(row, str):
        return row
    if isinstance(row, dict):
        for name in (column,) if column else (*TEXT_COLUMNS, *CHAT_COLUMNS):
            value = row.get(name)
            if isinstance(value, str):
                return value
            if name in row and value is None:
                raise CalibrationError(f"{where}: `{name}` is null where text is needed; leave the row out")
            if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
                return [_turn(turn) for turn in value]
    named = f"column `{column}`" if column else f"one of the columns {', '.join((*TEXT_COLUMNS, *CHAT_COLUMNS))}"
    have = ", ".join(row) if isinstance(row, dict) else type(row).__name__
    raise CalibrationError(f"{where}: needs text or a conversation in {named}, has {have}; rename the column")


def _turn(turn: dict[str, Any]) -> dict[str, str]:
    """A turn with the keys `role` and `content`; ShareGPT's `from` and `value` are understood."""
    role = str(turn.get("role", turn.get("from", "user")))
    return {
        "role": {"human": "user", "gpt": "assistant"}.get(role, role),
        "content": str(turn.get("content", turn.get("value", ""))),
    }


def _dataset(source: str, seed: int | None) -> Iterator[Document]:
    """Rows of a data set on the Hugging Face hub, streamed."""
    import datasets

    name, config, split, column, *rest = (*source.removeprefix("hf:").split(":"), *[""] * 4)[:5]
    if not name or any(rest):
        raise CalibrationError(f"{source}: not of the form hf:NAME[:CONFIG][:SPLIT][:COLUMN]")
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        ordered = rows if seed is None else rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        for n, row in enumerate(ordered):
            yield content(row, column or None, f"{source}: row {n}")
    except CalibrationError:
        raise
    except Exception as error:  # the hub's client raises a dozen unrelated kinds
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise CalibrationError(
            f"{source}: the data set cannot be loaded ({reason}); check its name and the network"
        ) from error
