"""Safetensors files: what is whole is read lazily and exactly; what is damaged, or points elsewhere, is refused by name."""

import json
import pickle
import re

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import exact, some_tokens, stock_logits, tensors

from compressor import api
from compressor.errors import SourceError
from compressor.model.checkpoint import INDEX, SINGLE, Checkpoint, read_config, read_header
from compressor.model.shards import assemble, layout, total_bytes

CONTENT = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.tensor([1.5, -2], dtype=torch.bfloat16),
    "c": torch.zeros(0, 4, dtype=torch.int64),
    "d": torch.tensor(True),
}


@pytest.fixture
def sharded(tiny_copy):
    """A directory of several shards and an index."""
    path = tiny_copy("llama", shard_bytes="100KB")
    assert len(shards(path)) > 3
    return path


def shards(path):
    return sorted(path.glob("*.safetensors"))


def refusal(path):
    """The sentence with which a directory is refused, by the reader and by a run alike."""
    with pytest.raises(SourceError) as refused:
        Checkpoint(path)
    with pytest.raises(SourceError, match=re.escape(str(refused.value))):
        api.quantize(path, path.parent / "out", method="rtn", evaluate=False, device="cpu", verify=False)
    assert "\n" not in str(refused.value)
    assert not (path.parent / "out").exists()
    return str(refused.value)


def redirect(path, shard):
    """Let the index name another file for one tensor."""
    index = json.loads((path / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = shard
    (path / INDEX).write_text(json.dumps(index))


def rewrite_header(shard, change):
    """Let a function alter the parsed header of a shard; the data stays."""
    raw = shard.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    text = json.dumps(change(header) or header).encode()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


# What is whole


def test_every_kind_of_tensor_is_read_as_it_was_saved(tmp_path):
    save_file(CONTENT, tmp_path / SINGLE)
    checkpoint = Checkpoint(tmp_path)
    assert sorted(checkpoint) == sorted(CONTENT)
    for name, tensor in CONTENT.items():
        found = checkpoint.read(name)
        header = checkpoint.headers[name]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape) == (header.dtype, torch.Size(header.shape))
        assert torch.equal(found, tensor)
        assert header.nbytes == tensor.nbytes


def test_opening_reads_headers_only(tiny_copy, monkeypatch):
    path = tiny_copy("llama")
    monkeypatch.setattr("compressor.model.checkpoint.safe_open", None)
    assert len(Checkpoint(path).headers) == 21


def test_shards_and_a_single_file_hold_the_same(sharded, tiny):
    many, one = Checkpoint(sharded), Checkpoint(tiny("llama"))
    assert many.headers == one.headers
    assert many.files() == shards(sharded)
    assert all(torch.equal(many.read(name), one.read(name)) for name in one)


def test_shards_may_be_symbolic_links(sharded, tmp_path):
    """A snapshot in the cache of the Hugging Face hub consists of them."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    wanted = stock_logits(sharded, some_tokens())
    for i, shard in enumerate(shards(sharded)):
        shard.rename(blobs / str(i))
        shard.symlink_to(blobs / str(i))
    assert torch.equal(exact(sharded)(some_tokens()).logits, wanted)


def test_of_a_single_file_and_an_index_the_former_counts_as_in_transformers(sharded):
    content = {name: tensor + 1 for name, tensor in tensors(sharded).items()}
    save_file(content, sharded / SINGLE, {"format": "pt"})
    assert torch.equal(exact(sharded)(some_tokens()).logits, stock_logits(sharded, some_tokens()))
    assert torch.equal(Checkpoint(sharded).read("model.norm.weight"), content["model.norm.weight"])


# Damaged files


def test_a_missing_shard_is_named(sharded):
    lost = shards(sharded)[1]
    lost.unlink()
    assert refusal(sharded).endswith(f"shard {lost.name} is named in the index but missing; download it")


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1])
def test_a_shard_that_is_cut_short_is_named(kept, sharded):
    shard = shards(sharded)[1]
    shard.write_bytes(shard.read_bytes()[:kept])
    assert re.search(rf"{shard.name}: not a whole safetensors file \(.*\); download it again", refusal(sharded))


def test_a_single_file_that_is_cut_short_is_refused_with_both_sizes(tiny_copy):
    path = tiny_copy("llama")
    whole = (path / SINGLE).read_bytes()
    (path / SINGLE).write_bytes(whole[:-1000])
    assert f"it holds {len(whole) - 1000} bytes where its header promises {len(whole)}" in refusal(path)


def test_bytes_after_the_end_are_refused(tiny_copy):
    path = tiny_copy("llama")
    with (path / SINGLE).open("ab") as file:
        file.write(b"more")
    assert "not a whole safetensors file" in refusal(path)


@pytest.mark.parametrize("length", [0, 1, 3000, 2**31, 2**63, 2**64 - 1])
def test_a_wrong_header_length_is_refused(length, tiny_copy):
    path = tiny_copy("llama")
    (path / SINGLE).write_bytes(length.to_bytes(8, "little") + (path / SINGLE).read_bytes()[8:])
    assert "not a whole safetensors file" in refusal(path)


def test_a_header_that_asks_for_gigabytes_is_not_read(tmp_path):
    with (tmp_path / SINGLE).open("wb") as file:
        file.write((2**33).to_bytes(8, "little"))
        file.truncate(2**34)  # sparse: it takes no space
    with pytest.raises(SourceError, match=f"its header would take {2**33} bytes"):
        read_header(tmp_path / SINGLE)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: ["model.norm.weight"],
        lambda header: {"model.norm.weight": []},
        lambda header: {"model.norm.weight": {"dtype": "F32", "shape": [1]}},
        lambda header: header["model.norm.weight"].update(data_offsets=[0]),
        lambda header: header["model.norm.weight"].update(shape=None),
        lambda header: header["model.norm.weight"].update(data_offsets=["0", "4"]),
    ],
)
def test_a_header_of_another_form_is_refused(change, tiny_copy):
    path = tiny_copy("llama")
    rewrite_header(path / SINGLE, change)
    assert "not a whole safetensors file" in refusal(path)


def test_a_header_that_is_no_json_is_refused(tiny_copy):
    path = tiny_copy("llama")
    raw = bytearray((path / SINGLE).read_bytes())
    raw[8:12] = b"\xff\xfe{["
    (path / SINGLE).write_bytes(raw)
    assert "not a whole safetensors file" in refusal(path)


def test_an_unknown_dtype_is_named(tiny_copy):
    path = tiny_copy("llama")
    rewrite_header(path / SINGLE, lambda header: header["model.norm.weight"].update(dtype="F4"))
    assert refusal(path).endswith("model.safetensors: tensors of dtype F4, which cannot be read; use the original model")


def test_a_header_that_contradicts_itself_is_refused(tiny_copy):
    path = tiny_copy("llama")
    rewrite_header(path / SINGLE, lambda header: header["model.norm.weight"].update(dtype="BF16"))
    assert "model.norm.weight has 512 bytes where its shape and dtype need 256" in refusal(path)


@pytest.mark.parametrize(
    "entry",
    [
        {"shape": [-2, -64]},
        {"shape": [128.0]},
        {"shape": [True]},
        {"shape": [2] * 3000},
        {"data_offsets": [0.0, 512.0]},
        {"data_offsets": [512, 0]},
        {"data_offsets": [0, 10**18]},
        {"dtype": ["F32"]},
        {"dtype": None},
    ],
)
def test_an_entry_of_a_header_that_no_tensor_can_have_is_refused(entry, tiny_copy):
    path = tiny_copy("llama")
    rewrite_header(path / SINGLE, lambda header: header["model.norm.weight"].update(entry))
    assert "not a whole safetensors file" in refusal(path)


def test_tensors_that_share_bytes_are_refused(tiny_copy):
    path = tiny_copy("llama")
    rewrite_header(path / SINGLE, lambda header: header.update(again=header["model.norm.weight"]))
    assert "begins at byte" in refusal(path)


def test_a_header_of_a_hundred_megabytes_is_refused_before_it_is_read(tmp_path):
    with (tmp_path / SINGLE).open("wb") as file:
        file.write((100 * 2**20).to_bytes(8, "little"))
        file.truncate(2**28)
    with pytest.raises(SourceError, match="and at most 33,554,432 are read"):
        read_header(tmp_path / SINGLE)


@pytest.mark.parametrize("number", ["[" * 10**5, "9" * 5000])
def test_a_header_beyond_the_limits_of_a_parser_is_refused(number, tmp_path):
    text = ('{"a": ' + number + "}").encode()
    (tmp_path / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(SourceError, match="not a whole safetensors file"):
        read_header(tmp_path / SINGLE)


# The index


@pytest.mark.parametrize(
    "shard",
    ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "sub/../../x", "..", ".", "a/", "./x.safetensors"],
)
def test_an_index_that_points_elsewhere_is_not_followed(shard, sharded):
    (sharded / "sub").mkdir()
    for place in (sharded / "sub" / "model.safetensors", sharded.parent / "model.safetensors", sharded / "x.safetensors"):
        save_file({"model.norm.weight": torch.ones(128)}, place)
    redirect(sharded, shard)
    assert f"shard {shard!r} points outside the model directory; refusing to read it" in refusal(sharded)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 5}}', '{"weight_map": {"a": ["b"]}}', "\xff"]
)
def test_an_index_of_another_form_is_refused(text, sharded):
    (sharded / INDEX).write_text(text, encoding="latin-1")
    assert re.search(r"index\.json: not (a safetensors index|valid JSON|UTF-8)", refusal(sharded))


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("", "is named in the index but missing"),
        ("n" * 300, "file name too long"),
        ("n" * 10**5, "file name too long"),
        ("a\0b", "embedded null byte"),
        ("é" * 200, "file name too long"),
    ],
)
def test_an_index_with_a_name_that_no_file_has_is_refused(name, cause, sharded):
    redirect(sharded, name)
    assert cause in refusal(sharded)


def test_a_tensor_that_is_not_where_the_index_says_is_named(sharded):
    redirect(sharded, shards(sharded)[0].name)
    assert "tensor model.norm.weight is in the index but not in this shard (1 such tensors)" in refusal(sharded)


def test_a_tensor_that_two_shards_hold_is_read_from_the_one_in_the_index(sharded):
    save_file({"model.norm.weight": torch.full((128,), 7.0)}, sharded / "other.safetensors")
    assert Checkpoint(sharded).read("model.norm.weight")[0] != 7
    redirect(sharded, "other.safetensors")
    assert Checkpoint(sharded).read("model.norm.weight")[0] == 7


# The directory


class Trap:
    """Unpickling one leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_named_and_not_opened(name, tiny_copy, tmp_path):
    path = tiny_copy("llama")
    (path / SINGLE).unlink()
    (path / name).write_bytes(pickle.dumps(Trap(tmp_path / "executed")))
    assert f"only pickled weights ({name}), which can run code when read; convert them first" in refusal(path)
    assert not (tmp_path / "executed").exists()


def test_a_directory_without_weights_is_refused(tiny_copy):
    path = tiny_copy("llama")
    (path / SINGLE).unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in refusal(path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("{", "not valid JSON"), ("", "not valid JSON"), ("\xff\xfe", "not UTF-8"), ("[]", "holds a JSON list"),
     ("3", "holds a JSON int")],
)  # fmt: skip
def test_a_config_that_is_no_json_object_is_refused(text, sentence, tiny_copy):
    path = tiny_copy("llama")
    (path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(SourceError, match=rf"config.json: {sentence}.*; download it again"):
        api.quantize(path, path.parent / "out", method="rtn", evaluate=False, device="cpu", verify=False)


def test_what_is_no_model_directory_is_refused(tmp_path):
    with pytest.raises(SourceError, match="no such directory; MODEL is a local Hugging Face model directory"):
        read_config(tmp_path / "nothing")
    with pytest.raises(SourceError, match=re.escape("no config.json here")):
        read_config(tmp_path)


# Writing shards


@pytest.mark.parametrize("shard_bytes", [10**9, 200_000, 1])
def test_assembled_shards_are_read_by_transformers_and_have_the_size_that_was_forecast(shard_bytes, tiny, tiny_copy):
    original, path = tiny("llama"), tiny_copy("llama")
    (path / SINGLE).unlink()
    written = assemble([original / SINGLE], path, shard_bytes)
    assert torch.equal(stock_logits(path, some_tokens()), stock_logits(original, some_tokens()))
    assert sum(file.stat().st_size for file in path.glob("*.safetensors*")) == total_bytes(written)
    assert written == layout(Checkpoint(original).headers, shard_bytes)
    assert (path / INDEX).exists() == (len(written) > 1)
    most = max(tensor.nbytes for tensor in tensors(original).values())
    assert all(shard.data_bytes <= max(shard_bytes, most) for shard in written)


def test_tensors_of_every_element_size_lie_aligned(tmp_path):
    save_file(CONTENT, tmp_path / "part")
    (shard,) = assemble([tmp_path / "part"], tmp_path)
    header = json.loads(shard.header[8:])
    assert len(shard.header) % 8 == 0
    assert all(header[name]["data_offsets"][0] % tensor.itemsize == 0 for name, tensor in CONTENT.items())
    assert all(torch.equal(Checkpoint(tmp_path).read(name), tensor) for name, tensor in CONTENT.items())
