"""Estimate the memory of a run from the shapes of the model, before it begins.

Estimates are in bytes of resident memory, without the interpreter and its libraries. A run needs as much as its largest
stage.
"""

import math
from collections.abc import Sequence

from compressor.model.block import Block
from compressor.model.memory import available_memory, dense_bytes
from compressor.model.source import ModelSource
from compressor.pipeline.contract import PairedAccumulator, Pass
from compressor.pipeline.plan import rest_names

SHARE = 0.5  # largest share of available memory for a model that only writes samples, which must not abort a long run
# Bytes per trained weight: latent, gradient, two moments, initial value, fp64 sums, and the rounded weight with its
# gradient and intermediate values.
TRAINING = 4 + 4 + 8 + 4 + 8 + 4 + 8


def expected_memory(
    source: ModelSource, passes: Sequence[Pass], *, tokens: int, on_disk: bool = False, judged: int, batch: int
) -> int:
    """Return the peak of compressing blocks and evaluating the result, in bytes.

    Args:
        source: The model, pruned if the recipe prunes.
        passes: Passes of the recipe.
        tokens: Number of calibration tokens; 0 without calibration.
        on_disk: Whether hidden states are kept on disk.
        judged: Number of tokens that the result is evaluated on; 0 without evaluation.
        batch: Number of tokens that a block processes at once.
    """
    return max(_compressing(source, passes, tokens, batch, on_disk), _judging(source, judged, batch) if judged else 0)


def _compressing(source: ModelSource, passes: Sequence[Pass], tokens: int, batch: int, on_disk: bool) -> int:
    """Return the peak before the evaluation, in the dtype of computation."""
    block, size = largest_block(source), source.dtype.itemsize
    shapes = {name: block.shape(name) for name in block.layers}
    read_first = {layers[0] for step in passes if step.needs for layers in step.units(block).values()}
    hessians = [shapes[layer][1] ** 2 for layer in read_first]
    solved = max(hessians, default=0)
    largest = max((rows * columns for rows, columns in shapes.values()), default=0)
    outside = max((source.checkpoint.headers[name].nbytes for name in rest_names(source, {})), default=0)
    two_streams = any(step.two_streams for step in passes)
    paired = any(issubclass(kind, PairedAccumulator) for step in passes for kind in step.needs)
    kept_tokens = min(tokens, batch) if on_disk else tokens
    hidden = kept_tokens * hidden_size(source) * size * (3 if two_streams else 1)  # plus dense, before and after a block
    weights = sum(rows * columns for rows, columns in shapes.values())
    unrounded = weights if two_streams else 0
    trained = weights if any(step.two_streams and step.together for step in passes) else 0
    if any(step.reads_metric for step in passes):
        hidden += 4 * len(source.layers) * hidden_size(source) ** 2  # one metric per block
    kept = (block_parameters(block) + unrounded) * size + 8 * sum(hessians) * (2 if paired else 1)
    return hidden + max(
        2 * outside,  # once as stored, once in the dtype of computation
        kept + activations(block, min(tokens, batch), size) * (2 if paired else 1),  # collecting
        kept + (4 + 4 + 8) * solved,  # factorizing: the Hessian, its reordered copy, its factor in fp64
        kept + (4 + 4) * solved + 3 * 4 * largest,  # rounding: the Hessian, its factor, three copies of the weight
        kept + (4 + 4 + 4) * solved + 3 * 4 * largest if paired else 0,  # the same with a second statistic
        kept + TRAINING * trained + activations(block, min(tokens, batch), size) if trained else 0,
        _tuning(source, passes, hidden + 2 * outside),
    )


def _tuning(source: ModelSource, passes: Sequence[Pass], beside: int) -> int:
    """Return the peak while a pass trains the model: all blocks, the dense weights and the state of training."""
    if not any(step.trains_model for step in passes):
        return 0
    weights = sum(
        math.prod(block.shape(name))
        for block in (source.block(index, load=False) for index in range(len(source.layers)))
        for name in block.layers
    )
    return beside + weights * (TRAINING + 2 * source.dtype.itemsize)


def _judging(source: ModelSource, tokens: int, batch: int) -> int:
    """Return the peak of the evaluation: hidden states of both models in fp32, plus a block or both heads and logits."""
    block, once = largest_block(source), min(tokens, batch)
    head = source.vocab_size * (hidden_size(source) + once)
    return 2 * tokens * hidden_size(source) * 4 + max(4 * block_parameters(block) + activations(block, once, 4), 2 * 4 * head)


def generating(source: ModelSource) -> int:
    """Return the bytes of a complete dense model in memory, for generating text. Return 0 if it exceeds `SHARE` of memory."""
    needed = dense_bytes(source)
    return needed if needed <= SHARE * available_memory(source.device) else 0


def collecting(source: ModelSource, tokens: int, batch: int) -> int:
    """Return the peak of streaming calibration through a block: all hidden states, the block, and a batch's activations."""
    block, size = largest_block(source), source.dtype.itemsize
    hidden = tokens * hidden_size(source) * size
    return hidden + block_parameters(block) * size + activations(block, min(tokens, batch), size)


def activations(block: Block, tokens: int, size: int) -> int:
    """Return the bytes of activations in a gated MLP: three times its width, and once more in fp32 for a statistic."""
    return tokens * max((max(block.shape(name)) for name in block.layers), default=0) * (3 * size + 4)


def largest_block(source: ModelSource) -> Block:
    """Return the block with the most parameters. Some blocks may lack their attention or MLP."""
    return max((source.block(index, load=False) for index in range(len(source.layers))), key=block_parameters)


def block_parameters(block: Block) -> int:
    """Return the number of parameters of a block."""
    return sum(parameter.numel() for parameter in block.module.parameters())


def hidden_size(source: ModelSource) -> int:
    """Return the number of channels between blocks."""
    return int(source.model.config.get_text_config().hidden_size)
