"""`compress inspect`: what is in a model directory."""

from pathlib import Path

from compressor.cli import _arguments as a
from compressor.cli._show import print_json, print_table, size


def inspect(model: a.Model = Path(), as_json: a.Json = False) -> None:
    """Show a model's size by kind of tensor and its bits per weight. Reads headers only.

    Example: `compress inspect model-int4`
    """
    from compressor.cli._quiet import quiet
    from compressor.inspection import inspect_model

    quiet()
    found = inspect_model(model)
    if as_json:
        print_json(found.to_dict())
        return
    rows = [
        (
            kind.name,
            f"{kind.weights:,}",
            size(kind.size_bytes),
            f"{kind.size_bytes / found.size_bytes:.1%}",
            f"{kind.bits:.3f}",
        )
        for kind in found.kinds
    ]
    rows.append(("total", f"{found.weights:,}", size(found.size_bytes), "100.0%", f"{found.model_bits_per_weight:.3f}"))
    title = f"{model}: {found.model_type}, {found.blocks} blocks, {found.layout}"
    print_table(title, ("kind", "weights", "size", "share", "bits per weight"), rows)
