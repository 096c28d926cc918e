"""Post-training compression of language models.

    import compressor
    compressor.quantize("model/", bits=4, out="model-int4")
    compressor.prune("model/", ratio=0.25, out="model-prune25")
    compressor.fit("model/", size="4GB", out="model-4GB")
    compressor.run("recipe.yaml", "model/", "out/")
    compressor.evaluate("out/", reference="model/")
    model = compressor.load("out/")

Importing the package is cheap: torch and transformers are imported with the first function that is used. Once transformers is
imported too, its `AutoModelForCausalLM.from_pretrained` keeps packed weights packed (compressor/runtime/hf_quantizer.py).
"""

from typing import TYPE_CHECKING, Any

from compressor.runtime.on_import import on_import

if TYPE_CHECKING:
    from compressor.api import Forecast, fit, forecast, prune, quantize, run
    from compressor.evaluation.evaluate import evaluate
    from compressor.pipeline.target_search import fit_recipe, search_plan
    from compressor.recipe.build import prune_recipe, quantize_recipe
    from compressor.runtime.load import generate, load

__all__ = [
    "Forecast",
    "evaluate",
    "fit",
    "fit_recipe",
    "forecast",
    "generate",
    "load",
    "prune",
    "prune_recipe",
    "quantize",
    "quantize_recipe",
    "run",
    "search_plan",
]
_HOME = {
    "evaluate": "compressor.evaluation.evaluate",
    "fit_recipe": "compressor.pipeline.target_search",
    "generate": "compressor.runtime.load",
    "load": "compressor.runtime.load",
    "prune_recipe": "compressor.recipe.build",
    "quantize_recipe": "compressor.recipe.build",
    "search_plan": "compressor.pipeline.target_search",
}


def _register() -> None:
    from compressor.runtime.hf_quantizer import register

    register()


on_import("transformers.quantizers.auto", _register)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module `compressor` has no attribute `{name}`")
    import importlib

    return getattr(importlib.import_module(_HOME.get(name, "compressor.api")), name)
