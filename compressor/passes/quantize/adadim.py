"""AdaDim: for each layer, groups along its input channels or along its output channels, whichever leaves the smaller error.

Groups of input channels (int_group) suffer from the few channels with large weights: each spoils the scale of its whole
group, in every row. Groups of output channels within one input channel (int_input_group) isolate such a channel. Which is
better differs from layer to layer, so both are solved, with error feedback, and the one with the smaller loss is kept.

Source: Heo et al., "Rethinking Channel Dimensions to Isolate Outliers for Low-bit Weight Quantization of Large Language
Models", ICLR 2024, section 4. Differences:

* The axis is chosen by the loss of GPTQ, whose result is then stored. The paper chooses after rounding to nearest.
* The loss is that of the layer's own output. The paper uses the output of the attention for q, k and v, and of the MLP for
  gate and up.
* Layers that are fused when served choose independently. Our runtime multiplies by each, and no other engine loads these
  groups.

Options may be any formats, not only these two. For a fair comparison they should have equal size.

Shape suffixes: O out_features, I in_features.
"""

from typing import ClassVar

from compressor.passes.quantize.gptq import GPTQ
from compressor.recipe.registry import node


@node
class AdaDim(GPTQ):
    """GPTQ in the best of two or more options for each layer. The fields are those of `gptq`."""

    chooses: ClassVar[bool] = True


EXPORT = AdaDim
