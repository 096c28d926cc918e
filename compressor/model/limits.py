"""Numbers in config.json with which building a model would take gigabytes or hours: refused before transformers sees them.

The model is built without its weights, so a large width alone costs nothing. Modules are objects of Python, though, and
tables of positions and masks are computed.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from compressor.errors import SourceError
from compressor.reading import elide

COUNTS = ("layer", "block", "depth", "expert", "branch")  # parts of the names of numbers of modules
MAX_COUNT = 10_000
MAX_SIZE = 2**27  # of any number that is a size
SIZES = ("size", "dim", "head", "embd", "inner", "channel", "position", "width")
MAX_SQUARE = 2**15  # positions, of model types that compute a mask [positions, positions]
SQUARES = ("gpt_neo", "gpt_bigcode", "openai-gpt", "imagegpt")
BLOCKS = "num_hidden_layers"
REMEDY = "weights and config.json do not belong together"


def check_limits(config: Mapping[str, Any], tensors: int, where: str) -> None:
    """Refuse a config that describes an absurdly large model.

    Args:
        config: Content of config.json, with a known `model_type`.
        tensors: Number of tensors in the checkpoint.
        where: Model directory, for errors.

    Raises:
        SourceError: a number is beyond what a model can have, or the blocks are fewer than 0 or more than the tensors.
    """
    kind = config["model_type"]
    for key, value in _numbers({name: entry for name, entry in config.items() if name != "quantization_config"}):
        limit = _limit(key, kind)
        if limit is not None and abs(value) > limit:
            raise SourceError(
                f"{where}: cannot build a model from config.json: {elide(key, 40)} is {elide(str(value), 40)} where at most "
                f"{limit:,} are supported; {REMEDY}"
            )
    blocks = config.get(CONFIG_MAPPING[kind].attribute_map.get(BLOCKS, BLOCKS))
    if isinstance(blocks, int) and not 0 <= blocks <= tensors:
        raise SourceError(
            f"{where}: cannot build a model from config.json: it has {blocks:,} decoder blocks where the checkpoint has "
            f"{tensors:,} tensors; {REMEDY}"
        )


def _limit(key: str, kind: str) -> int | None:
    """The largest value of a key, if it has one."""
    if "position" in key and kind in SQUARES:
        return MAX_SQUARE
    if any(part in key for part in COUNTS):
        return MAX_COUNT
    return MAX_SIZE if any(part in key for part in SIZES) else None


def _numbers(data: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Every number in nested dictionaries and lists, with the key that it or its list stands under."""
    if isinstance(data, dict):
        for name, value in data.items():
            yield from _numbers(value, name)
    elif isinstance(data, list):
        for value in data:
            yield from _numbers(value, key)
    elif isinstance(data, int | float):
        yield key, data
