"""Load a model directory, dense or packed in any layout that we read, as a transformers model."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compressor.host import known_state
from compressor.model.checkpoint import native_dtype, read_config
from compressor.model.device import compute_device
from compressor.model.generation import generate_plainly
from compressor.model.hf_config.quantization_config import write
from compressor.model.source import ModelSource
from compressor.model.unused import log_warnings
from compressor.runtime.fuse import make_ready
from compressor.runtime.kernels.cuda import sources
from compressor.runtime.kernels.dispatch import AUTO
from compressor.runtime.packed_linear import packed_linear_module

log = logging.getLogger(__name__)


@known_state()
def load(
    path: str | Path,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    kernel: str = AUTO,
    dense: bool = False,
    trust_kernels: bool = False,
) -> PreTrainedModel:
    """The model; packed layers stay packed and are multiplied by kernels, those that read the same input in one go.

    Args:
        path: Model directory, dense or packed, written by this package or in a layout of others that it reads.
        device: Where to put it.
        dtype: Dtype of the computation; None takes the checkpoint's where the device computes in it, else float32.
        kernel: "auto", or the one to use: "native" (FP8 weights and activations on tensor cores), "cuda", "cpu" (rounds
            activations to 8 bits) or "reference" (slow and exact).
            The choice and its reason are logged by `compressor.runtime.kernels.dispatch`.
        dense: Dequantise packed layers, once, here.
        trust_kernels: Compile the CUDA sources that lie beside the weights, where they are not this package's own: they run
            with your rights. Otherwise this package's are used, which decode the same bytes.

    Raises:
        SourceError: the directory cannot be read.
        KernelError: the kernel that is asked for cannot multiply by these weights here.
    """
    place, directory = compute_device(device), Path(path)
    dtype = dtype or native_dtype(directory, place)
    source = ModelSource(directory, place, dtype)
    log_warnings(source.unused)
    if dense or not source.packed():
        model = source.whole()
        if source.peculiar or source.widths:  # a model that is saved without this computes something else
            model.config.quantization_config = _entry(source)
        return model
    kernel = _kernel(directory, source.raw_config.get(sources.CONFIG_KEY) or {}, place, kernel, trust_kernels)
    model = source.whole(lambda tensor, bias: packed_linear_module(tensor, bias, place, kernel))
    make_ready(model, dtype)
    said = source.raw_config["quantization_config"]
    model.config.quantization_config = _entry(source) if source.widths else said  # so that it saves as it was,
    model.config.__dict__.pop(sources.CONFIG_KEY, None)  # but for the sources, which are not saved
    return model


def _entry(source: ModelSource) -> dict[str, Any]:
    """Return the entry of config.json about packed layers, where the model's class knows only that it is a Llama."""
    return write(source.packed(), (), (), source.cache, source.hadamard, source.absent, source.widths)


def _kernel(directory: Path, brought: Mapping[str, str], device: torch.device, kernel: str, trust: bool) -> str:
    """The kernel to ask for, given the CUDA sources that a checkpoint brings."""
    if device.type != "cuda" or kernel not in (AUTO, "cuda"):
        return kernel
    if trust:
        folder = sources.beside(directory, brought)
        return f"cuda:{folder}" if sources.foreign(brought) else kernel
    for name in sources.foreign(brought):
        log.info("%s: brings another %s than this version has; this version's is used", directory, name)
    return kernel


@known_state()
def generate(
    path: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    chat: bool = False,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    seed: int | None = None,
    kernel: str = AUTO,
) -> str:
    """A continuation of a prompt, greedy, or sampled if there is a seed.

    Args:
        path: Model directory.
        prompt: Text, or with `chat` the user's turn of a conversation.
        max_new_tokens: At most so many.
        chat: Put the prompt into the tokenizer's chat template.
        device: Device, as for `load`.
        dtype: Dtype of the computation, as for `load`.
        seed: Sample from the model's distribution with this seed.
        kernel: Kernel, as for `load`.

    Raises:
        CompressorError: no model or tokenizer that can be read, or no chat template.
    """
    from compressor.model.tokenizer import encode_prompt, load_tokenizer

    read_config(Path(path))  # the first thing to miss in a directory that is not there
    tokenizer = load_tokenizer(Path(path))
    model = load(path, device, dtype, kernel=kernel)
    ids = torch.tensor(encode_prompt(tokenizer, prompt, chat))
    return continuation(model, tokenizer, ids, max_new_tokens, seed)


def continuation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    max_new_tokens: int,
    seed: int | None = None,
) -> str:
    """Return a model's continuation of tokens [S]: the likeliest, or with a seed a sampled one."""
    if seed is not None:
        torch.manual_seed(seed)
    ids_1S = ids[None].to(model.device)
    generate_plainly(model, sample=seed is not None)
    out = model.generate(
        ids_1S,
        attention_mask=torch.ones_like(ids_1S),
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    text = tokenizer.decode(out[0, ids_1S.shape[1] :], skip_special_tokens=True)
    assert isinstance(text, str)
    return text
