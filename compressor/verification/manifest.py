"""manifest.json: what a run computed, taken from memory, so that what happens to the files afterwards shows.

    {"version": 1, "config_sha256": …, "files": {name: sha256}, "tensors": {name: {"dtype", "shape", "sha256"}},
     "probe": {…} or null}

Tensors are hashed before they are written the first time; the probe is what the model computed while the run had it in
memory (see compressor.verification.probe). Neither depends on the code that writes or reads files.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.access import check_readable
from compressor.errors import SourceError
from compressor.model.shards import NAMES
from compressor.verification.probe import Record

MANIFEST = "manifest.json"
VERSION = 1

Entry = Mapping[str, Any]  # dtype (as safetensors names it), shape, sha256


@dataclass(frozen=True)
class Manifest:
    """What a directory is to be compared with."""

    config_sha256: str
    files: Mapping[str, str]  # by name, the hashes of those that were copied: tokenizer, chat template, …
    tensors: Mapping[str, Entry]  # by name
    probe: Record | None  # None for an architecture that cannot be streamed

    def text(self) -> str:
        """The content of manifest.json."""
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
    """The manifest's entries of some tensors."""
    return {
        name: {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "sha256": sha256(tensor)}
        for name, tensor in tensors.items()
    }


def sha256(tensor: Tensor) -> str:
    """Hash of a tensor's bytes as a file holds them."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of a directory; None if it has none, as one that somebody else wrote.

    Raises:
        SourceError: it cannot be read.
    """
    file = directory / MANIFEST
    check_readable([file], SourceError)
    if not file.is_file():
        return None
    try:
        data = json.loads(file.read_text())
        if data["version"] != VERSION:
            raise ValueError(f"version {data['version']} where {VERSION} is known")
        probe = Record.from_dict(data["probe"]) if data["probe"] is not None else None
        tensors = {name: {key: entry[key] for key in ("dtype", "shape", "sha256")} for name, entry in data["tensors"].items()}
        files = {str(name): str(known) for name, known in data["files"].items()}
        return Manifest(data["config_sha256"], files, tensors, probe)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise SourceError(f"{file}: cannot be read ({error!r}); get the directory again from where it came") from error
