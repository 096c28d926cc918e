"""Recipes that `compress quantize` and `compress prune` build from their options."""

from collections.abc import Sequence
from typing import Any, TypedDict

from compressor.errors import RecipeError
from compressor.recipe import presets
from compressor.recipe.schema import Recipe, make_recipe

TAYLOR = "taylor"  # the score that has a pass of its own, `prune_taylor`


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
    """Build the recipe that `compress quantize` runs.

    Args:
        bits: Bits per weight; None takes 4, or the width of the format. For `vq` the maximum, codebooks included.
        fmt: `int`, a floating-point format of fixed width (`nvfp4`, `mxfp4`, `fp4`, `fp8` or `mxfp8`), or `vq` (vector
            quantization). None takes the format that the method is for.
        activations: Bits that activations are rounded to; 16 does not round them.
        method: A name in compressor/recipe/presets.py; None takes the best for the format and its bits.
        calibrated: False allows only methods without calibration text.
        group_size: Number of adjacent input channels that share a scale, -1 for whole rows; None takes 128.
        symmetric: False stores zero points, which only this project's loader reads.
        calibration: Source of the calibration text; None takes the built-in text.
        samples: Number of calibration samples.
        seq_len: Tokens per sample; None takes the model's context length, at most 2048.
        seed: Seed for the order of documents.
        ignore: Patterns of layers that are not quantized.
        evaluate: Whether to compare the result with the original.
        changes: `KEY=VALUE` changes to the recipe, as with --set.

    Raises:
        RecipeError: the options do not make a valid recipe.
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
    """Build the recipe that `compress prune` runs.

    If blocks or sub-layers are dropped, the remaining ones are refitted by least squares, block by block.

    Args:
        ratio: Share of the parameters to drop.
        of: Parameters that the ratio refers to: those of `model`, `blocks` or `mlp`.
        by: Dimension to prune. `width`: channels and heads; `hidden`: channels of the hidden state; `depth`: blocks;
            `sublayers`: attentions and MLPs.
        layout: For width. `uniform`: all blocks have the same shape; `per-layer`: each has widths of its own;
            `block-configs`: each MLP has a width of its own, in a form that other programs read.
        score: Criterion for what is dropped first: a score of `prune_width` or `taylor`, a basis of `prune_hidden`, a
            criterion of `prune_depth`. None takes the best.
        heads: Whether head groups may be dropped; for width.
        multiple: Divisor that the number of channels must keep; None chooses one that suits it, or 128 with `bits`.
        recover: Number of training steps towards the original's predictions; 0 trains nothing.
        bits: Bits per weight, if the pruned model is to be quantized too.
        calibration: Source of the calibration text.
        samples: Number of calibration samples.
        seq_len: Tokens per sample; None takes the model's context length, at most 2048.
        seed: Seed for the order of documents and for training.
        evaluate: Whether to compare the result with the original.
        changes: `KEY=VALUE` changes to the recipe, as with --set.

    Raises:
        RecipeError: the options do not make a valid recipe.
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
    """Return the pruning pass of `prune_recipe` with its options, as plain data."""
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
