"""Describe model families: which modules are linear, which are fused when served, what is not supported.

Everything else is found by looking at the model that transformers builds from the config, so most decoder-only families
need no entry here. Three facts do:

* kinds of linear module: `nn.Linear` keeps its weight as [O, I], GPT-2's `Conv1D` as [I, O];
* layers that serving engines fuse into one and therefore must be stored alike (q/k/v, gate/up);
* model types that hand layers activations in a shape which others round differently.
"""

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compressor.errors import SourceError
from compressor.model.block import LinearLike
from compressor.reading import elide
from compressor.recipe.expressions import expression

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}  # by the name of the fused layer in vLLM
FLATTENING = ("opt",)  # model types that hand some layers activations [tokens, channels], without a batch dimension
# What a model type is that is no causal language model, by the mappings of transformers that list it; the first that fits.
OTHER_KINDS = {
    "a vision-language model": ("IMAGE_TEXT_TO_TEXT",),
    "an audio model": (
        *("SPEECH_SEQ_2_SEQ", "CTC", "RNNT", "TDT", "AUDIO_CLASSIFICATION", "AUDIO_FRAME_CLASSIFICATION"),
        *("AUDIO_XVECTOR", "TEXT_TO_WAVEFORM", "TEXT_TO_SPECTROGRAM"),
    ),
    "an encoder-decoder": ("SEQ_TO_SEQ_CAUSAL_LM",),
    "a multimodal model": ("MULTIMODAL_LM",),
    "an encoder (masked language model)": ("MASKED_LM", "TEXT_ENCODING"),
    "a vision model": (
        *("IMAGE", "BACKBONE", "IMAGE_CLASSIFICATION", "OBJECT_DETECTION", "DEPTH_ESTIMATION", "VIDEO_CLASSIFICATION"),
        *("ZERO_SHOT_IMAGE_CLASSIFICATION", "MASK_GENERATION", "UNIVERSAL_SEGMENTATION", "KEYPOINT_MATCHING"),
    ),
    "a time series model": ("TIME_SERIES_PREDICTION", "TIME_SERIES_CLASSIFICATION", "TIME_SERIES_REGRESSION"),
}


class LinearKind:
    """`nn.Linear`: the weight is [O, I] already."""

    def weight(self, module: nn.Module) -> Tensor:
        assert isinstance(module.weight, Tensor)
        return module.weight

    def parameter(self, w_OI: Tensor) -> Tensor:
        return w_OI

    def set_weight(self, module: nn.Module, w_OI: Tensor) -> None:
        old = self.weight(module)
        module.weight = nn.Parameter(self.parameter(w_OI.to(old)), requires_grad=False)


class Conv1DKind(LinearKind):
    """GPT-2's `Conv1D`: the transpose of a linear layer."""

    def weight(self, module: nn.Module) -> Tensor:
        return super().weight(module).T

    def parameter(self, w_OI: Tensor) -> Tensor:
        return w_OI.T.contiguous()


def linear_layers(module: nn.Module) -> dict[str, LinearLike]:
    """The linear layers below a module, by name, in module order; subclasses count, as they do in compressed-tensors."""
    kinds: dict[type[nn.Module], LinearLike] = {nn.Linear: LinearKind(), Conv1D: Conv1DKind()}
    return {name: kinds[kind] for name, child in module.named_modules() for kind in kinds if isinstance(child, kind)}


def fused_groups(layers: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Units of a plan: layers that are stored alike, by the name of the fused layer, or a layer by itself."""
    layers = list(layers)
    fused_as = {part: whole for whole, parts in FUSED.items() for part in parts}
    groups: dict[str, tuple[str, ...]] = {}
    for layer in layers:
        parent, _, name = layer.rpartition(".")
        unit = ".".join(filter(None, (parent, fused_as.get(name, name))))
        groups[unit] = (*groups.get(unit, ()), layer)
    return groups


def matches(layer: str, patterns: Iterable[str]) -> bool:
    """Whether a layer's full name, or the end of it, fits one of some shell patterns (or, after `re:`, expressions)."""
    for pattern in patterns:
        if pattern.startswith("re:"):
            if expression(pattern[3:]).search(layer):
                return True
        elif fnmatch.fnmatchcase(layer, pattern) or fnmatch.fnmatchcase(layer, f"*.{pattern}"):
            return True
    return False


def check_pattern(pattern: str) -> None:
    """Raise ValueError if a pattern for `matches` is no regular expression after its `re:`."""
    if pattern.startswith("re:"):
        try:
            expression(pattern[3:])
        except ValueError as error:
            raise ValueError(f"re:{error}") from error


def decoder_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The name and the list of the decoder blocks of a causal language model.

    Raises:
        SourceError: there is no such list, or its blocks hold what no pass can handle.
    """
    kind, count = model.config.model_type, getattr(model.config.get_text_config(), "num_hidden_layers", None)
    decoder = model.get_decoder() or model.base_model
    lists = [m for m in decoder.children() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(lists) != 1:
        raise SourceError(
            f"model type `{kind}`: found {len(lists)} lists of {count} decoder blocks in "
            f"{type(decoder).__name__} where one is needed; this architecture is not supported"
        )
    blocks = lists[0]
    for name, parameter in blocks.named_parameters():
        if parameter.dim() > 2:
            raise SourceError(
                f"model type `{kind}`: parameter {name} of its decoder blocks is {parameter.dim()}-dimensional; "
                "convolutions, state spaces and fused mixture-of-experts weights are not supported yet"
            )
    if not linear_layers(blocks):
        raise SourceError(f"model type `{kind}`: its decoder blocks hold no linear layer; nothing can be compressed")
    prefix = next(name for name, module in model.named_modules() if module is blocks)
    return prefix, blocks


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Refuse what is no decoder, and what could only be read by running code from the checkpoint."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise SourceError(f"{where}: config.json names no model_type; is this a transformers checkpoint?")
    if kind not in CONFIG_MAPPING:
        remote = " without running code from the checkpoint, which compress never does" if "auto_map" in config else ""
        raise SourceError(
            f"{where}: the installed transformers does not know model type `{elide(kind, 60)}`{remote}; a newer one may"
        )
    if config.get("is_encoder_decoder"):
        raise SourceError(f"{where}: model type `{kind}` is an encoder-decoder; only decoders of causal models are supported")
    if CONFIG_MAPPING[kind] not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise SourceError(
            f"{where}: model type `{kind}` is {_other_kind(kind)}; name a model that only reads and writes text"
        )


def _other_kind(kind: str) -> str:
    """Return what a model type is that transformers has no causal language model for."""
    from transformers.models.auto import modeling_auto

    for words, tasks in OTHER_KINDS.items():
        if any(kind in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", ()) for task in tasks):
            return f"{words}, which is not supported yet"
    return "not a causal language model"
