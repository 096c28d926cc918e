"""PV-Tuning: train codebooks, scales and codes of the whole compressed model towards the predictions of the dense one.

The continuous step moves codebooks or scales by the gradient of the divergence of the predictions. The discrete one moves
codes: of each weight, in each step, only the latents of the vectors (or numbers) with the largest gradients, as far as the
learning rate goes; a code changes once its latent is nearer to another.

Source: Malinovskii et al., "PV-Tuning: Beyond Straight-Through Estimation for Extreme LLM Compression", NeurIPS 2024. What
differs: latents are kept from step to step and start between the code and the dense weight, as in `learned`, so that a code
that was nearly the other one changes first.

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
    """Train what earlier passes rounded, all blocks together; the format stays. Put it last.

    It needs the model in memory, and for each weight about 50 bytes more. More fields: `LatentTraining`.

    Args:
        moving: Share of the codes of a weight that a step may move: those with the largest gradients.
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
            """KL divergence of the predictions, summed over tokens."""
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
