"""`compress compare`: several models side by side, on the same text."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compressor.cli import _arguments as a
from compressor.cli._show import print_json, print_table, progress
from compressor.report.html.model import protocol
from compressor.report.html.numbers import size

if TYPE_CHECKING:
    from compressor.evaluation.compare import Compared


def compare(
    models: Annotated[list[Path], typer.Argument(help="Model directories, dense or compressed.", metavar="MODEL…")],
    reference: Annotated[
        Path | None, typer.Option(help="Original of all of them: adds KL divergence, agreement and flips.")
    ] = None,
    data: a.Data = None,
    samples: a.Samples = 64,
    seq_len: a.SeqLen = None,
    stride: a.Stride = None,
    bos: a.Bos = None,
    documents: a.Documents = False,
    seed: a.Seed = 0,
    resident: a.Resident = False,
    report: Annotated[Path | None, typer.Option(help="Write the comparison as a page, like report.html of a run.")] = None,
    as_json: a.Json = False,
    device: a.Device = None,
    dtype: a.Dtype = None,
) -> None:
    """Judge models on the same text in one go, and mark those that no other one beats in both size and quality.

    Example: `compress compare model-int4 model-int3 --reference model/ --report compare.html`
    """
    from compressor.cli._quiet import quiet
    from compressor.evaluation.compare import compare as judge
    from compressor.evaluation.compare import page
    from compressor.model.journal import replace_text

    if report is not None:
        _check_place(report)
    quiet()
    with progress() as tell:
        found = judge(
            models,
            reference,
            data=data or ("builtin",),
            samples=samples,
            seq_len=seq_len,
            stride=stride,
            bos=bos,
            documents=documents,
            seed=seed,
            resident=resident,
            device=device,
            dtype=dtype,
            tell=tell,
        )
    print_json({"models": [one.to_dict() for one in found]}) if as_json else _print(found, compared=reference is not None)
    if report is not None:
        replace_text(report, page(found, reference))
        if not as_json:
            sys.stdout.write(f"{report}\n")


def _check_place(page: Path) -> None:
    """Before the work: whether the page can be written."""
    from compressor.errors import OutputError

    if page.is_dir() or not os.access(page.parent, os.W_OK | os.X_OK) or not page.parent.is_dir():
        raise OutputError(f"--report {page}: is no file in a directory that can be written to; name another")


def _print(found: Sequence["Compared"], *, compared: bool) -> None:
    """A row for each model."""
    rows = [
        [
            f"{'* ' if one.best else '  '}{one.name}",
            size(one.size_bytes),
            f"{one.bits_per_weight:.3f}",
            f"{one.model_bits_per_weight:.3f}",
            f"{one.quality['perplexity']:.4g}",
            *([f"{one.quality['kl']:.4g}", f"{one.quality['top1_agreement']:.2%}"] if compared else []),
        ]
        for one in found
    ]
    header = ("model", "size", "bits/weight, linear", "whole model", "perplexity", *(("KL", "top-1") if compared else ()))
    judged = found[0].quality
    print_table(f"{judged['tokens']:,} tokens of {judged['source']}; {protocol(judged['protocol'])}", header, rows)
    sys.stdout.write(f"* no other model here is both smaller and {'closer to the original' if compared else 'better'}\n")
