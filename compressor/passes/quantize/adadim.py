"""AdaDim: for each layer, groups along its input channels or along its output channels, whichever leaves the smaller error.

Groups of input channels (int_group) suffer from the few channels with large weights: each spoils the scale of its whole
group, in every row. Groups of output channels within one input channel (int_input_group) keep such a channel to itself. Which
is better differs from layer to layer, so both are solved, with error feedback, and the one with the smaller loss is kept.

Source: Heo et al., "Rethinking Channel Dimensions to Isolate Outliers for Low-bit Weight Quantization of Large Language
Models", ICLR 2024, section 4. What differs:

* The axis is chosen by the loss of GPTQ, which is what is then stored; the paper rounds to nearest to choose.
* The loss is that of the layer's own output; the paper takes the output of the attention for q, k and v, of the MLP for gate
  and up.
* Layers that are fused when served choose by themselves. Our runtime multiplies by each; no engine reads these groups anyhow.

Any formats can be options, not only these two: of equal size, if the comparison is to be fair.

Shape suffixes: O out_features, I in_features.
"""

from typing import ClassVar

from compressor.passes.quantize.gptq import GPTQ
from compressor.recipe.registry import node


@node
class AdaDim(GPTQ):
    """GPTQ in the format that serves each layer best: fields as of `gptq`, two options or more."""

    chooses: ClassVar[bool] = True


EXPORT = AdaDim
