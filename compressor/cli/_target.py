"""Define the options of the verbs that search for a plan."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compressor.cli._show import print_table, print_warnings

if TYPE_CHECKING:
    from compressor.pipeline.search.find import Found

Size = Annotated[
    str | None, typer.Option(help="Of the weight files, at most: 4GB, 3.5GiB, 800MB or bytes.", show_default=False)
]
Bits = Annotated[
    float | None,
    typer.Option(help="Bits of a weight of the compressed layers, at most, scales and codebooks counted: 2.75."),
]
Ratio = Annotated[float | None, typer.Option(help="Share of the original's size to save, at least: 0.8 leaves a fifth.")]
Using = Annotated[
    str,
    typer.Option(
        help="Numbers to mix, with commas between them: int, fp4, vq. With prune attentions and MLPs may go. What has "
        "vq or prune only compressor.load reads."
    ),
]
Time = Annotated[
    str | None, typer.Option(help="That all of it may take: 90s, 30m, 2h. Less is tried. [default: what it takes]")
]
Levels = Annotated[
    Path | None,
    typer.Option(help="Directory for what is measured, kept for other targets. [default: beside OUT until that is there]"),
]
Calibration = Annotated[str, typer.Option(help="builtin, a .txt/.jsonl/.parquet file, or hf:NAME[:CONFIG][:SPLIT][:COLUMN].")]
Samples = Annotated[int, typer.Option(help="Calibration samples; the search reads more text of the same source.")]
Ignore = Annotated[list[str] | None, typer.Option(help="Pattern of layers to leave as they are; repeatable.")]


def print_found(found: "Found") -> None:
    """Print the loss of the choices that the search found, the best at the end."""
    rows = [
        (one.name, f"{one.bits_per_weight:.3f}", f"{one.kl:.4f}", f"{one.seconds:.0f} s" if one.seconds else "")
        for one in sorted(found.contestants, key=lambda one: -one.kl)
    ]
    print_table("choices, judged on text that none was made on", ("", "bits/weight", "KL", "after"), rows)
    print_warnings(found.warnings)
