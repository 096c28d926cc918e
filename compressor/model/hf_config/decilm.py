"""`block_configs` in config.json: how wide the MLP of each block is, in the form of NVIDIA's DeciLM (type `nemotron-nas`).

vLLM computes it by itself (`nemotron_nas.py`), transformers by a file that lies beside the weights
(compressor/assets/decilm.py), both with `trust_remote_code`: the config is of a class that transformers does not ship. The
code of neither is run here. The model is a Llama: all blocks have the same heads, norms and hidden state. llama.cpp and
TensorRT-LLM know the form too, but only `ffn_mult`, in multiples of 256 channels; where all widths are such, it is written as
well.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import LlamaConfig

from compressor.assets import DECILM_CODE
from compressor.errors import SourceError
from compressor.model.checkpoint import read_config
from compressor.model.surgery.skip_sublayers import MLP

CONFIG = "config.json"
MODEL_TYPE, ARCHITECTURE = "nemotron-nas", "DeciLMForCausalLM"
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
AUTO_MAP = {"AutoConfig": f"{DECILM_CODE.stem}.DeciLMConfig", "AutoModelForCausalLM": f"{DECILM_CODE.stem}.{ARCHITECTURE}"}
ROUND = 256  # what a width by `ffn_mult` is rounded up to
PREFIX = "model.layers"  # of a Llama


def runs_code(config: Mapping[str, Any]) -> bool:
    """Whether a config has such blocks, for which transformers has to run a file of the directory."""
    return config.get("model_type") == MODEL_TYPE


def changes(config: Mapping[str, Any], channels: Sequence[int]) -> dict[str, Any]:
    """Entries of config.json for a Llama whose MLPs have so many channels, block by block."""
    hidden = config["hidden_size"]
    attention = {"no_op": False, "replace_with_linear": False, "n_heads_in_group": _group(config)}
    known = all(count % ROUND == 0 for count in channels)
    blocks = [
        {
            "attention": attention,
            "ffn": {
                "no_op": False,
                "replace_with_linear": False,
                "intermediate_size": count,
                **({"ffn_mult": 1.5 * count / hidden} if known else {}),
            },
        }
        for count in channels
    ]
    return {
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        "auto_map": AUTO_MAP,
        "intermediate_size": max(channels),
        "block_configs": blocks,
    }


def as_llama(config: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The config of a Llama as wide as the widest block, of a config with blocks; any other as it is.

    Raises:
        SourceError: its blocks are built otherwise.
    """
    if not runs_code(config):
        return config
    widest = max(widths(config, where).values(), default=0)
    plain = {key: value for key, value in config.items() if key not in ("block_configs", "auto_map")}
    return {**plain, **LLAMA, "intermediate_size": widest}


def llama_config(path: Path, changes: Mapping[str, Any] = MappingProxyType({})) -> LlamaConfig | None:
    """The same for a directory with changes to its config, as transformers has it; None if that has no blocks.

    Raises:
        SourceError: its blocks are built otherwise.
    """
    raw = {**read_config(path), **changes} if (path / CONFIG).is_file() else {}
    return LlamaConfig.from_dict(dict(as_llama(raw, str(path)))) if runs_code(raw) else None


def widths(config: Mapping[str, Any], where: str) -> dict[str, int]:
    """Channels of each MLP, by its full name; nothing of a config without blocks.

    Raises:
        SourceError: blocks differ in more than that.
    """
    if not runs_code(config):
        return {}
    try:
        found = [_channels(block, _group(config), config["hidden_size"]) for block in config["block_configs"]]
        if len(found) != config["num_hidden_layers"]:
            raise ValueError(f"there are {len(found)} for {config['num_hidden_layers']} blocks")
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise SourceError(f"{where}: block_configs cannot be read ({error})") from error
    return {f"{PREFIX}.{index}.{MLP}": count for index, count in enumerate(found)}


def _group(config: Mapping[str, Any]) -> int:
    """Query heads that share a head of keys and values."""
    heads: int = config["num_attention_heads"]
    return heads // (config.get("num_key_value_heads") or heads)


def _channels(block: Mapping[str, Mapping[str, Any]], alike: int, hidden: int) -> int:
    """Return the number of channels in the MLP of a block whose attention is as the config says."""
    attention, ffn = block["attention"], block["ffn"]
    if attention["n_heads_in_group"] != alike or any(_peculiar(part) for part in (attention, ffn)):
        raise ValueError("blocks differ in more than the width of their MLPs, or do without parts, which is not read")
    if ffn.get("intermediate_size") is not None:
        return int(ffn["intermediate_size"])
    return -(-int(2 * ffn["ffn_mult"] * hidden / 3) // ROUND) * ROUND


def _peculiar(part: Mapping[str, Any]) -> bool:
    return any(part.get(key) for key in ("no_op", "replace_with_linear", "sparsify", "window_length", "num_sink_tokens"))


def rounded(config: Mapping[str, Any]) -> bool:
    """Whether every block says its width in the way that all know."""
    return all("ffn_mult" in block["ffn"] for block in config["block_configs"])


def own_code(path: Path, config: Mapping[str, Any]) -> bool:
    """Whether that is the file that is shipped here, and nothing else."""
    file = path / DECILM_CODE.name
    return config.get("auto_map") == AUTO_MAP and file.is_file() and file.read_bytes() == DECILM_CODE.read_bytes()
