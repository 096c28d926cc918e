"""Names in a recipe or a plan stand for what is there, or are refused in one sentence."""

import pytest

from compressor.errors import RecipeError
from compressor.recipe import registry


@pytest.mark.parametrize("name", [".x", "..", ".", "no.such.module", "json.decoder"])
def test_a_name_that_no_module_has_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="the module must be importable and define EXPORT"):
        registry.build("format", {"format": name})
