"""The recipes that `compress quantize` and `compress prune` stand for."""

from collections.abc import Sequence
from typing import Any, TypedDict

from compressor.errors import RecipeError
from compressor.recipe import presets
from compressor.recipe.schema import Recipe, make_recipe

TAYLOR = "taylor"  # the score that is a pass of its own


class QuantizeOptions(TypedDict, total=False):
    """The keywords of `quantize_recipe`, which says what they mean."""

    fmt: str | None
    activations: int
    method: str | None
    calibrated: bool
    group_size: int | None
    symmetric: bool
    calibration: str | None
    samples: int
    seq_len: int | None
    seed: int
    ignore: Sequence[str]
    evaluate: bool
    changes: Sequence[str]


class PruneOptions(TypedDict, total=False):
    """The keywords of `prune_recipe`, which says what they mean."""

    of: str
    by: str
    layout: str
    score: str | None
    heads: bool
    multiple: int | None
    recover: int
    bits: float | None
    calibration: str
    samples: int
    seq_len: int | None
    seed: int
    evaluate: bool
    changes: Sequence[str]


def quantize_recipe(
    bits: float | None = None,
    *,
    fmt: str | None = None,
    activations: int = presets.DENSE,
    method: str | None = None,
    calibrated: bool = True,
    group_size: int | None = None,
    symmetric: bool = True,
    calibration: str | None = None,
    samples: int = 128,
    seq_len: int | None = None,
    seed: int = 0,
    ignore: Sequence[str] = ("lm_head",),
    evaluate: bool = True,
    changes: Sequence[str] = (),
) -> Recipe:
    """The recipe that `compress quantize` runs.

    Args:
        bits: Bits of a weight; None takes 4, or the bits of the numbers; with `vq` the most that one may take, codebooks
            counted.
        fmt: `int`; `nvfp4`, `mxfp4`, `fp4`, `fp8` or `mxfp8`: floating-point numbers, which have bits of their own; `vq`:
            vectors out of codebooks. None takes what the method is for.
        activations: Bits that activations are rounded to; 16 leaves them as they are.
        method: A name in compressor/recipe/presets.py; None takes the best for the numbers and their bits.
        calibrated: False allows no method that reads text.
        group_size: Adjacent input channels that share a scale, -1 for whole rows; None takes 128.
        symmetric: False stores zero points, which only this project's loader reads.
        calibration: Where the text comes from; None takes the built-in text.
        samples: Number of calibration samples.
        seq_len: Tokens of each; None takes what the model was made for, at most 2048.
        seed: Seed of the order of documents.
        ignore: Patterns of layers to leave as they are.
        evaluate: Compare the result with the original.
        changes: `KEY=VALUE` changes to the recipe, as with --set.

    Raises:
        RecipeError: no recipe comes of it.
    """
    if calibration is not None and not calibrated:
        raise RecipeError(
            f"--calibration {calibration} --no-calibration: one asks for what the other rules out; leave out one of the two"
        )
    fmt = presets.numbers(method, fmt)
    bits = presets.width(fmt, bits)
    options = presets.formats(fmt, bits, group_size, symmetric=symmetric, activations=activations)
    name = presets.chosen(method, fmt, bits, calibrated=calibrated)
    if not calibrated and presets.static_inputs(options[0]):
        raise RecipeError(
            f"--activations {activations} --no-calibration: {options[0]['activations']} needs a scale from calibration; "
            "leave out one of the two"
        )
    data = {
        "passes": presets.passes(name, options, ignore, bits),
        "calibration": {"source": calibration or "builtin", "samples": samples, "seq_len": seq_len, "seed": seed},
        "evaluation": {} if evaluate else None,
    }
    return make_recipe(data, changes, "options")


def prune_recipe(
    ratio: float,
    *,
    of: str = "model",
    by: str = "width",
    layout: str = "uniform",
    score: str | None = None,
    heads: bool = True,
    multiple: int | None = None,
    recover: int = 0,
    bits: float | None = None,
    calibration: str = "builtin",
    samples: int = 128,
    seq_len: int | None = None,
    seed: int = 0,
    evaluate: bool = True,
    changes: Sequence[str] = (),
) -> Recipe:
    """The recipe that `compress prune` runs; what is left when whole parts went is fitted by least squares, block by block.

    Args:
        ratio: Share of the parameters that goes.
        of: Basis of the ratio: `model`, `blocks` or `mlp`.
        by: `width`: channels and heads; `hidden`: channels of the hidden state; `depth`: blocks; `sublayers`: attentions and
            MLPs.
        layout: `uniform`: every block of the same shape; `per-layer`: each with widths of its own; `block-configs`: the MLPs
            so, in a form that others read; of width.
        score: Score that decides what is dropped first: a score of `prune_width` or `taylor`, a basis of `prune_hidden`, a
            way of `prune_depth`. None takes the best.
        heads: Whether groups of heads may go; of width.
        multiple: Divisor of the number of channels; None takes what suits their number, with `bits` 128.
        recover: Steps of training towards the original's predictions; 0 trains nothing.
        bits: Bits of a weight, if the rest is to be quantized too.
        calibration: Where the text comes from.
        samples: Number of calibration samples.
        seq_len: Tokens of each; None takes what the model was made for, at most 2048.
        seed: Seed of the order of documents.
        evaluate: Compare the result with the original.
        changes: `KEY=VALUE` changes to the recipe, as with --set.

    Raises:
        RecipeError: no recipe comes of it.
    """
    if bits is not None and by in ("width", "hidden"):
        multiple = presets.GROUP_SIZE if multiple is None else multiple
    step = {"ratio": ratio, "of": of, **_pruning(by, layout, score, heads=heads, multiple=multiple, mlp=of == "mlp")}
    quantized: list[dict[str, Any]] = []
    if bits is not None:
        options = presets.formats(
            presets.INTEGERS, presets.width(presets.INTEGERS, bits), None, symmetric=True, activations=16
        )
        name = presets.chosen(None, presets.INTEGERS, bits, calibrated=True)
        quantized = presets.passes(name, options, ("lm_head",), bits)
    fitted = [{"pass": "distil_blocks", "steps": 0}] if by in ("depth", "sublayers") and ratio else []
    trained = [*fitted, *([{"pass": "recover", "steps": recover, "seed": seed}] if recover else [])]
    data = {
        "passes": [step, *trained, *quantized],
        "calibration": {"source": calibration, "samples": samples, "seq_len": seq_len, "seed": seed},
        "evaluation": {} if evaluate else None,
    }
    return make_recipe(data, changes, "options")


def _pruning(by: str, layout: str, score: str | None, *, heads: bool, multiple: int | None, mlp: bool) -> dict[str, Any]:
    """The pass of `prune_recipe`, and its options."""
    if by not in ("width", "hidden", "depth", "sublayers"):
        raise RecipeError(f"--by {by}: width, hidden, depth or sublayers")
    if by != "width" and (not heads or mlp or layout != "uniform"):
        raise RecipeError(f"--by {by}: --no-heads, --layout and --of mlp are for --by width")
    if by in ("depth", "sublayers"):
        if multiple is not None:
            raise RecipeError(f"--by {by}: what goes, goes as a whole; --multiple is for --by width and --by hidden")
        how = {} if score is None else {"by": score}
        return {"pass": "prune_depth", "parts": "blocks" if by == "depth" else by, **how}
    if by == "hidden":
        return {"pass": "prune_hidden", "multiple": multiple, **({} if score is None else {"basis": score})}
    if score == TAYLOR:
        if layout != "uniform":
            raise RecipeError(f"--score {TAYLOR} --layout {layout}: gradients are taken for uniform shapes; leave out one")
        return {"pass": "prune_taylor", "heads": heads, "multiple": multiple}
    how = {} if score is None else {"score": score}
    return {"pass": "prune_width", "heads": heads, "multiple": multiple, "layout": layout, **how}
