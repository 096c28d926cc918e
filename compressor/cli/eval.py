"""`compress eval`: perplexity of a model, what it lost against the original, and whether that is within limits."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from compressor.cli import _arguments as a
from compressor.cli._show import print_json, print_quality, progress


def eval_(
    model: a.Model = Path(),
    reference: Annotated[
        Path | None, typer.Option(help="The original model: adds KL divergence, agreement and flips.")
    ] = None,
    data: a.Data = None,
    samples: a.Samples = 64,
    seq_len: a.SeqLen = None,
    stride: a.Stride = None,
    bos: a.Bos = None,
    documents: a.Documents = False,
    seed: a.Seed = 0,
    resident: a.Resident = False,
    max_kl: Annotated[float | None, typer.Option(help="Exit 1 if the mean KL, of all or of one text, exceeds this.")] = None,
    max_kl_p99: Annotated[float | None, typer.Option(help="Exit 1 if its 99th percentile exceeds this.")] = None,
    max_ppl_increase: Annotated[
        str | None, typer.Option(help="Exit 1 if the perplexity grew by more than this share: 2% or 0.02.")
    ] = None,
    min_top1: Annotated[str | None, typer.Option(help="Exit 1 if the top-1 agreement is below this share.")] = None,
    as_json: a.Json = False,
    device: a.Device = None,
    dtype: a.Dtype = None,
) -> None:
    """Judge MODEL on text it was not calibrated on, streamed block by block: one larger than memory is no problem.

    Perplexities are only comparable under the same protocol, which is printed with them. Exit status: 0 done and within all
    limits, 1 a limit is broken, 2 could not run.

    Example: `compress eval model-int4 --reference model/ --max-kl 0.05 --max-ppl-increase 2%`
    """
    from compressor.errors import RecipeError
    from compressor.evaluation.limits import Limits, share

    limits = Limits(max_kl, max_kl_p99, share(max_ppl_increase, "--max-ppl-increase"), share(min_top1, "--min-top1"))
    if limits.any and reference is None:
        raise RecipeError("limits: nothing to compare with; give the original model as --reference")
    from compressor.cli._quiet import quiet
    from compressor.judging import evaluate

    quiet()
    with progress() as tell:
        quality = evaluate(
            model,
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
    broken = limits.broken(quality) if limits.any else []
    if as_json:
        print_json({**quality.to_dict(), "limits_broken": broken})
    else:
        print_quality(str(model), quality.to_dict())
    for sentence in broken:
        sys.stderr.write(f"limit broken: {sentence}\n")
    if broken:
        raise SystemExit(1)
