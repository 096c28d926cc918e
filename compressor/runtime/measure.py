"""Measure a model in a worker process: how fast it computes, and which memory it reads from.

A decoding step reads every weight once, whatever the batch, and the keys and values of all earlier tokens:

    bytes a step reads = bytes of the decoder and the head, without embedding tables, + bytes of the KV cache

A tied head is the embedding table, which is then counted, once; of other tables a step reads one row. The KV cache grows by a
token with every step; its mean over the timed steps is taken. This is what must be read: what an implementation moves besides
(copies of the cache, activations) only makes it slower. A model that fits into the cache of the processor can exceed the
bandwidth of the memory.
"""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from compressor.model.checkpoint import read_config
from compressor.runtime.kernels.dispatch import choose
from compressor.runtime.load import load
from compressor.runtime.packed_linear import PackedWeight, StoredLinear

TRIES = 5  # of each way to use the memory's bandwidth; the best counts


@dataclass(frozen=True)
class About:
    """A description of what a worker holds."""

    device: str
    threads: int
    runtime: str  # what computes, and in which form the weights lie in memory
    load_seconds: float


@dataclass(frozen=True)
class Taken:
    """One timed run."""

    seconds: float  # of a prefill, or of one step
    bytes_read: int | None = None  # by one step


class Resident:
    """A model in memory, and how long it takes for what."""

    def __init__(self, path: str, device: str, dtype: torch.dtype, threads: int | None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.path, self.device = Path(path), torch.device(device)
        started = time.perf_counter()
        self.model = load(path, device, dtype)
        self.load_seconds = now(self.device) - started

    def about(self) -> About:
        """Describe what runs here."""
        return About(_device_name(self.device), torch.get_num_threads(), self._runtime(), self.load_seconds)

    def prefill(self, batch: int, length: int) -> Taken:
        """From prompts [batch, length] to the first token of each."""
        tokens = self._prompt(batch, length)
        started = now(self.device)
        self._step(tokens, None)
        return Taken(now(self.device) - started)

    def decode(self, batch: int, length: int, steps: int) -> Taken:
        """Greedy steps after prompts [batch, length] and an untimed step; an end token does not end them."""
        token_11, cache = self._step(self._prompt(1, length), None)
        cache.batch_repeat_interleave(batch)  # what the tokens are makes no difference; computing them again would take time
        token_B1, cache = self._step(token_11.repeat(batch, 1), cache)
        before, started = cache_bytes(cache), now(self.device)
        for _ in range(steps):
            token_B1, cache = self._step(token_B1, cache)
        seconds = (now(self.device) - started) / steps
        growth = (cache_bytes(cache) - before) / steps
        return Taken(seconds, weight_bytes(self.model) + round(before + growth * (steps + 1) / 2))

    def peaks(self) -> tuple[int, int]:
        """Peak memory of this process so far, and on the GPU, in bytes."""
        return peak_memory(), torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0

    @torch.no_grad()
    def _step(self, tokens_BS: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        """The likeliest next tokens [B, 1]."""
        out = self.model(tokens_BS, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values

    def _prompt(self, batch: int, length: int) -> Tensor:
        known = self.model.get_input_embeddings().weight.shape[0]
        return torch.randint(known, (batch, length), generator=torch.Generator().manual_seed(0)).to(self.device)

    def _runtime(self) -> str:
        kernels = sorted(
            {m.layout.name + ", " + self._kernel(m) for m in self.model.modules() if isinstance(m, PackedWeight)}
        )
        if kernels:
            weights = f"packed weights ({'; '.join(kernels)})"
        elif any(isinstance(m, StoredLinear) for m in self.model.modules()):
            weights = "packed weights, dequantised at each call"
        elif "quantization_config" in read_config(self.path):
            weights = "dense weights, dequantised on loading"
        else:
            weights = "dense weights"
        return f"{weights}, transformers {version('transformers')}"

    def _kernel(self, weight: PackedWeight) -> str:
        return choose(weight.layout.name, self.device, self.model.dtype, weight.kernel).kernel


class Bandwidth:
    """The memory of a device, and how fast it can be read and copied."""

    def __init__(self, device: str, threads: int | None, size_bytes: int) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.device, self.size_bytes = torch.device(device), size_bytes

    def best(self) -> float:
        """Bytes per second of the better of reading and copying, the best of several tries."""
        source = torch.ones(self.size_bytes // 4, device=self.device)  # written to, else all its pages could be one of zeros
        target = torch.ones_like(source)
        reading = min(self._seconds(source.sum) for _ in range(TRIES))
        copying = min(self._seconds(lambda: target.copy_(source)) for _ in range(TRIES))
        return max(source.nbytes / reading, 2 * source.nbytes / copying)

    def _seconds(self, work: Callable[[], Tensor]) -> float:
        started = now(self.device)
        work()
        return now(self.device) - started


def now(device: torch.device) -> float:
    """The time when all that was asked of a device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def weight_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of the parameters and buffers that one decoding step reads; see the head of this file."""
    head = model.get_output_embeddings()
    read = [model.get_decoder() or model.base_model, *([head] if head is not None else [])]  # no vision tower
    tensors = {t.data_ptr(): t for module in read for t in _weights(module)}
    tables = {m.weight.data_ptr() for m in model.modules() if isinstance(m, nn.Embedding)}
    tied = {t.data_ptr() for t in head.parameters()} if head is not None else set()
    return sum(tensor.nbytes for place, tensor in tensors.items() if place not in tables - tied)


def _weights(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, and buffers but for what a module makes itself (tables of angles)."""
    yield from model.parameters()
    for module in model.modules():
        made = set() if isinstance(module, PackedWeight) else module._non_persistent_buffers_set
        yield from (buffer for name, buffer in module._buffers.items() if buffer is not None and name not in made)


def cache_bytes(cache: Cache) -> int:
    """Return the bytes of the keys and values that a cache holds."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def peak_memory() -> int:
    """The largest resident set that this process has had, in bytes."""
    if sys.platform == "linux":  # ru_maxrss would begin with the peak of the process that started this one
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS


def _device_name(device: torch.device) -> str:
    return f"{device.type} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type
