"""`compress inspect`: what is in a model directory, and what can load it."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compressor.cli import _arguments as a
from compressor.cli._show import print_json, print_table, print_warnings
from compressor.report.html.numbers import size

if TYPE_CHECKING:
    from compressor.report.compatibility import Runtime
    from compressor.report.inspect import Inspection, Parameter


def inspect(
    model: a.Model = Path(),
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor with its parts.")] = False,
    as_json: a.Json = False,
) -> None:
    """Show a model's size by kind of tensor, its bits per weight, and which runtimes can load it. Reads headers only.

    Example: `compress inspect model-int4 --tensors`
    """
    from compressor.cli._quiet import quiet
    from compressor.report.inspect import inspect_model

    quiet()
    found = inspect_model(model)
    if as_json:
        print_json(found.to_dict())
        return
    rows = [(k.name, f"{k.weights:,}", size(k.size_bytes), f"{found.share(k):.1%}", f"{k.bits:.3f}") for k in found.kinds]
    rows.append(("total", f"{found.weights:,}", size(found.size_bytes), "100.0%", f"{found.model_bits_per_weight:.3f}"))
    cache = f", cache in {found.kv_cache}" if found.kv_cache is not None else ""
    turned = f", activations of {found.turned} layers turned" if found.turned else ""
    absent = f", without {found.absent} attentions and MLPs" if found.absent else ""
    narrow = ", blocks with widths of their own" if found.uneven else ""
    title = f"{model}: {found.model_type}, {found.blocks} blocks, {found.layout}{cache}{turned}{absent}{narrow}"
    print_table(title, ("kind", "weights", "size", "share", "bits per weight"), rows)
    if tensors:
        sys.stdout.writelines(_describe(found, tensor) for tensor in found.tensors)
    sys.stdout.writelines(_answer(runtime) for runtime in found.runtimes)
    print_warnings(found.warnings)


def _describe(found: "Inspection", tensor: "Parameter") -> str:
    """One line, which a pipe can search: the names of tensors are not broken."""
    parts = ", ".join(f"{part.name.rpartition('.')[2]} {part.dtype} {list(part.shape)}" for part in tensor.parts)
    bits = f"{tensor.bits:.3f} bits" if tensor.weights else tensor.kind
    return f"{tensor.name}: {parts}; {bits}, {size(tensor.size_bytes)}, {found.share(tensor):.2%}\n"


def _answer(runtime: "Runtime") -> str:
    verdict = "loads" if runtime.loads else "does not load"
    return f"{runtime.name:13} {verdict:14} {runtime.reason}{'' if runtime.tried else ' (as read, not run)'}\n"
