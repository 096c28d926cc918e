"""How text becomes predictions: every token predicted once, from the context that the protocol says."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from compressor.assets import DEMO_MODEL
from compressor.errors import CalibrationError, RecipeError
from compressor.evaluation.text import Text, load_text, make_protocol
from compressor.model.tokenizer import load_tokenizer

WORDS = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen " * 4


@pytest.fixture(scope="module", params=["plain", "adds a begin token"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    """The demo model's, which adds nothing to a text; and one like Llama's, which begins every text."""
    made = load_tokenizer(DEMO_MODEL)
    if request.param != "plain":
        begin = ("<|im_start|>", made.convert_tokens_to_ids("<|im_start|>"))
        made.bos_token = begin[0]
        made._tokenizer.post_processor = TemplateProcessing(single=f"{begin[0]} $A", special_tokens=[begin])
    return made


def words(tokenizer: PreTrainedTokenizerBase, text: str = "") -> list[int]:
    """Tokens of a text alone."""
    ids: list[int] = tokenizer(text or WORDS, add_special_tokens=False)["input_ids"]
    return ids


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(WORDS)
    return path


def cut(file: Path, tokenizer: PreTrainedTokenizerBase, samples: int = 1000, **options: Any) -> Text:
    return load_text(str(file), tokenizer, make_protocol(tokenizer, 16, **{"bos": False, **options}), samples=samples)


def predicted(text: Text) -> list[int]:
    return torch.cat([p.tokens[p.start :] for p in text.passages]).tolist()


def test_samples_are_adjacent(file: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    ids = words(tokenizer)
    text = cut(file, tokenizer)
    assert len(text.passages) == len(ids) // 16
    assert torch.cat([p.tokens for p in text.passages]).tolist() == ids[: len(ids) // 16 * 16]
    assert {p.start for p in text.passages} == {1}


@pytest.mark.parametrize("stride", [1, 5, 15])
def test_with_a_stride_every_token_is_predicted_once(stride: int, file: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    ids = words(tokenizer)
    text = cut(file, tokenizer, stride=stride)
    assert all(len(p.tokens) == 16 for p in text.passages)
    assert predicted(text) == ids[1 : 16 + (len(ids) - 16) // stride * stride]


@pytest.mark.parametrize("stride", [5, 14])
def test_with_a_begin_token_every_sample_has_it_and_none_predicts_it(
    stride: int, file: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    ids = words(tokenizer)
    text = cut(file, tokenizer, bos=True, stride=stride)
    assert {int(p.tokens[0]) for p in text.passages} == {tokenizer.bos_token_id}
    assert {len(p.tokens) for p in text.passages} == {16}
    assert predicted(text) == ids[1 : 15 + (len(ids) - 15) // stride * stride]


def test_what_was_cut_out_of_a_text_is_not_predicted_from_the_begin_token(
    file: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert {p.start for p in cut(file, tokenizer, bos=True).passages} == {2}
    assert {p.start for p in cut(file, tokenizer, bos=True, one_by_one=True).passages} == {1}


def test_by_default_samples_begin_as_the_tokenizer_begins_a_text(tokenizer: PreTrainedTokenizerBase) -> None:
    adds = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    assert make_protocol(tokenizer, 16).bos == adds


@pytest.mark.parametrize("bos", [True, False])
def test_between_documents_stands_an_end_token_and_no_begin_token(
    bos: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / "d.txt").write_text("<|endoftext|>".join(f"document {n}" for n in range(30)))
    text = cut(tmp_path / "d.txt", tokenizer, bos=bos)
    joined: list[int] = []
    for n in range(30):
        joined += [*([tokenizer.eos_token_id] if n else []), *words(tokenizer, f"document {n}")]
    found = torch.cat([p.tokens[int(bos) :] for p in text.passages]).tolist()
    assert found == joined[: len(found)]


def test_a_plain_text_is_read_in_its_own_order_uncut(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    whole = "\n\n".join(f"{n} {WORDS}" for n in range(60))
    (tmp_path / "t.txt").write_text(whole)
    found = torch.cat([p.tokens for p in cut(tmp_path / "t.txt", tokenizer, samples=100).passages]).tolist()
    assert found == words(tokenizer, whole)[:1600]


def test_documents_are_samples_and_cut_off(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "d.txt").write_text(f"one two<|endoftext|>\n{WORDS}<|endoftext|>x<|endoftext|>\n")
    text = cut(tmp_path / "d.txt", tokenizer, one_by_one=True)
    expected = {tuple(words(tokenizer, "one two")), tuple(words(tokenizer, WORDS.strip())[:16])}
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
    [({"stride": 0, "bos": False}, "1 … 16"), ({"stride": 17, "bos": False}, "1 … 16"),
     ({"stride": 16, "bos": True}, "1 … 15"), ({"stride": 4, "one_by_one": True}, "--documents")],
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
