"""Load a model directory, dense or packed in any layout that we read, as a transformers model."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compressor.model.generation import generate_plainly
from compressor.model.source import ModelSource


def load(path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model with dense weights: packed layers are dequantised here, once.

    Args:
        path: Model directory.
        device: Where to put it.
        dtype: Of all floating-point parameters.

    Raises:
        SourceError: the directory cannot be read.
    """
    return ModelSource(Path(path), torch.device(device), dtype).whole()


def generate(
    path: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    chat: bool = False,
    device: str = "cpu",
    seed: int | None = None,
) -> str:
    """A continuation of a prompt, greedy, or sampled if there is a seed.

    Args:
        path: Model directory.
        prompt: Text, or with `chat` the user's turn of a conversation.
        max_new_tokens: At most so many.
        chat: Put the prompt into the tokenizer's chat template.
        device: Where to run.
        seed: Sample from the model's distribution with this seed.

    Raises:
        CompressorError: no model or tokenizer that can be read, or no chat template.
    """
    from compressor.calibration.data import encode_prompt, load_tokenizer

    tokenizer = load_tokenizer(Path(path))
    model = load(path, device)
    ids = torch.tensor(encode_prompt(tokenizer, prompt, chat))
    return continuation(model, tokenizer, ids, max_new_tokens, seed)


def continuation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    max_new_tokens: int,
    seed: int | None = None,
) -> str:
    """What a model writes after tokens [S]: the likeliest, or with a seed sampled."""
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
