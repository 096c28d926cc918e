"""`compress demo`: the main job on the embedded model, in a minute or two."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from compressor.cli import _arguments as a
from compressor.cli._show import print_json, print_table, progress
from compressor.report.html.numbers import size

PROMPT = "def read(self, size=-1):"


def demo(
    bits: Annotated[list[int] | None, typer.Option(help="Bits of a weight; repeatable. [default: 4 and 3]")] = None,
    method: Annotated[str, typer.Option(help="gptq or rtn.")] = "gptq",
    out: Annotated[Path, typer.Option(help="Directory for the models.")] = Path("demo-out"),
    as_json: a.Json = False,
) -> None:
    """Quantize the embedded demo model, compare it with the original, and show where the result lies.

    Needs no network and no GPU. Results of an earlier demo in the same place are replaced.
    """
    from compressor import api
    from compressor.assets import DEMO_MODEL
    from compressor.cli._quiet import quiet
    from compressor.model.journal import replace_text, writing
    from compressor.recipe.build import quantize_recipe
    from compressor.report.html.page import render
    from compressor.runtime.load import generate

    quiet()
    models = [("original", DEMO_MODEL)]
    reports = {}
    for width in dict.fromkeys(bits or (4, 3)):
        target = out / f"demo-{method}-int{width}"
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
        with progress() as tell:
            recipe = quantize_recipe(width, method=method)
            reports[target.name] = api.run(recipe, DEMO_MODEL, target, overwrite=True, device="cpu", tell=tell)
        models.append((target.name, target))
    page = out / "report.html"
    replace_text(page, render([report.to_dict() for report in reports.values()], "The demo model, compressed"))
    samples = {name: generate(path, PROMPT, max_new_tokens=48) for name, path in models}
    if as_json:
        results = {name: report.to_dict() for name, report in reports.items()}
        print_json({"models": results, "prompt": PROMPT, "samples": samples})
        return
    first = next(iter(reports.values()))
    assert first.quality is not None
    rows = [["original", size(first.source_size_bytes), "16", f"{first.quality['reference_perplexity']:.2f}", "0", "100%"]]
    for name, report in reports.items():
        q = report.quality
        assert q is not None
        rows.append(
            [
                name,
                size(report.size_bytes),
                f"{report.bits_per_weight:.2f}",
                f"{q['perplexity']:.2f}",
                f"{q['kl']:.4f}",
                f"{q['top1_agreement']:.1%}",
            ]
        )
    header = ("model", "size", "bits per weight*", "perplexity", "KL, nats/token", "top-1 agreement")
    print_table("the demo model on held-out modules of the standard library", header, rows)
    sys.stdout.write("* of the compressed layers, scales included\n")
    for name, text in samples.items():
        sys.stdout.write(f"\n--- {name} continues: {PROMPT}\n{PROMPT}{text.rstrip()}\n")
    sys.stdout.write(
        f"\nThe models are in {out.resolve()}; `compress inspect` and `compress eval` take them, and so does transformers.\n"
        f"All of this as a page, and more: {page.resolve()}\n"
    )
