"""Calibration and evaluation tokens: the sources of text, and how text is cut into samples.

A source is `builtin` (the standard library's files), a `.txt`, `.jsonl` or `.parquet` file, or a data set on the hub,
`hf:NAME[:CONFIG][:SPLIT][:COLUMN]`. A row of a data set holds a text or a conversation (see
compressor.pipeline.calibration.chat). If it holds both, the text is read. Rows with empty text are left out. Other rows
without text are refused.

Every source yields documents. The hash of a document's text (for built-in documents, of its path) decides whether it is held
out for evaluation. So calibration and evaluation never share a document. Documents are visited in a seeded order. If an
evaluation reads all of a source, it keeps the source's order and does not cut plain text.

Documents are tokenized only until there are enough tokens. They are joined, with the end token between them if the tokenizer
has one, and cut into samples of exactly `seq_len` tokens. So no padding enters any statistic.
"""

import hashlib
import json
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from compressor.access import check_readable, kind_of
from compressor.errors import CalibrationError
from compressor.pipeline.calibration import stdlib
from compressor.pipeline.calibration.chat import Conversation, json_name, make_conversation, without_nulls
from compressor.pipeline.calibration.chat_template import render
from compressor.reading import cause, elide, parse_json, parse_json_lines, read_text

TEXT_COLUMNS = ("text", "content", "document")
CHAT_COLUMNS = ("messages", "conversations", "conversation")
TOKENS_AT_ONCE = 4096  # tokens that a block processes at once
CHUNK = 2000  # characters: a text file is cut at blank lines into documents of at least this length
SEPARATOR = "<|endoftext|>"  # a text file that contains this is cut here instead
TURNS = re.compile(r"\s*\[\s*\{")  # start of turns that are stored as JSON text
KINDS = "a .txt, .jsonl or .parquet file"
Document = str | Conversation
Split = Literal["calibration", "held-out", "all"]  # for the built-in text, `all` is the held-out part too
SHUFFLE_BUFFER = 1000  # number of rows of a streamed data set from which the next row is drawn


@dataclass(frozen=True)
class Samples:
    """Samples of a text: tokens, int64 [N, S], with their source and hash."""

    tokens: Tensor
    source: str
    sha256: str  # hash of the tokens

    def batches(self, tokens_at_once: int) -> list[Tensor]:
        """Split the samples into batches [B, S] of at most `tokens_at_once` tokens, but at least one sample."""
        return list(self.tokens.split(max(1, tokens_at_once // self.tokens.shape[1])))


def load_samples(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    seq_len: int,
    seed: int = 0,
) -> Samples:
    """Tokenize as much of a source's calibration split as is needed.

    Args:
        source: Source of the text; see the module's docstring.
        tokenizer: The model's tokenizer.
        samples: Number of samples.
        seq_len: Tokens per sample.
        seed: Seed of the order of the documents.

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
            f"{elide(source, 100)}: {len(ids)} tokens of text, where {samples} samples of {seq_len} tokens need {wanted}; "
            "name a larger source, or lower --samples or --seq-len"
        )
    tokens = torch.tensor(ids[:wanted]).view(samples, seq_len)
    return Samples(tokens, source, hashlib.sha256(tokens.numpy().tobytes()).hexdigest())


def check_vocabulary(tokens: Tensor, vocab_size: int, source: str) -> None:
    """Refuse tokens that the model has no embedding for.

    Raises:
        CalibrationError: a token is not in the vocabulary.
    """
    top = int(tokens.max())
    if top >= vocab_size:
        raise CalibrationError(
            f"{elide(source, 100)}: token {top} is not in the model's vocabulary of {vocab_size}; tokenizer and model differ"
        )


def encode(tokenizer: PreTrainedTokenizerBase, document: Document, joined: bool, special: bool = True) -> list[int]:
    """Return the token ids of a text or a conversation.

    Args:
        tokenizer: The model's tokenizer.
        document: Text or conversation.
        joined: Whether the document follows another one, so that an end token is put before it.
        special: Whether the tokenizer adds its special tokens to a text.
    """
    end = [tokenizer.eos_token_id] if joined and tokenizer.eos_token_id is not None else []
    if isinstance(document, str):
        return [*end, *tokenizer(document, add_special_tokens=special, verbose=False)["input_ids"]]
    text = render(tokenizer, document)  # with the special tokens that the template writes
    return [*end, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]


def documents(source: str, seed: int, split: Split) -> Iterator[Document]:
    """Yield the documents of one split of a source, in seeded order. With split `all`, keep the source's own order.

    The built-in text is always in seeded order.

    Raises:
        CalibrationError: the source cannot be read or holds no text.
    """
    if source == "builtin":
        paths = stdlib.paths(held_out=split != "calibration")
        random.Random(seed).shuffle(paths)
        yield from map(stdlib.read, paths)
    elif source.startswith("hf:"):
        yield from (d for d in _dataset(source, None if split == "all" else seed) if in_split(d, split))
    else:
        rows = list(_file(Path(source), whole=split == "all"))
        if not rows:
            raise CalibrationError(f"{elide(source, 100)}: holds no text; calibration needs some")
        if split != "all":
            random.Random(seed).shuffle(rows)
        yield from (row for row in rows if in_split(row, split))


def in_split(document: Document, split: Split) -> bool:
    """Return whether a document belongs to a split."""
    return split == "all" or is_held_out(document) == (split == "held-out")


def is_held_out(document: Document) -> bool:
    """Return whether a document is held out for evaluation: one in twenty, by the hash of its text or turns."""
    text = document if isinstance(document, str) else json.dumps(document.turns, sort_keys=True, default=str)
    return stdlib.in_held_out_share(text)


def _file(path: Path, whole: bool) -> Iterable[Document]:
    """Return the documents of a file. If `whole`, a plain text without separators is one document."""
    name = elide(str(path), 100)
    check_readable([path], CalibrationError)
    if kind_of(path, CalibrationError) != "file":
        found = "is a directory" if path.is_dir() else "no such file"
        raise CalibrationError(f"{name}: {found}; data is `builtin`, {KINDS}, or hf:NAME[:CONFIG][:SPLIT][:COLUMN]")
    kind = path.suffix.lower()
    if kind == ".txt":
        text = read_text(path, CalibrationError, "store it as UTF-8")
        return _chunks(text.replace("\r\n", "\n").replace("\r", "\n"), whole)
    if kind == ".jsonl":
        text = read_text(path, CalibrationError, "store it as UTF-8")
        lines = parse_json_lines(text, str(path), CalibrationError, "correct this line")
        return _rows((f"{name}:{number}", row) for number, row in lines)
    if kind == ".parquet":
        return _rows((f"{name}: row {number}", row) for number, row in enumerate(_parquet(path, name)))
    raise CalibrationError(f"{name}: unknown kind of file; data is {KINDS}")


def _parquet(path: Path, name: str) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        return [_arrow_row(row) for row in pyarrow.parquet.read_table(path).to_pylist()]
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise CalibrationError(f"{name}: cannot be read as .parquet ({cause(error)}); check the file") from error


def _arrow_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return the columns of a row, without the null keys that Arrow adds inside them."""
    return {column: without_nulls(value) for column, value in row.items()}


def _rows(rows: Iterable[tuple[str, Any]], column: str | None = None) -> Iterator[Document]:
    """Yield the documents of (place, row) pairs, without empty texts. The place, file and line, is for error messages."""
    for where, row in rows:
        document = content(row, column, where)
        if document != "":
            yield document


def _chunks(text: str, whole: bool) -> Iterator[str]:
    """Yield the documents of a plain text: the parts between separators, or paragraphs joined to CHUNK characters."""
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
    """Return the text or conversation of one row of a data set; the empty text if the row has no other text.

    Args:
        row: A text, or an object whose keys are columns.
        column: Column to read; None for the first of TEXT_COLUMNS and CHAT_COLUMNS that is not empty.
        where: Prefix of error messages: file and line.

    Raises:
        CalibrationError: no column is known to hold text, or the column holds something else.
    """
    if isinstance(row, str):
        return row
    if not isinstance(row, dict):
        raise CalibrationError(f"{where}: is {json_name(row)} where an object with text is needed; correct it")
    names = (column,) if column else (*TEXT_COLUMNS, *CHAT_COLUMNS)
    present = [name for name in names if row.get(name) is not None]
    filled = [name for name in present if row[name] not in ("", [])]
    if filled:
        return _value(row[filled[0]], filled[0], row, where)
    if any(row[name] == "" for name in present):
        return ""
    if present:
        raise CalibrationError(f"{where}: the conversation in `{present[0]}` has no turns; leave the row out")
    empty = next((name for name in names if name in row), None)
    if empty is not None:
        raise CalibrationError(f"{where}: `{empty}` is null where text is needed; leave the row out")
    named = f"column `{elide(column, 40)}`" if column else f"one of the columns {', '.join(names)}"
    have = elide(", ".join(row), 50) or "none"
    raise CalibrationError(f"{where}: needs text or a conversation in {named}, has {have}; rename the column")


def _value(value: Any, column: str, row: dict[str, Any], where: str) -> Document:
    """Return the document in a column, and parse turns that are stored as JSON text."""
    if isinstance(value, str) and column not in TEXT_COLUMNS and TURNS.match(value):
        value = parse_json(value, f"{where}: `{column}`", CalibrationError, "correct it")
    if isinstance(value, str):
        return value
    if isinstance(value, list) and any(isinstance(turn, dict) for turn in value):
        return make_conversation(value, row, where)
    found = f"a list of {json_name(value[0])}" if isinstance(value, list) else json_name(value)
    raise CalibrationError(f"{where}: `{elide(column, 40)}` is {found} where text or a list of turns is needed; correct it")


def _dataset(source: str, seed: int | None) -> Iterator[Document]:
    """Yield the documents of a data set on the Hugging Face hub, streamed; in its own order if `seed` is None."""
    import datasets

    name, config, split, column, *rest = (*source.removeprefix("hf:").split(":"), *[""] * 4)[:5]
    if not name or any(rest):
        raise CalibrationError(f"{elide(source, 100)}: not of the form hf:NAME[:CONFIG][:SPLIT][:COLUMN]")
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        ordered = rows if seed is None else rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        order = "" if seed is None else f" (in the order of seed {seed})"
        named = ((f"{elide(source, 100)}: row {n}{order}", _arrow_row(row)) for n, row in enumerate(ordered))
        yield from _rows(named, column or None)
    except CalibrationError:
        raise
    except Exception as error:  # the hub's client raises a dozen unrelated kinds
        raise CalibrationError(
            f"{elide(source, 100)}: the data set cannot be loaded ({cause(error)}); check its name and the network"
        ) from error
