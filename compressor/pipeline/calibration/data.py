"""Calibration and evaluation tokens: from where the text comes, and how it is cut into samples.

A source is `builtin` (the standard library's files), a `.txt`, `.jsonl` or `.parquet` file, or a data set of the hub,
`hf:NAME[:CONFIG][:SPLIT][:COLUMN]`. A row of a data set holds a text or a conversation (see
compressor.pipeline.calibration.chat); where it holds both, the text is read. Rows whose text is empty are left out, other
rows without text are refused. Every source yields documents; a document belongs to the held-out split by the hash of its text
(the built-in ones: of their path), so calibration and evaluation never share one. Documents are visited in a seeded order
(all of a source, for evaluation, in its own order, a plain text uncut), tokenised only until there are enough tokens, joined
(with the end token between them, if the tokenizer has one) and cut into samples of exactly `seq_len` tokens: no padding
enters any statistic.
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
TOKENS_AT_ONCE = 4096  # that go through a block together
CHUNK = 2000  # characters: a text file is cut at blank lines into documents of at least this many
SEPARATOR = "<|endoftext|>"  # unless it says by itself where they end
TURNS = re.compile(r"\s*\[\s*\{")  # how the turns of a conversation begin that are stored as JSON text
KINDS = "a .txt, .jsonl or .parquet file"
Document = str | Conversation
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
    """Refuse tokens that the model has no embedding for."""
    top = int(tokens.max())
    if top >= vocab_size:
        raise CalibrationError(
            f"{elide(source, 100)}: token {top} is not in the model's vocabulary of {vocab_size}; tokenizer and model differ"
        )


def encode(tokenizer: PreTrainedTokenizerBase, document: Document, joined: bool, special: bool = True) -> list[int]:
    """Token ids of a text or a conversation, after an end token if something stands before it.

    Without `special`, nothing stands around a text that the tokenizer would put there.
    """
    end = [tokenizer.eos_token_id] if joined and tokenizer.eos_token_id is not None else []
    if isinstance(document, str):
        return [*end, *tokenizer(document, add_special_tokens=special, verbose=False)["input_ids"]]
    text = render(tokenizer, document)  # with the special tokens that the template writes
    return [*end, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]


def documents(source: str, seed: int, split: Split) -> Iterator[Document]:
    """The documents of one split of a source, in seeded order; all of a source, but the built-in, in its own."""
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
    """Whether a document belongs to a split."""
    return split == "all" or is_held_out(document) == (split == "held-out")


def is_held_out(document: Document) -> bool:
    """Whether a document is kept for evaluation: one in twenty, by the hash of its text or its turns."""
    text = document if isinstance(document, str) else json.dumps(document.turns, sort_keys=True, default=str)
    return stdlib.in_held_out_share(text)


def _file(path: Path, whole: bool) -> Iterable[Document]:
    """The documents of a file; `whole` leaves a plain text in one piece."""
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
    """The columns of a row, without the keys that Arrow adds inside them."""
    return {column: without_nulls(value) for column, value in row.items()}


def _rows(rows: Iterable[tuple[str, Any]], column: str | None = None) -> Iterator[Document]:
    """The documents of rows and where they stand, without the empty ones."""
    for where, row in rows:
        document = content(row, column, where)
        if document != "":
            yield document


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
    """The text or conversation of one row of a data set; the empty text if that is all the row has.

    Args:
        row: A text, or an object whose keys are columns.
        column: Column to be read; None for the first of TEXT_COLUMNS and CHAT_COLUMNS that is not empty.
        where: Start of messages: file and line.

    Raises:
        CalibrationError: no column that is known to hold text, or one that holds something else.
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
    """Return the document in a column."""
    if isinstance(value, str) and column not in TEXT_COLUMNS and TURNS.match(value):
        value = parse_json(value, f"{where}: `{column}`", CalibrationError, "correct it")
    if isinstance(value, str):
        return value
    if isinstance(value, list) and any(isinstance(turn, dict) for turn in value):
        return make_conversation(value, row, where)
    found = f"a list of {json_name(value[0])}" if isinstance(value, list) else json_name(value)
    raise CalibrationError(f"{where}: `{elide(column, 40)}` is {found} where text or a list of turns is needed; correct it")


def _dataset(source: str, seed: int | None) -> Iterator[Document]:
    """Rows of a data set on the Hugging Face hub, streamed."""
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
