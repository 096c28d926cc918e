"""The text for scoring candidate models during a search."""

from torch import Tensor

from compressor.errors import CalibrationError
from compressor.model.source import ModelSource
from compressor.model.tokenizer import load_tokenizer
from compressor.pipeline.calibration.data import Samples, load_samples
from compressor.recipe.schema import Recipe

HELD_OUT = 8  # ratio of the text that the search sees to the text for the final choice


def search_text(recipe: Recipe, tokens: int, source: ModelSource, calibration: Samples, key: str = "search.tokens") -> Tensor:
    """Return tokens [N, S] that follow the calibration tokens in their source, with an eighth more for the final choice.

    Args:
        recipe: Recipe that names the source.
        tokens: Minimum number of tokens, without the eighth.
        source: The model.
        calibration: Calibration text, which must not be used again.
        key: Key of the recipe that asks for the tokens, for the error message.

    Raises:
        CalibrationError: the source holds too few tokens.
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
