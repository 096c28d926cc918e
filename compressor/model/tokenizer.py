"""Load the tokenizer of a model directory, and encode prompts with it."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from compressor.access import check_readable
from compressor.errors import CalibrationError
from compressor.model.hf_config.decilm import llama_config
from compressor.reading import cause

TOKENIZER_FILES = ("*token*", "vocab*", "merges*", "*.model", "*.jinja")  # what transformers may read for a tokenizer


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The model directory's tokenizer.

    Raises:
        CalibrationError: there is none that can be loaded without running code from the checkpoint.
    """
    check_readable((file for kind in TOKENIZER_FILES for file in sorted(path.glob(kind))), CalibrationError)
    if not any(
        (path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    ):
        raise CalibrationError(
            f"{path}: no tokenizer files here; copy tokenizer.json and tokenizer_config.json of the model, "
            "or, where no calibration is needed, give --no-eval"
        )
    try:
        known = {"config": llama} if (llama := llama_config(path)) is not None else {}
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False, **known)
        tokenizer("a")  # some entries are only looked at now
    except Exception as error:  # the files of a tokenizer can be wrong in as many ways as there are tokenizers
        raise CalibrationError(
            f"{path}: the tokenizer cannot be loaded ({cause(error)}); copy the tokenizer files of the original model"
        ) from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool) -> list[int]:
    """Token ids to continue from: the prompt as it is, or as the user's turn of a conversation."""
    if not chat:
        ids: list[int] = tokenizer(prompt)["input_ids"]
        if not ids and tokenizer.bos_token_id is None:
            raise CalibrationError("the prompt is empty and the tokenizer has no begin token; give --prompt some text")
        return ids or [tokenizer.bos_token_id]
    if tokenizer.chat_template is None:
        raise CalibrationError("the tokenizer has no chat template; leave out --chat")
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template can raise anything
        raise CalibrationError(f"prompt: the tokenizer's chat template fails ({cause(error)}); leave out --chat") from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
