"""`compress compare`: several models side by side, on the same text."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from compressor.cli import _arguments as a
from compressor.cli._show import print_json, print_table, progress, protocol
from compressor.report_html.numbers import size


def compare(
    models: Annotated[list[Path], typer.Argument(help="Model directories, dense or compressed.", metavar="MODEL…")],
    reference: Annotated[
        Path | None, typer.Option(help="The original of all of them: adds KL divergence, agreement and flips.")
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
    from compressor.comparison import compare as judge
    from compressor.comparison import page
    from compressor.model.writer import replace_text

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
    if report is not None:
        replace_text(report, page(found, reference))
    if as_json:
        print_json({"models": [one.to_dict() for one in found]})
        return
    rows = [
        [
            f"{'* ' if one.best else '  '}{one.name}",
            size(one.size_bytes),
            f"{one.bits_per_weight:.3f}",
            f"{one.model_bits_per_weight:.3f}",
            f"{one.quality['perplexity']:.4g}",
            *([f"{one.quality['kl']:.4g}", f"{one.quality['top1_agreement']:.2%}"] if reference else []),
        ]
        for one in found
    ]
    header = ("model", "size", "bits/weight, linear", "whole model", "perplexity", *(("KL", "top-1") if reference else ()))
    judged = found[0].quality
    print_table(f"{judged['tokens']:,} tokens of {judged['source']}; {protocol(judged)}", header, rows)
    sys.stdout.write(f"* no other model here is both smaller and {'closer to the original' if reference else 'better'}\n")
    if report is not None:
        sys.stdout.write(f"{report}\n")
