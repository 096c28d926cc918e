"""The safetensors files of a model directory: every tensor by name, none of them in memory until it is asked for."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compressor.access import check_readable, kind_of
from compressor.errors import SourceError
from compressor.model.header import DTYPES, spans
from compressor.reading import elide, read_json, read_json_object

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class Header:
    """The entry of one tensor in a shard's header."""

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
    kind = kind_of(path, SourceError)
    if kind is None:
        raise SourceError(f"{path}: no such directory; MODEL is a local Hugging Face model directory, download it first")
    if kind == "file":
        raise SourceError(f"{path}: is a file; MODEL is the directory, here {path.parent}")
    file = path / "config.json"
    check_readable([path, file], SourceError)
    if kind_of(file, SourceError) != "file":
        raise SourceError(f"{path}: no config.json here; MODEL is a Hugging Face model directory with safetensors weights")
    config = read_json_object(file, SourceError, "download it again")
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
    check_readable([path / SINGLE, path / INDEX], SourceError)
    if (path / SINGLE).is_file():
        return dict.fromkeys(read_header(path / SINGLE), SINGLE)
    index = path / INDEX
    if index.exists():
        weight_map = _weight_map(index)
        for shard in sorted(set(weight_map.values())):
            if Path(shard).name != shard or shard in (".", ".."):
                raise SourceError(
                    f"{index}: shard {elide(repr(shard))} points outside the model directory; refusing to read it"
                )
            check_readable([path / shard], SourceError)
            if kind_of(path / shard, SourceError) != "file":
                raise SourceError(f"{path}: shard {elide(shard)} is named in the index but missing; download it")
        return weight_map
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
    if pickled:
        raise SourceError(
            f"{path}: only pickled weights ({pickled[0]}), which can run code when read; convert them first: python -c "
            f"\"from transformers import AutoModelForCausalLM as M; M.from_pretrained('MODEL').save_pretrained('OUT')\""
        )
    raise SourceError(f"{path}: neither {SINGLE} nor {INDEX}; MODEL is a Hugging Face directory with safetensors weights")


def _weight_map(index: Path) -> dict[str, str]:
    """Return the content of an index: tensor name -> shard file name. Raises SourceError."""
    data = read_json(index, SourceError, "download it again")
    found = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(found, dict) or not all(isinstance(shard, str) for shard in found.values()):
        raise SourceError(f"{index}: not a safetensors index (no `weight_map` of names); download it again")
    return found


def read_header(shard: Path) -> dict[str, Header]:
    """Dtype and shape of every tensor of a shard, by name.

    Raises:
        SourceError: the file is truncated, or not safetensors.
    """
    found = spans(shard)
    size = shard.stat().st_size
    end = max((span.end for span in found.values()), default=None)
    if end is not None and size != end:
        raise SourceError(
            f"{shard}: not a whole safetensors file (it holds {size} bytes where its header promises {end}); "
            "download it again"
        )
    if unknown := sorted({span.dtype for span in found.values()} - set(DTYPES)):
        raise SourceError(
            f"{shard}: tensors of dtype {elide(', '.join(unknown))}, which cannot be read; use the original model"
        )
    return {name: Header(DTYPES[span.dtype], span.shape) for name, span in found.items()}
