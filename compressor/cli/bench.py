"""`compress bench`: how fast a model runs, and what memory it takes, beside the original."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from compressor.cli import _arguments as a
from compressor.cli._show import print_json, print_table, progress
from compressor.report.html.numbers import size


def bench(
    model: a.Model = Path(),
    reference: Annotated[Path | None, typer.Option(help="Original model, measured in turn with MODEL.")] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(help="Number of sequences in a batch; repeatable. [default: 1, 8 and 32]", show_default=False),
    ] = None,
    prompt_len: Annotated[
        int | None, typer.Option(help="Tokens of a prompt. [default: 128, or as many as the model has room for]")
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Decoding steps to time.")] = 32,
    rounds: Annotated[int, typer.Option(help="Number of measurements; the figures are medians.")] = 3,
    threads: Annotated[int | None, typer.Option(help="Number of CPU threads. [default: torch's]")] = None,
    save: Annotated[
        bool, typer.Option("--save", help="Put the figures into MODEL's report.json, report.html and README.md.")
    ] = False,
    as_json: a.Json = False,
    device: a.Device = None,
    dtype: a.Dtype = None,
) -> None:
    """Measure tokens per second, time to the first token, peak memory, and GB/s against what the memory gives.

    Each model runs in a process of its own and they take turns, so that a busy machine treats them alike. Both are in memory
    at once. Without --dtype they compute in MODEL's, where the hardware does.

    Example: `compress bench model-int4 --reference model/ --batch 1 --batch 16 --save`
    """
    from compressor.cli._quiet import quiet
    from compressor.model.device import compute_device
    from compressor.pipeline.job import Event
    from compressor.pipeline.prepare import computation_dtype
    from compressor.report import files
    from compressor.runtime import bench as runtime

    quiet()
    if save:
        files.read_report(model)  # fails before the work
    place = compute_device(device)
    with progress() as tell:
        speed = runtime.bench(
            model,
            reference,
            batches=batch or (1, 8, 32),
            prompt=prompt_len,
            new_tokens=new_tokens,
            rounds=rounds,
            threads=threads,
            device=place,
            dtype=computation_dtype(place, dtype, model),
            tell=lambda done, total, what: tell(Event("bench", done, total, what)),
        )
    if save:
        files.amend(model, speed=speed.to_dict())
    if as_json:
        print_json(speed.to_dict())
    else:
        print_speed(speed.to_dict())


def print_speed(speed: Mapping[str, Any]) -> None:
    """Print the measurements: by phase and batch, then by model."""
    rows, models = speed["rows"], list(speed["runtime"])
    compared = len(models) > 1
    table = []
    for row in rows:
        rate, used = row["tokens_per_second"], row["gb_per_second"]
        table.append(
            [
                f"{row['phase']}, batch {row['batch']}, {row['model']}",
                f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}",
                f"{row['spread']:.0%}",
                *([f"{row['speedup']:.2f} x"] if compared else []),
                f"{used:.3g}" if used is not None else "",
                f"{used / speed['bandwidth_gb_s']:.0%}" if used is not None else "",
            ]
        )
    where = f"{speed['device']}, {speed['threads']} threads, {speed['dtype']}; memory {speed['bandwidth_gb_s']:.3g} GB/s"
    what = f"prompts of {speed['prompt']} tokens, {speed['new_tokens']} steps, median of {speed['rounds']} rounds"
    header = ["", "tokens/s", "spread", *([f"of {models[0]}"] if compared else []), "GB/s", "of memory's"]
    print_table(f"{where}; {what}", header, table)
    device_peaks = speed["peak_device_memory_bytes"]
    on_gpu = any(device_peaks.values())
    alone = {r["model"]: r["first_token_seconds"] for r in rows if (r["phase"], r["batch"]) == ("prefill", 1)}
    print_table(
        "by model",
        ("", "runs as", "loaded in", "first token", "peak memory", *(("on the GPU",) if on_gpu else ())),
        [
            [
                name,
                speed["runtime"][name],
                f"{speed['load_seconds'][name]:.2f} s",
                f"{1000 * alone[name]:.3g} ms",
                size(speed["peak_memory_bytes"][name]),
                *([size(device_peaks[name])] if on_gpu else []),
            ]
            for name in models
        ],
    )
