"""Learned rounding: train the codes and scales of earlier passes so that the block's output is preserved.

The trained tensors are in compressor/passes/train/latents.py, the training loop in compressor/passes/train/loop.py.

Source: Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent" (AutoRound), EMNLP 2024 findings; Chen et al.,
"EfficientQAT", ACL 2025, section 3.2 (unbounded latents, scales trained jointly). Differences:

* The start is the result of an earlier pass such as GPTQ, not rounding to nearest.
* The target is the dense block's output on the dense model's hidden states; the input is that of the compressed model.
* The squared error is weighted by its effect on the model's predictions: compressor/pipeline/calibration/sensitivity.py.
* The optimizer is Adam.

Shape suffixes: O out_features, I in_features, D hidden, B samples, S sequence.
"""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from compressor.errors import RecipeError
from compressor.formats.base import Format, QuantizedTensor, borrowed
from compressor.formats.numerics.codes import FloatCodes, IntCodes, VectorCodes
from compressor.model.block import Block
from compressor.passes.quantize.gptq import output_energy
from compressor.passes.train.latents import FloatRounding, IntRounding, Rounding, VectorRounding
from compressor.passes.train.loop import LatentTraining, Text, Training
from compressor.pipeline.calibration.stats import Hessian
from compressor.pipeline.contract import Accumulator, Outcome, Stats
from compressor.recipe.registry import node


@node
class Learned(LatentTraining):
    """Train the roundings of earlier passes, codebooks included, without changing formats.

    The other fields are those of `LatentTraining`.

    Args:
        sensitivity: Weight errors by the Fisher information of the block's output. False uses the plain squared error.
    """

    sensitivity: bool = True
    needs: ClassVar[tuple[type[Accumulator], ...]] = (Hessian,)
    two_streams: ClassVar[bool] = True
    together: ClassVar[bool] = True

    @property
    def reads_metric(self) -> bool:
        return self.sensitivity

    def units(self, block: Block) -> Mapping[str, tuple[str, ...]]:
        """Return the layers that are already packed, each as a unit of its own. There is nothing to plan."""
        return {name: (name,) for name in block.layers if isinstance(block.installed.get(name), QuantizedTensor)}

    def apply(self, block: Block, stats: Stats, choice: Mapping[str, Format]) -> Outcome:
        if not block.layers:  # attention and MLP of this block were dropped
            return Outcome({}, {})
        start = {name: packed(block, name) for name in self.units(block)}
        if not start:
            raise RecipeError(f"{block.prefix}: no earlier pass has rounded a layer; put `gptq` or `rtn` before `learned`")
        assert block.unrounded is not None
        dense = {name: block.unrounded[name].float() for name in start}
        roundings = {name: rounding(new, dense[name], f"{block.prefix}.{name}") for name, new in start.items()}
        share_books(roundings, start, block.prefix)
        text = Text.of(stats.inputs, stats.targets, stats.ranks)
        metric_DD = stats.metric if self.sensitivity else None

        def missed(x_BSD: Tensor, y_BSD: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
            """Return the weighted squared error of the block's output, summed over tokens."""
            device = next(iter(weights.values())).device
            off = (block.forward(x_BSD.to(device), weights) - y_BSD.to(device)).float()
            return (off if metric_DD is None else off @ metric_DD).mul(off).sum()

        dtypes = {name: block.weight(name).dtype for name in start}
        training = Training(roundings, dtypes, text, missed, stats.ranks)
        before = training.loss()
        for done in training.run(self):
            stats.progress(done, self.steps)
        warnings: tuple[str, ...] = ()
        trained = training.roundings
        edits = {name: start[name].format.stored(r.result(), start[name].shape) for name, r in trained.items()}
        if not training.loss() < before:
            edits = start
            found = f"{self.steps} steps of training did not lower the error of its output on the calibration text"
            warnings = (f"{block.prefix}: {found}; its rounding stays as it was, try a lower lr",)
        errors = {n: _relative(edits[n], dense[n], stats[n, Hessian].value) for n in edits}
        return Outcome(edits, errors, warnings)


def _relative(new: QuantizedTensor, w_OI: Tensor, h_II: Tensor) -> float:
    """Return the squared error of a layer's output, relative to the output."""
    return output_energy(w_OI - new.dequantize(), h_II) / max(output_energy(w_OI, h_II), 1e-30)


def share_books(roundings: Mapping[str, Rounding], packed: Mapping[str, QuantizedTensor], prefix: str = "") -> None:
    """Make layers that share codebooks train the same tensor. With `prefix`, names are those inside the block."""
    for name, r in roundings.items():
        lender = borrowed(packed[name].format, packed[name].shape)[0].removeprefix(f"{prefix}.")
        if lender in roundings:
            r.scale = roundings[lender].scale


def packed(block: Block, name: str) -> QuantizedTensor:
    """Return the packed weight of a layer, from an earlier pass."""
    stored = block.installed[name]
    assert isinstance(stored, QuantizedTensor)
    return stored


def rounding(packed: QuantizedTensor, w_OI: Tensor, where: str) -> Rounding:
    """Return the trainable rounding of a weight `w_OI` that an earlier pass packed.

    Raises:
        RecipeError: Its codes are integers that are not stored in the order of the input channels.
    """
    codes = packed.format.codes(packed)
    if isinstance(codes, FloatCodes):
        return FloatRounding.at(codes, w_OI)
    if isinstance(codes, VectorCodes):
        return VectorRounding.at(codes, w_OI)
    if isinstance(codes, IntCodes) and codes.order_I is None:
        return IntRounding.at(codes, w_OI)
    raise RecipeError(
        f"{where}: `learned` trains no integers that are stored in another order ({packed.format.label}); leave it out"
    )


EXPORT = Learned
