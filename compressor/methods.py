"""Named ways to quantize: the passes that `compress quantize --method NAME` stands for, and the best for a number of bits.

A new one is a row of `METHODS`; what it is made of is in compressor/passes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compressor.errors import RecipeError
from compressor.registry import suggestion

LEARNED_BITS = 4  # and fewer: what learned rounding is worth its time for


@dataclass(frozen=True)
class Method:
    """A chain of passes.

    Args:
        about: What it is, for --help and the table of methods.
        passes: Each as in a recipe, without the format and the layers.
        calibrated: Whether it reads text.
        also: Formats that are options besides the given one, with the same fields.
    """

    about: str
    passes: Sequence[Mapping[str, Any]]
    calibrated: bool = True
    also: Sequence[str] = ()


METHODS: Mapping[str, Method] = {
    "learned": Method("GPTQ, then rounding and scales trained block by block", [{"pass": "gptq"}, {"pass": "learned"}]),
    "gptq": Method("rounding with error feedback", [{"pass": "gptq"}]),
    "adadim": Method("gptq, in groups along either axis, layer by layer", [{"pass": "adadim"}], also=("int_input_group",)),
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
    "hqq": Method("scales fitted to the weights alone, no calibration", [{"pass": "hqq"}], calibrated=False),
    "rtn": Method("rounding to nearest, no calibration", [{"pass": "rtn"}], calibrated=False),
}
BARE = ("learned", "rotate")  # passes that take no format and no layers
TRYING = ("awq",)  # passes that prepare layers for the format that a later one rounds to


def best(bits: int, *, calibrated: bool) -> str:
    """The default: of the methods measured on the same model and text, the one with the least KL divergence."""
    if not calibrated:
        return "hqq"
    return "learned" if bits <= LEARNED_BITS else "gptq"


def chosen(method: str | None, bits: int, *, calibrated: bool) -> str:
    """The method that was asked for, or the best.

    Raises:
        RecipeError: no such method, or one that reads text where none may be read.
    """
    if method is None:
        return best(bits, calibrated=calibrated)
    if method not in METHODS:
        raise RecipeError(f"--method: no method named `{method}`; {suggestion(method, list(METHODS))}")
    if METHODS[method].calibrated and not calibrated:
        raise RecipeError(f"--method {method} --no-calibration: `{method}` reads calibration text; leave out one of the two")
    return method


def passes(method: str, options: Sequence[Mapping[str, Any]], ignore: Sequence[str]) -> list[dict[str, Any]]:
    """The passes of a method, as plain data for a recipe."""
    also = [{**option, "format": name} for option in options for name in METHODS[method].also]
    rounding = {"options": [*map(dict, options), *also], "ignore": list(ignore)}
    trying = {"format": dict(options[0]), "ignore": list(ignore)}
    given: dict[str, dict[str, Any]] = {name: {} for name in BARE} | dict.fromkeys(TRYING, trying)
    return [{**step, **given.get(step["pass"], rounding)} for step in METHODS[method].passes]
