"""Named ways to quantize: the passes that `compress quantize --method NAME` stands for, and the best for a number of bits.

A new one is a row of `METHODS`; what it is made of is in compressor/passes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compressor.errors import RecipeError
from compressor.registry import suggestion

INTEGERS, FLOATS = "int", ("nvfp4", "mxfp4")  # what --format takes
FLOAT_BITS, GROUP_SIZE = 4, 128
LEARNED_BITS = 4  # and fewer: what learned rounding is worth its time for


@dataclass(frozen=True)
class Method:
    """A chain of passes.

    Args:
        about: What it is, for --help and the table of methods.
        passes: Each as in a recipe, without the format and the layers.
        calibrated: Whether it reads text.
        also: Formats that are options besides the given one, with the same fields.
        integers: It works on integers alone.
    """

    about: str
    passes: Sequence[Mapping[str, Any]]
    calibrated: bool = True
    also: Sequence[str] = ()
    integers: bool = False


METHODS: Mapping[str, Method] = {
    "learned": Method(
        "GPTQ, then rounding and scales trained block by block", [{"pass": "gptq"}, {"pass": "learned"}], integers=True
    ),
    "gptq": Method("rounding with error feedback", [{"pass": "gptq"}]),
    "adadim": Method(
        "gptq, in groups along either axis, layer by layer", [{"pass": "adadim"}], also=("int_input_group",), integers=True
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
        "the same, then learned", [{"pass": "rotate", "learn": 200}, {"pass": "gptq"}, {"pass": "learned"}], integers=True
    ),
    "hqq": Method("scales fitted to the weights alone, no calibration", [{"pass": "hqq"}], calibrated=False, integers=True),
    "search": Method("rounding, scales searched for the least error", [{"pass": "rtn", "search": True}], calibrated=False),
    "rtn": Method("rounding to nearest, no calibration", [{"pass": "rtn"}], calibrated=False),
}
BARE = ("learned", "rotate")  # passes that take no format and no layers
TRYING = ("awq",)  # passes that prepare layers for the format that a later one rounds to


def best(bits: int, *, calibrated: bool, integers: bool = True) -> str:
    """The default: of the methods measured on the same model and text, the one with the least KL divergence."""
    if not calibrated:
        return "hqq" if integers else "search"
    return "learned" if integers and bits <= LEARNED_BITS else "gptq"


def chosen(method: str | None, bits: int, fmt: str = INTEGERS, *, calibrated: bool) -> str:
    """The method that was asked for, or the best, for numbers of a kind.

    Raises:
        RecipeError: no such method, one for other numbers, or one that reads text where none may be read.
    """
    if method is None:
        return best(bits, calibrated=calibrated, integers=fmt == INTEGERS)
    if method not in METHODS:
        raise RecipeError(f"--method: no method named `{method}`; {suggestion(method, list(METHODS))}")
    if METHODS[method].integers and fmt != INTEGERS:
        others = ", ".join(name for name, known in METHODS.items() if not known.integers)
        raise RecipeError(f"--method {method} --format {fmt}: `{method}` is for integers; take one of {others}")
    if METHODS[method].calibrated and not calibrated:
        raise RecipeError(f"--method {method} --no-calibration: `{method}` reads calibration text; leave out one of the two")
    return method


def option(fmt: str, bits: int, group_size: int | None, *, symmetric: bool) -> dict[str, Any]:
    """The format of the weights, as in a recipe.

    Raises:
        RecipeError: no such format, or one that leaves nothing to choose where something was chosen.
    """
    if fmt == INTEGERS:
        size = GROUP_SIZE if group_size is None else group_size
        return {"format": "int_group", "bits": bits, "group_size": size, "symmetric": symmetric}
    if fmt not in FLOATS:
        raise RecipeError(f"--format: no format named `{fmt}`; {suggestion(fmt, [INTEGERS, *FLOATS])}")
    if bits != FLOAT_BITS or group_size is not None or not symmetric:
        raise RecipeError(
            f"--format {fmt}: has {FLOAT_BITS} bits, groups of a size of its own, and no zero points; "
            "leave out --bits, --group-size and --asymmetric"
        )
    return {"format": fmt}


def passes(method: str, options: Sequence[Mapping[str, Any]], ignore: Sequence[str]) -> list[dict[str, Any]]:
    """The passes of a method, as plain data for a recipe."""
    also = [{**option, "format": name} for option in options for name in METHODS[method].also]
    rounding = {"options": [*map(dict, options), *also], "ignore": list(ignore)}
    trying = {"format": dict(options[0]), "ignore": list(ignore)}
    given: dict[str, dict[str, Any]] = {name: {} for name in BARE} | dict.fromkeys(TRYING, trying)
    return [{**step, **given.get(step["pass"], rounding)} for step in METHODS[method].passes]
