"""The safetensors files of a model directory: every tensor by name, none of them in memory until it is asked for."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compressor.errors import SourceError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Header:
    """What a shard's header says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Checkpoint:
    """Lazy, read-only view. Opening it reads the headers of all shards and checks that the files are whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shard_of = dict(find_shards(path))
        self.headers: dict[str, Header] = {}
        for shard in sorted(set(self.shard_of.values())):
            for name, header in read_header(path / shard).items():
                if self.shard_of.setdefault(name, shard) == shard:  # like transformers, reads what the index leaves out
                    self.headers[name] = header
        lost = sorted(set(self.shard_of) - set(self.headers))
        if lost:
            raise SourceError(
                f"{path / self.shard_of[lost[0]]}: tensor {lost[0]} is in the index but not in this shard "
                f"({len(lost)} such tensors); download the checkpoint again"
            )

    def __contains__(self, name: object) -> bool:
        return name in self.headers

    def __iter__(self) -> Iterator[str]:
        return iter(self.headers)

    def read(self, name: str) -> Tensor:
        """One tensor, as stored, on the CPU."""
        shard = self.path / self.shard_of[name]
        try:
            with safe_open(shard, framework="pt") as opened:
                tensor: Tensor = opened.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise SourceError(f"{shard}: cannot read tensor {name} ({error}); download the shard again") from error
        return tensor

    def files(self) -> list[Path]:
        """The shards, in name order."""
        return [self.path / shard for shard in sorted(set(self.shard_of.values()))]


def read_config(path: Path) -> dict[str, Any]:
    """The model directory's config.json as it stands; one that is quantized, and only that, has a `quantization_config`.

    Raises:
        SourceError: not a model directory, or not a JSON object.
    """
    if not path.exists():
        raise SourceError(f"{path}: no such directory; MODEL is a local Hugging Face model directory, download it first")
    if path.is_file():
        raise SourceError(f"{path}: is a file; MODEL is the directory, here {path.parent}")
    file = path / "config.json"
    if not file.is_file():
        raise SourceError(f"{path}: no config.json here; MODEL is a Hugging Face model directory with safetensors weights")
    try:
        config: dict[str, Any] = json.loads(file.read_text())
    except ValueError as error:
        raise SourceError(f"{file}: not valid JSON ({error}); download it again") from error
    if not isinstance(config, dict):
        raise SourceError(f"{file}: holds a JSON {type(config).__name__} where an object is needed; download it again")
    if config.get("quantization_config", ...) is None:
        del config["quantization_config"]  # some write null for a dense model
    return config


def native_dtype(path: Path, device: torch.device) -> torch.dtype:
    """The dtype that a model directory names, where the device computes in it; else float32."""
    config = read_config(path)
    named = str(config.get("dtype", config.get("torch_dtype")))
    stored = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(named, torch.float32)
    native = torch.cpu._is_avx512_bf16_supported() and stored is torch.bfloat16
    return stored if device.type == "cuda" or native else torch.float32


def find_shards(path: Path) -> Mapping[str, str]:
    """Tensor name -> shard file name, from the only shard's header or the index; of both, transformers takes the former.

    Raises:
        SourceError: no safetensors here, or an index that is damaged or points elsewhere.
    """
    if (path / SINGLE).is_file():
        return dict.fromkeys(read_header(path / SINGLE), SINGLE)
    index = path / INDEX
    if index.exists():
        try:
            weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
            shards = sorted({os.fspath(shard) for shard in weight_map.values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SourceError(f"{index}: not a safetensors index ({error!r}); download it again") from error
        for shard in shards:
            if Path(shard).name != shard or shard in (".", ".."):
                raise SourceError(f"{index}: shard {shard!r} points outside the model directory; refusing to read it")
            if not (path / shard).is_file():
                raise SourceError(f"{path}: shard {shard} is named in the index but missing; download it")
        return weight_map
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
    if pickled:
        raise SourceError(
            f"{path}: only pickled weights ({pickled[0]}), which can run code when read; convert them first: python -c "
            f"\"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{path}').save_pretrained('OUT')\""
        )
    raise SourceError(f"{path}: neither {SINGLE} nor {INDEX}; MODEL is a Hugging Face directory with safetensors weights")


def read_header(shard: Path) -> dict[str, Header]:
    """Dtype and shape of every tensor of a shard, by name.

    Raises:
        SourceError: the file is truncated, or not safetensors.
    """
    try:
        size = shard.stat().st_size
        with shard.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size - 8, 100 * 2**20):
                raise ValueError(f"its header would take {length} bytes of {size}")
            entries: dict[str, Any] = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if size != 8 + length + end:
            raise ValueError(f"it holds {size} bytes where its header promises {8 + length + end}")
        unknown = sorted({entry["dtype"] for entry in entries.values()} - set(DTYPES))
        if unknown:
            raise SourceError(f"{shard}: tensors of dtype {', '.join(unknown)}, which cannot be read; use the original model")
        return {name: Header(DTYPES[entry["dtype"]], tuple(entry["shape"])) for name, entry in entries.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise SourceError(f"{shard}: not a whole safetensors file ({error}); download it again") from error
