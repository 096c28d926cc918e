import json

import pytest
from transformers import PreTrainedTokenizerBase

from compressor.assets import DEMO_MODEL
from compressor.errors import CalibrationError
from compressor.model.tokenizer import load_tokenizer
from compressor.pipeline.calibration import data, stdlib
from compressor.pipeline.calibration.chat import Conversation


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DEMO_MODEL)


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"id": i, "text": f"document {i} " * 30}) + "\n" for i in range(200)))
    return path


def load(source, tokenizer, **options):
    return data.load_samples(str(source), tokenizer, **{"samples": 4, "seq_len": 32, **options})


def test_no_document_is_both_for_calibration_and_held_out(lines):
    calibration, held_out = (set(data.documents(str(lines), 0, side)) for side in ("calibration", "held-out"))
    assert calibration.isdisjoint(held_out)
    assert calibration | held_out == set(data.documents(str(lines), 0, "all"))
    assert len(calibration | held_out) == 200
    assert 0 < len(held_out) < 30


def test_no_library_module_is_both_for_calibration_and_held_out():
    calibration, held_out = ({path for path, _ in stdlib.documents(side)} for side in (False, True))
    assert calibration.isdisjoint(held_out)
    assert len(held_out) >= 10
    assert not {"site-packages", "test"}.intersection(part for path in calibration | held_out for part in path.split("/"))


def test_samples_are_whole_and_the_seed_decides_them(lines, tokenizer):
    first, same, other = (load(lines, tokenizer, seed=seed) for seed in (0, 0, 1))
    assert first.tokens.shape == (4, 32)
    assert first.sha256 == same.sha256 != other.sha256


def test_documents_are_joined_by_the_end_token(lines, tokenizer):
    tokens = load(lines, tokenizer, samples=40).tokens.flatten().tolist()
    texts = list(data.documents(str(lines), 0, "calibration"))
    expected = []
    for text in texts:
        expected += [tokenizer.eos_token_id] * bool(expected) + tokenizer(text)["input_ids"]
    assert tokens == expected[: len(tokens)]


def test_only_as_many_documents_are_tokenised_as_needed(lines, tokenizer, monkeypatch):
    calls = []
    encode = data.encode
    monkeypatch.setattr(data, "encode", lambda *args, **kwargs: calls.append(1) or encode(*args, **kwargs))
    load(lines, tokenizer, samples=1, seq_len=8)
    assert len(calls) == 1


def test_conversations_go_through_the_chat_template(tmp_path, tokenizer):
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
    expected = tokenizer.apply_chat_template(turns, tokenize=False)
    assert tokenizer.decode(data.encode(tokenizer, Conversation(turns), joined=False)) == expected


def test_parquet_and_text_files_are_read(tmp_path, tokenizer):
    import pyarrow
    import pyarrow.parquet

    texts = [f"paragraph {i} " + "words " * 400 for i in range(40)]
    pyarrow.parquet.write_table(pyarrow.table({"content": texts}), tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    assert set(data._file(tmp_path / "a.parquet", whole=False)) == set(texts)
    assert "\n\n".join(data._file(tmp_path / "a.txt", whole=False)) == "\n\n".join(texts)


def test_a_hub_data_set_is_streamed_by_name_config_split_and_column(monkeypatch):
    import datasets

    asked = {}

    class Rows(list):
        def shuffle(self, **options):
            return asked.update(options) or self

    def load_dataset(name, config, **options):
        asked.update(name=name, config=config, **options)
        return Rows([{"body": f"text {i}"} for i in range(50)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    texts = list(data.documents("hf:owner/name:config:validation:body", 3, "calibration"))
    assert set(texts) <= {f"text {i}" for i in range(50)}
    assert asked["name"] == "owner/name"
    assert asked["config"] == "config"
    assert asked["split"] == "validation"
    assert asked["streaming"] is True
    assert asked["seed"] == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "holds no text"),
        ("a.jsonl", "{broken\n", "a.jsonl:1: not valid JSON"),
        ("a.jsonl", '{"title": "x"}\n', "has title; rename the column"),
        ("a.csv", "text\n", "unknown kind of file"),
        ("a.parquet", "not parquet", "cannot be read"),
    ],
)
def test_data_that_cannot_be_used_is_named_in_one_sentence(tmp_path, tokenizer, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(CalibrationError, match=message) as caught:
        load(tmp_path / name, tokenizer)
    assert "\n" not in str(caught.value)


def test_too_little_text_says_how_much_there_is(lines, tokenizer):
    with pytest.raises(CalibrationError, match=r"\d+ tokens of text, where 100000 samples of 32 tokens need 3200000"):
        load(lines, tokenizer, samples=100_000)


def test_a_tokenizer_of_another_model_is_noticed(lines, tokenizer):
    with pytest.raises(CalibrationError, match="not in the model's vocabulary of 100"):
        data.check_vocabulary(load(lines, tokenizer).tokens, 100, "lines")


def test_the_demo_tokenizer_is_one(tokenizer):
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    text = "def f(x):\n    return x + 1234  # ü\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
