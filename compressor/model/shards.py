"""Safetensors files of any size from smaller ones, without holding them: only headers are in memory.

A file is 8 bytes of header length (little endian), a JSON header padded with spaces to a multiple of 8 bytes, and the data
without gaps. Tensors are ordered by element size, largest first, then by name, so that every tensor is aligned.
Source: the format's description, https://github.com/huggingface/safetensors#format.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from compressor.model.checkpoint import INDEX, SINGLE, Header, read_header
from compressor.model.header import DTYPES, spans

SHARD_BYTES = 5 * 10**9
COPY_BYTES = 2**24
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Shard:
    """One file to be written."""

    name: str
    tensors: tuple[str, ...]  # in file order
    header: bytes  # with its length in front

    @property
    def nbytes(self) -> int:
        return len(self.header) + self.data_bytes

    @property
    def data_bytes(self) -> int:
        return max((e["data_offsets"][1] for n, e in json.loads(self.header[8:]).items() if n != "__metadata__"), default=0)


def layout(headers: Mapping[str, Header], shard_bytes: int = SHARD_BYTES) -> list[Shard]:
    """Assign tensors to files: in name order, a new file when one would grow beyond `shard_bytes`."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, header in sorted(headers.items()):
        if groups[-1] and size + header.nbytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += header.nbytes
    single = len(groups) == 1
    shards = []
    for i, group in enumerate(groups, 1):
        ordered = tuple(sorted(group, key=lambda n: (-headers[n].dtype.itemsize, n)))
        name = SINGLE if single else f"model-{i:05d}-of-{len(groups):05d}.safetensors"
        shards.append(Shard(name, ordered, _header(ordered, headers)))
    return shards


def index(shards: list[Shard]) -> dict[str, Any]:
    """The content of model.safetensors.index.json."""
    weight_map = {tensor: shard.name for shard in shards for tensor in sorted(shard.tensors)}
    return {"metadata": {"total_size": sum(shard.data_bytes for shard in shards)}, "weight_map": weight_map}


def total_bytes(shards: list[Shard]) -> int:
    """Bytes of all files, the index included."""
    return sum(shard.nbytes for shard in shards) + (len(_index_text(shards)) if len(shards) > 1 else 0)


def assemble(parts: Iterable[Path], out: Path, shard_bytes: int = SHARD_BYTES) -> list[Shard]:
    """Join small safetensors files into shards (and their index) in a directory."""
    where: dict[str, Path] = {}
    headers: dict[str, Header] = {}
    for part in parts:
        for name, header in read_header(part).items():
            where[name], headers[name] = part, header
    shards = layout(headers, shard_bytes)
    places = {part: spans(part) for part in set(where.values())}
    for shard in shards:
        unfinished = out / f"{shard.name}.unfinished"
        with unfinished.open("wb") as file:
            file.write(shard.header)
            for name in shard.tensors:
                _copy(where[name], places[where[name]][name].begin, headers[name].nbytes, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(out / shard.name)
    if len(shards) > 1:
        (out / INDEX).write_text(_index_text(shards))
    return shards


def _index_text(shards: list[Shard]) -> str:
    return json.dumps(index(shards), indent=2) + "\n"


def _header(ordered: Iterable[str], headers: Mapping[str, Header]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in ordered:
        header = headers[name]
        entries[name] = {
            "dtype": NAMES[header.dtype],
            "shape": list(header.shape),
            "data_offsets": [offset, offset + header.nbytes],
        }
        offset += header.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _copy(source: Path, start: int, count: int, to: BinaryIO) -> None:
    with source.open("rb") as file:
        file.seek(start)
        while count:
            chunk = file.read(min(count, COPY_BYTES))
            if not chunk:
                raise OSError(f"{source}: ends {count} bytes early")
            to.write(chunk)
            count -= len(chunk)
