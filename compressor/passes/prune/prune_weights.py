"""Unstructured and N:M pruning: set a fraction of each layer's weights to zero, or keep N of every M adjacent ones of a row.

The choice of weights depends on `score`:

* `sparsegpt`: drop the weights of least cost w² / U_jj², in runs of 128 columns or of M. U is the upper Cholesky factor of
  the inverse Hessian, so the cost includes the compensation by later columns, which is then applied. Frantar and Alistarh,
  "SparseGPT", ICML 2023, algorithm 1. It is the sweep of compressor/passes/quantize/gptq.py on a grid of zeros and numbers.
  Difference: every run drops exactly the number demanded; the authors' code drops one more, even at sparsity 0.
* `wanda`, `ria` and `magnitude`: see compressor/passes/prune/masks.py. Scores are compared within each row for `wanda`,
  within the layer for the other two, and within each group for N:M. RIA's permutation of channels, which makes N:M easier,
  is left out: few channels of a model can be permuted freely.

With `refit` the kept weights become the least squares solution for the layer's output, whichever score chose them. Up to
damping and rounding to the stored dtype this cannot raise the loss on the calibration text. It gains more than the choice of
score: recipes/sparse24.yaml has figures.

Shape suffixes: O out_features, I in_features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from compressor.errors import RecipeError
from compressor.formats.base import Kept, QuantizedTensor, Stored
from compressor.formats.sparse_bitmask import NUMBERS, SparseBitmask, SparseGrid
from compressor.model.architecture import check_pattern
from compressor.model.block import Block
from compressor.passes.prune.masks import SCORES, damped, least_squares
from compressor.passes.quantize.gptq import MAX_DAMP, Factors, factors_of, gptq, output_energy
from compressor.passes.quantize.rounding import relative, units
from compressor.pipeline.calibration.stats import Hessian
from compressor.pipeline.contract import Accumulator, Outcome, Pass, Stats
from compressor.recipe.registry import node


@node
class PruneWeights(Pass):
    """Set single weights to zero.

    Args:
        score: Score by which weights are dropped.
        sparsity: Fraction of the weights to drop, from 0 to below 1. Of several, a search chooses one for each layer
            (`target`).
        pattern: Pattern N:M instead of a fraction, in quotes.
        refit: Refit the kept weights by least squares of the layer's output.
        damp: Damping added to the diagonal of the Hessian, as a fraction of its mean.
        stored: Storage: `bitmask`, only the kept weights, for compressor.load; `dense`, with zeros, for any software.
        layers: Patterns of layer names to prune (`*.down_proj`, or `re:` and a regular expression).
        ignore: Patterns of layer names not to prune.
    """

    score: Literal["sparsegpt", "wanda", "ria", "magnitude"] = "sparsegpt"
    sparsity: float | tuple[float, ...] | None = None
    pattern: str | int | None = None
    refit: bool = True
    damp: float = 0.01
    stored: Literal["bitmask", "dense"] = "bitmask"
    layers: tuple[str, ...] = ("*",)
    ignore: tuple[str, ...] = ("lm_head",)

    def __post_init__(self) -> None:
        if len(self.formats) > len(NUMBERS) and self.stored == "dense":
            raise ValueError("sparsity: stored dense all shares take as much, so there is nothing to choose; name one")
        if not self.formats:
            raise ValueError("sparsity: empty; name at least one share")
        if not 0 <= self.damp <= MAX_DAMP:
            raise ValueError(f"damp: {self.damp} is not in 0 … {MAX_DAMP:g}")
        for pattern in (*self.layers, *self.ignore):
            check_pattern(pattern)

    @property
    def formats(self) -> tuple[SparseBitmask, ...]:
        """Return one format for each sparsity (or the pattern) and each dtype that a checkpoint may have."""
        shares = self.sparsity if isinstance(self.sparsity, tuple) else (self.sparsity,)
        return tuple(
            SparseBitmask(sparsity=share, pattern=self.pattern, dtype=dtype) for share in shares for dtype in NUMBERS
        )

    @property
    def offers(self) -> tuple[SparseBitmask, ...] | tuple[Kept, ...]:
        """Return the formats, among which the checkpoint's dtype decides; or the fraction kept, if stored dense."""
        if self.stored == "bitmask":
            return self.formats
        if self.sparsity is None:
            return (Kept(*self.formats[0].group),)
        assert not isinstance(self.sparsity, tuple)
        stay = 1 - Fraction(self.sparsity).limit_denominator(10**6)
        return (Kept(*stay.as_integer_ratio()),)

    @property
    def needs(self) -> tuple[type[Accumulator], ...]:
        return (Hessian,) if self.refit or self.score != "magnitude" else ()

    def units(self, block: Block) -> Mapping[str, tuple[str, ...]]:
        """Return the units of a block. Layers that are fused when served form one unit, since they need the same format."""
        return units(block, self.layers, self.ignore)

    def suits(self, option: SparseBitmask | Kept, block: Block, layers: Sequence[str]) -> bool:
        """Return whether the checkpoint stores layers in the dtype of the format, or of any of them if stored dense."""
        formats = self.formats if isinstance(option, Kept) else (option,)
        dtypes = {block.dtypes[f"{name}.weight"] for name in layers}
        return any(dtypes == {NUMBERS[fmt.dtype][0]} for fmt in formats)

    def apply(self, block: Block, stats: Stats, choice: Mapping[str, SparseBitmask | Kept]) -> Outcome:
        option_of = {name: choice[unit] for unit, names in self.units(block).items() if unit in choice for name in names}
        edits: dict[str, Stored] = {}
        errors: dict[str, float] = {}
        warnings: list[str] = []
        for layers in stats.taps(option_of):
            seen = Seen.of(block, layers[0], stats, warnings) if self.needs else None
            for name in layers:
                w_OI = block.weight(name).float()
                packed = self.zeroed(w_OI, self._format(block, name, option_of[name]), seen)
                v_OI = packed.dequantize()
                edits[name] = packed if self.stored == "bitmask" else v_OI
                errors[name] = relative(w_OI - v_OI, w_OI) if seen is None else seen.relative(w_OI - v_OI, w_OI)
                stats.progress(len(edits), len(option_of))
        return Outcome(edits, errors, tuple(warnings))

    def zeroed(self, w_OI: Tensor, fmt: SparseBitmask, seen: "Seen | None") -> QuantizedTensor:
        """Prune a weight, and refit the rest if `refit` is set."""
        if self.score == "sparsegpt":
            assert seen is not None
            codes, _, grid = gptq(w_OI, seen.factor(self.damp, 1), fmt.fit(w_OI), static_groups=False)
            assert isinstance(grid, SparseGrid)
            v_OI = grid.decode(codes, 0)
        else:
            score_OI = SCORES[self.score](w_OI, seen.h_II.diagonal() if seen is not None else w_OI.new_ones(w_OI.shape[1]))
            grid = fmt.keeping(fmt.stays(score_OI, by_row=self.score == "wanda"))
            v_OI = torch.where(grid.stays_OI, w_OI, 0)
        if self.refit:
            assert seen is not None
            v_OI = least_squares(w_OI, v_OI, grid.stays_OI, damped(seen.h_II, self.damp))
        return grid.pack(grid.round(v_OI, 0))

    def _format(self, block: Block, name: str, option: SparseBitmask | Kept) -> SparseBitmask:
        """Return the format that describes how many weights of a layer are kept, also where they are stored dense."""
        if isinstance(option, SparseBitmask):
            return option
        fmt = next(fmt for fmt in self.formats if self.suits(fmt, block, [name]))
        try:
            fmt.gone(block.shape(name)[1])
        except ValueError as error:
            raise RecipeError(f"{block.prefix}.{name}: {error}") from error
        return fmt


@dataclass(frozen=True)
class Seen:
    """Statistics of a layer's input."""

    h_II: Tensor  # second moment, fp32
    factor: Factors  # factors of `h_II`

    @classmethod
    def of(cls, block: Block, layer: str, stats: Stats, warnings: list[str]) -> "Seen":
        """Return the statistics of a layer."""
        hessian = stats[layer, Hessian]
        h_II = hessian.value
        return cls(h_II, factors_of(f"{block.prefix}.{layer}", hessian.count, warnings, h_II, act_order=False))

    def relative(self, missed_OI: Tensor, w_OI: Tensor) -> float:
        """Return the error of the layer's output, relative to its mean squared norm."""
        return output_energy(missed_OI, self.h_II) / max(output_energy(w_OI, self.h_II), 1e-30)


EXPORT = PruneWeights
