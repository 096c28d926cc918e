"""Everything that can be wrong with a written model, looked at in order: files, hashes, config, values, logits, loaders."""

from collections.abc import Callable
from pathlib import Path

import torch

from compressor.access import check_readable
from compressor.errors import SourceError
from compressor.evaluation.verify.check import Check, Progress, attempt
from compressor.evaluation.verify.files import check_config, check_copies, check_files, check_hashes
from compressor.evaluation.verify.loaders import check_logits, check_transformers
from compressor.evaluation.verify.values import check_reference, check_values
from compressor.host import known_state
from compressor.model.checkpoint import read_config
from compressor.model.source import ModelSource
from compressor.pipeline.manifest import read_manifest

CPU = torch.device("cpu")


@known_state()
def verify(
    directory: Path,
    reference: Path | None = None,
    device: torch.device = CPU,
    progress: Progress = lambda done, total, what: None,
) -> list[Check]:
    """Look at a model directory in every way there is.

    Args:
        directory: Written by a run, or by anybody.
        reference: The model that it was made from.
        device: Where our reader computes.
        progress: Called with what is done, of how much, and what is being looked at.

    Returns: one entry for each check, in order; a failed one does not stop those that are still possible.

    Raises:
        SourceError: no model directory, or a manifest or weights that cannot be read at all.
    """
    for place in (directory, *([reference] if reference is not None else [])):
        read_config(place)
        check_readable(sorted(place.glob("*.safetensors*")), SourceError)
    manifest = read_manifest(directory)
    checks = [
        attempt("files", lambda: check_files(directory)),
        attempt("hashes", lambda: check_hashes(directory, manifest, progress)),
        attempt("config", lambda: check_config(directory, manifest)),
        attempt("copies", lambda: check_copies(directory, manifest)),
    ]
    tokens = torch.tensor([manifest.probe.tokens]) if manifest is not None and manifest.probe is not None else None
    loading: dict[str, Callable[[], str]] = {
        "values": lambda: check_values(ModelSource(directory, CPU), progress),
        "logits": lambda: check_logits(directory, manifest, device, progress),
        "transformers": lambda: check_transformers(directory, ModelSource(directory, CPU), tokens, progress),
    }
    if reference is not None:
        loading["reference"] = lambda: check_reference(ModelSource(directory, device), reference, progress)
    obstacle = _obstacle(directory)
    for name, work in loading.items():
        checks.append(attempt(name, work) if obstacle is None else Check(name, "skipped", f"cannot be opened: {obstacle}"))
    return checks


def _obstacle(directory: Path) -> str | None:
    """Why the model cannot be opened."""
    try:
        ModelSource(directory, CPU)
    except SourceError as error:
        return str(error)
    return None
