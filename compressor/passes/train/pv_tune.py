"""PV-Tuning: train codebooks, scales and codes of all layers at once towards the predictions of the dense model.

The continuous step moves codebooks or scales along the gradient of the divergence of the predictions. The discrete step moves
codes. In each step and weight, only the latents of the vectors (or numbers) with the largest gradients move, limited by the
learning rate. A code changes once its latent is nearer to another.

Source: Malinovskii et al., "PV-Tuning: Beyond Straight-Through Estimation for Extreme LLM Compression", NeurIPS 2024.
Difference: latents persist between steps and start between the code and the dense weight, as in `learned`, so that codes that
were close to another one change first.

Shape suffixes: B samples, S sequence, D hidden, V vocabulary.
"""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from compressor.errors import RecipeError
from compressor.formats.base import QuantizedTensor
from compressor.passes.train.learned import rounding, share_books
from compressor.passes.train.loop import LatentTraining, Text, Training
from compressor.pipeline.contract import Whole
from compressor.recipe.registry import node


@node
class PVTune(LatentTraining):
    """Train the roundings of earlier passes in all blocks at once, without changing formats. It must be the last pass.

    It needs the model in memory, and about 50 more bytes per weight. The other fields are those of `LatentTraining`.

    Args:
        moving: Fraction of the codes of a weight that a step may move: those with the largest gradients.
    """

    lr: float = 0.005
    scale_lr: float = 5e-4
    moving: float = 1.0
    together: ClassVar[bool] = True
    trains_model: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.moving <= 1:
            raise ValueError(f"moving: {self.moving:g} is not above 0 and at most 1")

    def tune(self, whole: Whole) -> tuple[Mapping[str, QuantizedTensor], tuple[str, ...]]:
        start = whole.packed
        if not start:
            raise RecipeError("pv_tune: no earlier pass has rounded a layer; put `vptq` or `gptq` before it")
        roundings = {name: rounding(new, whole.dense[name].float(), name) for name, new in start.items()}
        share_books(roundings, start)
        text = Text.of(whole.inputs, whole.targets, whole.ranks)

        def diverged(x_BSD: Tensor, y_BSD: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
            """Return the KL divergence of the predictions, summed over tokens."""
            device = next(iter(weights.values())).device
            wanted_BSV = whole.teacher(y_BSD.to(device)).float().log_softmax(-1)
            found_BSV = whole.student(x_BSD.to(device), weights).float().log_softmax(-1)
            return (wanted_BSV.exp() * (wanted_BSV - found_BSV)).sum()

        training = Training(roundings, dict.fromkeys(start, whole.dtype), text, diverged, whole.ranks, self.moving)
        before = training.loss()
        for done in training.run(self):
            whole.progress(done, self.steps)
        if not training.loss() < before:
            found = f"{self.steps} steps did not bring its predictions nearer to those of the dense model"
            return {}, (f"pv_tune: {found}; it stays as it was, try a lower lr",)
        trained = training.roundings
        return {name: start[name].format.stored(r.result(), start[name].shape) for name, r in trained.items()}, ()


EXPORT = PVTune
