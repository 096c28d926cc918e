"""The text that whole models are compared on while one is searched for."""

from torch import Tensor

from compressor.errors import CalibrationError
from compressor.model.source import ModelSource
from compressor.model.tokenizer import load_tokenizer
from compressor.pipeline.calibration.data import Samples, load_samples
from compressor.recipe.schema import Recipe

HELD_OUT = 8  # the text that only the last word is spoken on is this fraction of what the search sees


def search_text(recipe: Recipe, tokens: int, source: ModelSource, calibration: Samples, key: str = "search.tokens") -> Tensor:
    """Tokens [N, S], so many and for the last word an eighth more: what follows those of calibration in its source.

    Args:
        recipe: Says where from.
        tokens: At least so many.
        source: The model.
        calibration: Text that must not be used again.
        key: Key of the recipe that asks for the tokens, for the message.

    Raises:
        CalibrationError: there are too few.
    """
    count, length = calibration.tokens.shape
    more = -(-tokens // length)
    more += max(1, more // HELD_OUT)
    spec = recipe.calibration
    try:
        everything = load_samples(
            spec.source, load_tokenizer(source.path), samples=count + more, seq_len=length, seed=spec.seed
        )
    except CalibrationError as error:
        raise CalibrationError(f"{key} {tokens}, besides those of calibration: {error}") from error
    return everything.tokens[count:]
