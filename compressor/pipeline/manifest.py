"""manifest.json: hashes and reference logits recorded in memory, so that later corruption of the files can be detected.

    {"version": 1, "config_sha256": …, "files": {name: sha256}, "tensors": {name: {"dtype", "shape", "sha256"}},
     "probe": {…} or null}

Tensors are hashed before they are first written. The probe holds logits computed while the run had the model in memory (see
compressor.pipeline.probe). Neither depends on the code that writes or reads files.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, NonNegativeInt, StringConstraints, ValidationError
from torch import Tensor

from compressor.access import check_readable
from compressor.errors import SourceError
from compressor.model.shards import NAMES
from compressor.pipeline.probe import Record
from compressor.reading import cause, elide, read_json_object

MANIFEST = "manifest.json"
VERSION: Literal[1] = 1

REMEDY = "get the directory again from where it came"

Entry = Mapping[str, Any]  # dtype (as safetensors names it), shape, sha256
Hash = Annotated[str, StringConstraints(max_length=100)]


def _inside(name: str) -> str:
    """Return the name of a file if it cannot lead out of a directory; raise ValueError otherwise."""
    parts = PurePosixPath(name).parts
    if not parts or parts[0] == "/" or ".." in parts or "\0" in name or "\\" in name:
        raise ValueError(f"`{elide(name, 60)}` points outside the directory")
    return name


class _Entry(BaseModel, strict=True):
    """The entry of a tensor in manifest.json."""

    dtype: str
    shape: list[NonNegativeInt]
    sha256: Hash


class _File(BaseModel, strict=True):
    """The content of manifest.json, with the probe as plain data."""

    version: Literal[1]
    config_sha256: Hash
    files: dict[Annotated[str, AfterValidator(_inside)], Hash]
    tensors: dict[str, _Entry]
    probe: dict[str, Any] | None


@dataclass(frozen=True)
class Manifest:
    """The hashes and the probe that a directory is compared with."""

    config_sha256: str
    files: Mapping[str, str]  # hashes by name of the other files: tokenizer, chat template, kernel sources, …
    tensors: Mapping[str, Entry]  # by name
    probe: Record | None  # None for an architecture that cannot be streamed

    def text(self) -> str:
        """Return the content of manifest.json."""
        probe = self.probe.to_dict() if self.probe is not None else None
        tensors = {name: dict(self.tensors[name]) for name in sorted(self.tensors)}
        data = {
            "version": VERSION,
            "config_sha256": self.config_sha256,
            "files": dict(self.files),
            "tensors": tensors,
            "probe": probe,
        }
        return json.dumps(data, separators=(",", ":")) + "\n"


def entries(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Return the manifest entries of some tensors."""
    return {
        name: {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "sha256": sha256(tensor)}
        for name, tensor in tensors.items()
    }


def sha256(tensor: Tensor) -> str:
    """Hash a tensor's bytes as they are stored in a file."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()


def read_manifest(directory: Path) -> Manifest | None:
    """Read the manifest of a directory; return None if there is none, for example if another tool wrote the directory.

    Raises:
        SourceError: the manifest cannot be read.
    """
    file = directory / MANIFEST
    check_readable([file], SourceError)
    if not file.is_file():
        return None
    data = read_json_object(file, SourceError, REMEDY)
    try:
        found = _File.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = elide(".".join(map(str, first["loc"])), 80)
        reason = elide(first["msg"].removeprefix("Value error, "), 100)
        raise SourceError(f"{file}: cannot be read ({place}: {reason}); {REMEDY}") from error
    try:
        probe = Record.from_dict(found.probe) if found.probe is not None else None
    except (ValueError, LookupError, TypeError, RuntimeError, OverflowError) as error:
        raise SourceError(f"{file}: cannot be read (probe: {cause(error)}); {REMEDY}") from error
    tensors = {name: entry.model_dump() for name, entry in found.tensors.items()}
    return Manifest(found.config_sha256, found.files, tensors, probe)
