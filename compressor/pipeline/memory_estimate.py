"""How much memory a run will take, told from the shapes of the model before it begins.

Estimates are of resident bytes beyond the interpreter and its libraries. A run takes as much as its largest stage.
"""

import math
from collections.abc import Sequence

from compressor.model.block import Block
from compressor.model.memory import available_memory, dense_bytes
from compressor.model.source import ModelSource
from compressor.pipeline.contract import PairedAccumulator, Pass
from compressor.pipeline.plan import rest_names

SHARE = 0.5  # of the available memory, at most, for a model that only writes samples: nothing may end a long run for them
# Bytes for each trained weight: latent and gradient, two moments, the start, fp64 sums, the rounded weight with its own
# gradient and what both pass through.
TRAINING = 4 + 4 + 8 + 4 + 8 + 4 + 8


def expected_memory(
    source: ModelSource, passes: Sequence[Pass], *, tokens: int, on_disk: bool = False, judged: int, batch: int
) -> int:
    """Peak of compressing blocks and of comparing the result.

    Args:
        source: The model, pruned if it is to be.
        passes: Passes of the recipe.
        tokens: Number of calibration tokens; 0 without calibration.
        on_disk: Their hidden states are not in memory.
        judged: Number of tokens that the result is evaluated on; 0 without evaluation.
        batch: Number of tokens that go through a block together.
    """
    return max(_compressing(source, passes, tokens, batch, on_disk), _judging(source, judged, batch) if judged else 0)


def _compressing(source: ModelSource, passes: Sequence[Pass], tokens: int, batch: int, on_disk: bool) -> int:
    """Peak of what comes before the comparison, in the dtype of computation."""
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
    hidden = kept_tokens * hidden_size(source) * size * (3 if two_streams else 1)  # the dense ones before and after the block
    weights = sum(rows * columns for rows, columns in shapes.values())
    unrounded = weights if two_streams else 0
    trained = weights if any(step.two_streams and step.together for step in passes) else 0
    if any(step.reads_metric for step in passes):
        hidden += 4 * len(source.layers) * hidden_size(source) ** 2  # a metric for each block
    kept = (block_parameters(block) + unrounded) * size + 8 * sum(hessians) * (2 if paired else 1)
    return hidden + max(
        2 * outside,  # as stored, and as it is computed with
        kept + activations(block, min(tokens, batch), size) * (2 if paired else 1),  # collecting
        kept + (4 + 4 + 8) * solved,  # factorising: a Hessian, the same in visiting order, its factor in fp64
        kept + (4 + 4) * solved + 3 * 4 * largest,  # rounding: the Hessian, its factor, the weight thrice
        kept + (4 + 4 + 4) * solved + 3 * 4 * largest if paired else 0,  # the same with a second statistic
        kept + TRAINING * trained + activations(block, min(tokens, batch), size) if trained else 0,
        _tuning(source, passes, hidden + 2 * outside),
    )


def _tuning(source: ModelSource, passes: Sequence[Pass], beside: int) -> int:
    """Peak while a pass trains the whole model: every block, its weights as they were, and what training needs."""
    if not any(step.trains_model for step in passes):
        return 0
    weights = sum(
        math.prod(block.shape(name))
        for block in (source.block(index, load=False) for index in range(len(source.layers)))
        for name in block.layers
    )
    return beside + weights * (TRAINING + 2 * source.dtype.itemsize)


def _judging(source: ModelSource, tokens: int, batch: int) -> int:
    """Peak of the comparison: hidden states of both models in fp32, with a block, or with both heads and their logits."""
    block, once = largest_block(source), min(tokens, batch)
    head = source.vocab_size * (hidden_size(source) + once)
    return 2 * tokens * hidden_size(source) * 4 + max(4 * block_parameters(block) + activations(block, once, 4), 2 * 4 * head)


def generating(source: ModelSource) -> int:
    """While a model is whole, to continue beginnings of samples: if half of the memory that is available holds it, else 0."""
    needed = dense_bytes(source)
    return needed if needed <= SHARE * available_memory(source.device) else 0


def collecting(source: ModelSource, tokens: int, batch: int) -> int:
    """While the calibration stream goes through a block: all hidden states, the block, and what some tokens become in it."""
    block, size = largest_block(source), source.dtype.itemsize
    hidden = tokens * hidden_size(source) * size
    return hidden + block_parameters(block) * size + activations(block, min(tokens, batch), size)


def activations(block: Block, tokens: int, size: int) -> int:
    """Bytes while tokens go through a gated MLP: three times its width, and once in fp32 for a statistic."""
    return tokens * max((max(block.shape(name)) for name in block.layers), default=0) * (3 * size + 4)


def largest_block(source: ModelSource) -> Block:
    """Blocks may do without an attention or an MLP."""
    return max((source.block(index, load=False) for index in range(len(source.layers))), key=block_parameters)


def block_parameters(block: Block) -> int:
    """Numbers that a block has."""
    return sum(parameter.numel() for parameter in block.module.parameters())


def hidden_size(source: ModelSource) -> int:
    """Channels between blocks."""
    return int(source.model.config.get_text_config().hidden_size)
