"""Presets for quantization: the passes behind `compress quantize --method NAME`, and the best method for a number of bits.

A new method is a row of `METHODS`; its passes are in compressor/passes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compressor.errors import RecipeError
from compressor.recipe.registry import build, suggestion

INTEGERS, VECTORS, GROUP_SIZE = "int", "vq", 128
DENSE = 16  # bits of activations that are not rounded


@dataclass(frozen=True)
class Numbers:
    """A floating-point value of --format.

    Args:
        bits: Bits per weight, which the format fixes.
        options: Formats as in a recipe, of which each layer takes the best.
        activations: Activation scheme by number of bits.
        grouped: Whether the group size can be chosen.
    """

    bits: int
    options: Sequence[Mapping[str, Any]]
    activations: Mapping[int, str]
    grouped: bool = False


FLOATS: Mapping[str, Numbers] = {
    "nvfp4": Numbers(4, [{"format": "nvfp4"}], {4: "nvfp4", 8: "fp8"}),
    "mxfp4": Numbers(4, [{"format": "mxfp4"}], {4: "mxfp4", 8: "mxfp8"}),
    "fp4": Numbers(
        4,
        [{"format": "float_group", "exponent": e, "mantissa": 3 - e} for e in (2, 1, 3)],
        {4: "fp4-tensor", 8: "fp8-tensor"},
        grouped=True,
    ),
    "fp8": Numbers(8, [{"format": "fp8"}], {8: "fp8"}),
    "mxfp8": Numbers(8, [{"format": "mxfp8"}], {8: "mxfp8"}),
}
VECTOR_BITS = 2  # default bits per weight of vectors
FEWEST, MOST = 1, 4  # range of bits per weight of vectors
LARGEST_BOOK = 12  # largest index, in bits, whose codebook GPU kernels hold in fast memory
LEARNED_BITS = 4  # most bits at which learned rounding is worth its time


@dataclass(frozen=True)
class Method:
    """A chain of passes.

    Args:
        about: Description for --help and the table of methods.
        passes: Passes as in a recipe, without format and layers.
        calibrated: Whether it needs calibration text.
        only: Values of --format that it works with, the default first; None for all but vq.
    """

    about: str
    passes: Sequence[Mapping[str, Any]]
    calibrated: bool = True
    only: Sequence[str] | None = None


METHODS: Mapping[str, Method] = {
    "learned": Method("GPTQ, then rounding and scales trained block by block", [{"pass": "gptq"}, {"pass": "learned"}]),
    "gptq": Method("rounding with error feedback", [{"pass": "gptq"}]),
    "adadim": Method(
        "gptq, in groups along either axis, or to the best of several kinds of number, layer by layer",
        [{"pass": "adadim"}],
        only=(INTEGERS, "fp4"),
    ),
    "fpq": Method(
        "channels shifted by powers of two where activations are rounded, then adadim, then learned",
        [{"pass": "preshift"}, {"pass": "adadim"}, {"pass": "learned"}],
        only=("fp4",),
    ),
    "awq": Method(
        "channels with large activations scaled up, then rounding to nearest",
        [{"pass": "awq", "search": True}, {"pass": "rtn", "search": True}],
    ),
    "rotated": Method(
        "residual stream and heads rotated as suits the weights, then gptq",
        [{"pass": "rotate", "learn": 200}, {"pass": "gptq"}],
    ),
    "rotated-learned": Method(
        "the same, then learned", [{"pass": "rotate", "learn": 200}, {"pass": "gptq"}, {"pass": "learned"}]
    ),
    "vptq": Method("vectors out of codebooks, with error feedback", [{"pass": "vptq"}], only=(VECTORS,)),
    "vptq-learned": Method(
        "the same, then codebooks and indices trained block by block",
        [{"pass": "vptq"}, {"pass": "learned"}],
        only=(VECTORS,),
    ),
    "hqq": Method(
        "scales fitted to the weights alone, no calibration", [{"pass": "hqq"}], calibrated=False, only=(INTEGERS,)
    ),
    "search": Method("rounding, scales searched for the least error", [{"pass": "rtn", "search": True}], calibrated=False),
    "rtn": Method("rounding to nearest, no calibration", [{"pass": "rtn"}], calibrated=False),
}
BARE = ("learned", "rotate")  # passes that take no format and no layers
TRYING = ("awq", "preshift")  # passes that prepare layers for the format that a later pass rounds to
CHOOSING = ("adadim",)  # passes that choose among several formats
FEEDING = ("gptq",)  # passes with error feedback
SMALL_GROUPS = ("nvfp4",)  # formats for which error feedback does better if it fits each group's scale when it reaches it
SHIFTING = ("preshift",)  # passes that are useful only if one static scale serves all activations
BUDGETED = ("vptq",)  # passes that choose an option by a budget of bits per weight
BESIDE = {"int_group": "int_input_group"}  # format with the same fields that a choosing pass tries in addition


def best(fmt: str, bits: float, *, calibrated: bool) -> str:
    """Return the default method: of those measured on the same model and text, the one with the least KL divergence."""
    if fmt == VECTORS:
        return "vptq-learned"
    if not calibrated:
        return "hqq" if fmt == INTEGERS else "search"
    if bits > LEARNED_BITS:
        return "gptq"
    return "fpq" if fmt == "fp4" else "learned"


def numbers(method: str | None, fmt: str | None) -> str:
    """Return the value of --format: the given one, or the default of the method."""
    if fmt is not None:
        return fmt
    only = METHODS[method].only if method is not None and method in METHODS else None
    return INTEGERS if only is None else only[0]


def chosen(method: str | None, fmt: str, bits: float, *, calibrated: bool) -> str:
    """Return the given method, or the best one for a format and a number of bits.

    Raises:
        RecipeError: there is no such method, it does not work with the format, or it needs text and none is allowed.
    """
    method = best(fmt, bits, calibrated=calibrated) if method is None else method
    if method not in METHODS:
        raise RecipeError(f"--method: no method named `{method}`; {suggestion(method, list(METHODS))}")
    scalars = (INTEGERS, *FLOATS)
    if fmt not in (METHODS[method].only or scalars):
        able = ", ".join(name for name, known in METHODS.items() if fmt in (known.only or scalars))
        raise RecipeError(f"--method {method} --format {fmt}: `{method}` is not for these numbers; take one of {able}")
    if METHODS[method].calibrated and not calibrated:
        raise RecipeError(f"--method {method} --no-calibration: `{method}` reads calibration text; leave out one of the two")
    return method


def width(fmt: str, bits: float | None) -> float:
    """Return the bits per weight: the given ones, or the width of the format; for vectors the maximum.

    Raises:
        RecipeError: there is no such format, or it does not have that width.
    """
    if fmt == VECTORS:
        bits = VECTOR_BITS if bits is None else bits
        if not FEWEST <= bits <= MOST:
            raise RecipeError(f"--format {fmt} --bits {bits:g}: vectors are for {FEWEST} to {MOST} bits a weight")
        return bits
    if bits is not None and not math.isfinite(bits):
        raise RecipeError(f"--bits {bits}: no number of bits")
    if bits is not None and bits != int(bits):
        raise RecipeError(f"--format {fmt} --bits {bits:g}: a fraction of a bit is for --format {VECTORS}")
    if fmt == INTEGERS:
        return 4 if bits is None else int(bits)
    if fmt not in FLOATS:
        raise RecipeError(f"--format: no format named `{fmt}`; {suggestion(fmt, [INTEGERS, VECTORS, *FLOATS])}")
    if bits not in (None, FLOATS[fmt].bits):
        raise RecipeError(f"--format {fmt} --bits {bits:g}: these numbers have {FLOATS[fmt].bits} bits; leave out --bits")
    return FLOATS[fmt].bits


def formats(
    fmt: str, bits: float, group_size: int | None = None, *, symmetric: bool = True, activations: int = DENSE
) -> list[dict[str, Any]]:
    """Return the formats of the weights, as in a recipe; each layer may take the best of them.

    Raises:
        RecipeError: the format does not support one of the given settings.
    """
    if fmt == VECTORS:
        if not symmetric or group_size is not None or activations != DENSE:
            raise RecipeError(
                f"--format {fmt}: has neither groups nor zero points, and leaves activations alone; "
                "leave out --group-size, --asymmetric and --activations"
            )
        return vectors(bits)
    ways = {8: "int8"} if fmt == INTEGERS else FLOATS[fmt].activations
    if activations not in (DENSE, *ways):
        able = ", ".join(map(str, sorted((*ways, DENSE))))
        raise RecipeError(f"--format {fmt} --activations {activations}: these weights go with activations of {able} bits")
    rounded = {} if activations == DENSE else {"activations": ways[activations]}
    if fmt == INTEGERS:
        bytewise = {"packed": False} if rounded and bits == 8 else {}  # engines multiply this layout as integers
        size = (-1 if bytewise else GROUP_SIZE) if group_size is None else group_size
        return [{"format": "int_group", "bits": int(bits), "group_size": size, "symmetric": symmetric, **bytewise, **rounded}]
    if not symmetric or not (group_size is None or FLOATS[fmt].grouped):
        raise RecipeError(
            f"--format {fmt}: has no zero points, and groups of a size of its own; leave out --asymmetric and --group-size"
            if not FLOATS[fmt].grouped
            else f"--format {fmt}: has no zero points; leave out --asymmetric"
        )
    grouped = {} if group_size is None else {"group_size": group_size}
    return [{**option, **grouped, **rounded} for option in FLOATS[fmt].options]


KINDS = (INTEGERS, "fp4", VECTORS)  # formats that a search can mix
NEAR = 1.5  # largest distance of a unit's bits from the mean
WIDTHS = (2, 3, 4, 5, 6, 8)  # widths of integers in a search
LOWEST, HIGHEST = 3.5, 6  # to leave a choice, integers' upper bound is at least LOWEST, their lower at most HIGHEST
SEVERAL_GROUPS = 4  # most bits at which integers are tried with several group sizes


def ladder(kinds: Sequence[str], bits: float, ignore: Sequence[str]) -> list[dict[str, Any]]:
    """Return the passes of a search for a mean number of bits: each with its options near that, then those that train.

    Raises:
        RecipeError: there is no such format to mix, or none has options near that number of bits.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise RecipeError(f"--using {kind}: no such numbers to mix; {suggestion(kind, list(KINDS))}")
    found: list[dict[str, Any]] = []
    if INTEGERS in kinds:
        above = min((n for n in WIDTHS if n >= bits), default=max(WIDTHS))  # without it the mean could not be reached
        near = [n for n in WIDTHS if min(bits - NEAR, HIGHEST) <= n <= max(bits + NEAR, LOWEST) or n == above]
        sizes = {n: (128, 64, 32) if n <= SEVERAL_GROUPS else (128,) for n in near}
        options = [{"format": "int_group", "bits": n, "group_size": size} for n in near for size in sizes[n]]
        found.append({"pass": "gptq", "options": options})
    if "fp4" in kinds and bits + NEAR >= FLOATS["nvfp4"].bits:
        found.append({"pass": "gptq", "static_groups": False, "options": [{"format": "mxfp4"}, {"format": "nvfp4"}]})
    if VECTORS in kinds:
        books = [(8, 8, 0), (8, 6, 6), (8, 8, 8), (4, 8, 0), (4, 6, 6)]
        near_books = [book for book in books if abs((book[1] + book[2]) / book[0] - bits) <= NEAR]
        options = [{"format": VECTORS, "vector": v, "bits": main, "residual_bits": rest} for v, main, rest in near_books]
        found += [{"pass": "vptq", "options": options}] if options else []
    passes = [{**step, "ignore": list(ignore)} for step in found if step["options"]]
    if not passes:
        raise RecipeError(f"--using {','.join(kinds)}: none of these numbers has options near {bits:.2f} bits; add int")
    return [*passes, {"pass": "learned"}] if bits <= LEARNED_BITS else passes


def vectors(bits: float) -> list[dict[str, Any]]:
    """Return vector formats that take more than `bits` - 1 and at most `bits` bits per weight, codebooks not counted."""
    found = []
    for length in (8, 4):
        for index in range(int(length * bits), int(length * (bits - 1)), -1):
            halves, full = (index - index // 2, index // 2), (LARGEST_BOOK, index - LARGEST_BOOK)
            splits = {(index, 0), halves} if index <= LARGEST_BOOK else {halves, full}
            found += [
                {"format": VECTORS, "vector": length, "bits": main, "residual_bits": residual}
                for main, residual in sorted(splits, reverse=True)
                if max(main, residual) <= LARGEST_BOOK and main > 0
            ]
    return found


def passes(method: str, options: Sequence[Mapping[str, Any]], ignore: Sequence[str], bits: float) -> list[dict[str, Any]]:
    """Return the passes of a method for a number of bits, as plain data for a recipe."""
    first = dict(options[0])
    several = [*map(dict, options), *({**o, "format": BESIDE[o["format"]]} for o in options if o["format"] in BESIDE)]
    by_one_scale = first["format"] == "float_group" and static_inputs(first)

    def given(name: str) -> dict[str, Any]:
        if name in BARE:
            return {}
        if name in TRYING:
            return {"format": first, "ignore": list(ignore)}
        if name in BUDGETED:
            return {"budget": bits, "options": several, "ignore": list(ignore)}
        late = {"static_groups": False} if name in FEEDING and first["format"] in SMALL_GROUPS else {}
        return {**late, "options": several if name in CHOOSING else [first], "ignore": list(ignore)}

    wanted = [step for step in METHODS[method].passes if by_one_scale or step["pass"] not in SHIFTING]
    return [{**step, **given(step["pass"])} for step in wanted]


def static_inputs(option: Mapping[str, Any]) -> bool:
    """Return whether a format, given as plain data, rounds activations by a scale from calibration."""
    return bool(option.get("activations")) and bool(getattr(build("format", option), "static_inputs", False))
