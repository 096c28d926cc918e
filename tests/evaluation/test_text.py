"""How text becomes predictions: every token predicted once, from the context that the protocol says."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from compressor.assets import DEMO_MODEL
from compressor.calibration.data import load_tokenizer
from compressor.errors import CalibrationError, RecipeError
from compressor.evaluation.text import Text, load_text, make_protocol

WORDS = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen " * 4


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(DEMO_MODEL)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(WORDS)
    return path


def cut(file: Path, tokenizer: PreTrainedTokenizerBase, samples: int = 1000, **options: Any) -> Text:
    return load_text(str(file), tokenizer, make_protocol(tokenizer, 16, **options), samples=samples)


def predicted(text: Text) -> list[int]:
    return torch.cat([p.tokens[p.start :] for p in text.passages]).tolist()


def test_samples_are_adjacent(file: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer(WORDS)["input_ids"]
    text = cut(file, tokenizer)
    assert len(text.passages) == len(ids) // 16
    assert torch.cat([p.tokens for p in text.passages]).tolist() == ids[: len(ids) // 16 * 16]
    assert {p.start for p in text.passages} == {1}


@pytest.mark.parametrize("stride", [1, 5, 15, 16])
def test_with_a_stride_every_token_is_predicted_once(stride: int, file: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer(WORDS)["input_ids"]
    text = cut(file, tokenizer, stride=stride)
    assert all(len(p.tokens) == 16 for p in text.passages)
    if stride < 16:
        assert predicted(text) == ids[1 : 16 + (len(ids) - 16) // stride * stride]


@pytest.mark.parametrize("stride", [5, 14])
def test_with_a_begin_token_every_sample_has_it_and_none_predicts_it(
    stride: int, file: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    ids = tokenizer(WORDS)["input_ids"]
    text = cut(file, tokenizer, bos=True, stride=stride)
    assert {int(p.tokens[0]) for p in text.passages} == {tokenizer.bos_token_id}
    assert {len(p.tokens) for p in text.passages} == {16}
    assert predicted(text) == ids[1 : 15 + (len(ids) - 15) // stride * stride]


def test_what_was_cut_out_of_a_text_is_not_predicted_from_the_begin_token(
    file: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert {p.start for p in cut(file, tokenizer, bos=True).passages} == {2}
    assert {p.start for p in cut(file, tokenizer, bos=True, one_by_one=True).passages} == {1}


def test_documents_are_samples_and_cut_off(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "d.txt").write_text(f"one two<|endoftext|>\n{WORDS}<|endoftext|>x<|endoftext|>\n")
    text = cut(tmp_path / "d.txt", tokenizer, one_by_one=True)
    expected = {tuple(tokenizer("one two")["input_ids"]), tuple(tokenizer(WORDS.strip())["input_ids"][:16])}
    assert {tuple(p.tokens.tolist()) for p in text.passages} == expected  # of one token nothing can be predicted


def test_bytes_are_those_of_what_is_predicted(file: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    text = cut(file, tokenizer)
    assert text.bytes == sum(len(tokenizer.decode(p.tokens[1:]).encode()) for p in text.passages)


def test_the_hash_tells_texts_and_protocols_apart(file: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    hashes = [cut(file, tokenizer, **o).sha256 for o in ({}, {"stride": 5}, {"bos": True}, {"samples": 2}, {})]
    assert len(set(hashes)) == 4
    assert hashes[0] == hashes[-1]


@pytest.mark.parametrize(
    ("options", "named"),
    [({"stride": 0}, "1 … 16"), ({"stride": 17}, "1 … 16"), ({"stride": 16, "bos": True}, "1 … 15"),
     ({"stride": 4, "one_by_one": True}, "--documents")],
)  # fmt: skip
def test_a_protocol_that_makes_no_sense_is_refused(
    options: dict[str, Any], named: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(RecipeError, match=named):
        make_protocol(tokenizer, 16, **options)


def test_a_begin_token_that_is_not_there_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    other = load_tokenizer(DEMO_MODEL)
    other.bos_token = None
    with pytest.raises(RecipeError, match="--bos"):
        make_protocol(other, 16, bos=True)


def test_too_little_text_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "t.txt").write_text("one two")
    with pytest.raises(CalibrationError, match="one sample of 16"):
        cut(tmp_path / "t.txt", tokenizer)
