"""Compare many kernels at once: chains in a CUDA graph, and two streams that two threads launch on.

Sums are added in one order, so results have to be the same bit for bit.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from checks import Case, Finding, Load
from parity import in_stored_order  # type: ignore[import-not-found] # of tests/kernels
from torch import Tensor

from compressor.runtime.kernels import cuda
from compressor.runtime.kernels.cuda import instances

REPLAYS = 3
TIMES = 20  # that each of two streams runs its chain
Product = Callable[[Case, Tensor], Tensor]


def chain(layers: Sequence[Case], x_MK: Tensor, product: Product) -> list[Tensor]:
    """Return the outputs of all layers, each fed by the one before it."""
    outputs = []
    for layer in layers:
        x_MK = product(layer, in_stored_order(x_MK, layer.codes, layer.layout.chunk))
        outputs.append(x_MK)
    return outputs


def alone(load: Load) -> Product:
    """One kernel at a time, which neither overlaps with others nor has company."""

    def product(layer: Case, x_MK: Tensor) -> Tensor:
        multiprocessors = torch.cuda.get_device_properties(layer.device).multi_processor_count
        tile = instances.choose(layer.layout, len(x_MK), layer.rows, multiprocessors)
        y_MN = x_MK.new_empty(len(x_MK), layer.rows)
        torch.cuda.synchronize()
        load(layer.layout, False).linear(x_MK, layer.parts, y_MN, None, tile)
        torch.cuda.synchronize()
        return y_MN

    return product


def through_the_entry(layer: Case, x_MK: Tensor) -> Tensor:
    """As the package multiplies: kernels overlap."""
    return cuda.linear(x_MK, layer.parts, layer.layout, layer.rows, None)


def in_a_graph(layers: Sequence[Case], load: Load, tokens: int) -> Iterator[Finding]:
    """A chain that was captured, replayed with new activations, against the same done alone."""
    x_MK = _activations(layers[0], tokens)
    chain(layers, x_MK, through_the_entry)  # a capture must not be the first to need a kernel
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = chain(layers, x_MK, through_the_entry)
    for replay in range(REPLAYS):
        x_MK.copy_(_activations(layers[0], tokens))
        for output in outputs:
            output.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        yield different(f"{layers[0].name}: {tokens} tokens, replay {replay}", outputs, chain(layers, x_MK, alone(load)))


def on_two_streams(layers: Sequence[Case], load: Load, tokens: int) -> Iterator[Finding]:
    """Two chains at the same time, each on its own stream by its own thread."""
    orders, device = (list(layers), list(reversed(layers))), layers[0].device
    starts = [_activations(layers[0], tokens) for _ in orders]
    expected = [chain(order, x_MK, alone(load)) for order, x_MK in zip(orders, starts, strict=True)]
    torch.cuda.synchronize()

    def run(order: Sequence[Case], x_MK: Tensor) -> list[list[Tensor]]:
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream()):
            outputs = [chain(order, x_MK, through_the_entry) for _ in range(TIMES)]
            torch.cuda.current_stream().synchronize()
            return outputs

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(run, orders, starts))
    for number, (outputs, wanted) in enumerate(zip(found, expected, strict=True)):
        for output in outputs:
            yield different(f"{layers[0].name}: {tokens} tokens, stream {number}", output, wanted)


def different(what: str, found: Sequence[Tensor], expected: Sequence[Tensor]) -> Finding:
    """How many numbers are not the same; what is not finite is none."""
    pairs = zip(found, expected, strict=True)
    count = sum(int((~((a == b) & a.isfinite())).sum()) for a, b in pairs)
    return Finding(f"{what}, numbers that differ", count, 0)


def _activations(layer: Case, tokens: int) -> Tensor:
    return torch.randn(tokens, layer.columns, device=layer.device).bfloat16()
