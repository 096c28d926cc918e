"""`compress verify`: whether a model directory holds what the run that wrote it computed, and loads as that."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from compressor.cli import _arguments as a
from compressor.cli._show import print_json, progress


def verify(
    model: a.Model = Path(),
    reference: Annotated[
        Path | None,
        typer.Option(help="Original model: tensors that were not compressed must equal it, the others must resemble it."),
    ] = None,
    device: a.Device = None,
    as_json: a.Json = False,
) -> None:
    """Read MODEL with every loader that claims to and compare it with what its compression run recorded.

    Hashes of all tensors, config.json, finite values, logits of our reader and of stock transformers. Exit status: 0 nothing
    is wrong, 1 a check failed, 2 could not run.

    Example: `compress verify model-int4 --reference model/`
    """
    from compressor.cli._quiet import quiet
    from compressor.evaluation.verify import verify as verification
    from compressor.model.device import compute_device
    from compressor.pipeline.job import Event

    quiet()
    with progress() as tell:
        checks = verification.verify(
            model, reference, compute_device(device), lambda done, total, what: tell(Event("verify", done, total, what))
        )
    failed = [check for check in checks if check.outcome == "failed"]
    if as_json:
        print_json({"path": str(model), "passed": not failed, "checks": [check.to_dict() for check in checks]})
    else:
        for check in checks:  # plain lines: the names of tensors must not be broken
            sys.stdout.write(f"{check.outcome:8} {check.check:13} {check.detail}\n")
    if failed:
        sys.stderr.write(
            f"{model}: {len(failed)} of {len(checks)} checks failed; get it again from where it came, or make it again\n"
        )
        raise SystemExit(1)
