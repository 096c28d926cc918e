"""`AutoModelForCausalLM.from_pretrained` keeps packed weights packed, once this package is imported.

transformers reads its quantizers from a table by `quant_method`. `register` adds ours, and puts it before transformers' own
where a checkpoint that others wrote can be read: those dequantise the whole model at its first forward, or need further
packages. What we cannot read, and what is asked for with `dequantize=True`, goes to transformers' own quantizer as before.

The module is imported while transformers is still importing itself (`compressor/runtime/on_import.py`), so it imports little.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from compressor.errors import SourceError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OURS = "compressor"
THEIRS = ("compressed-tensors", "gptq", "auto-round")  # methods of others of which we read some layouts


class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """A `quantization_config` exactly as it stands in config.json."""

    def __init__(self, quant_method: str = OURS, **kwargs: Any) -> None:
        self.quant_method = quant_method
        self.__dict__.update(kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        made = cls(**{**config_dict, **kwargs})
        return (made, {}) if return_unused_kwargs else made

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class PackedQuantizer(HfQuantizer):  # type: ignore[misc]
    """Has packed tensors loaded as they lie on disk and then arranges them for the kernels."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        from compressor.model.source import ModelSource
        from compressor.model.surgery.kv_cache import attach, attentions
        from compressor.model.surgery.resize import narrow
        from compressor.model.surgery.skip_sublayers import leave_out
        from compressor.runtime.packed_linear import StoredLinear, link

        files = kwargs.get("checkpoint_files")
        if not files:
            raise SourceError("from_pretrained: packed weights are read from safetensors files; give a model directory")
        source = ModelSource(Path(files[0]).parent, torch.device("cpu"))
        self.quantization_config = PackedConfig.from_dict(source.raw_config["quantization_config"])
        leave_out(model, source.absent, str(source.path))
        narrow(model, source.widths, str(source.path))
        for layer in source.packed():
            bias = getattr(model.get_submodule(layer), "bias", None)
            model.set_submodule(layer, StoredLinear(source.read_packed(layer, meta=True), bias))
        link(model)
        self.hadamard = source.hadamard
        if source.cache is not None:
            for name in attentions(model):
                if name.startswith(f"{source.prefix}."):
                    attach(model.get_submodule(name), source.cache, *torch.empty(2, 1, device="meta"))

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> "PreTrainedModel":
        from compressor.model.surgery.online_hadamard import turn_inputs
        from compressor.runtime.fuse import make_ready
        from compressor.runtime.kernels.cuda.sources import CONFIG_KEY
        from compressor.runtime.packed_linear import StoredLinear, packed_linear_module

        stored = {name: module for name, module in model.named_modules() if isinstance(module, StoredLinear)}
        for name, (tensor, bias) in {name: (module.quantized(), module.bias) for name, module in stored.items()}.items():
            device = next(iter(tensor.parts.values())).device
            model.set_submodule(name, packed_linear_module(tensor, bias, device))
        turn_inputs(model, self.hadamard)
        make_ready(model, model.dtype)
        model.config.__dict__.pop(CONFIG_KEY, None)  # the CUDA sources are not saved with it
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def register() -> None:
    """Enter our quantizer into transformers' tables."""
    from transformers.quantizers import auto

    if OURS in auto.AUTO_QUANTIZER_MAPPING:
        return
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[OURS] = PackedConfig
    auto.AUTO_QUANTIZER_MAPPING[OURS] = PackedQuantizer
    for method in THEIRS:
        auto.AUTO_QUANTIZER_MAPPING[method] = _ours_or(auto.AUTO_QUANTIZER_MAPPING[method])


@contextlib.contextmanager
def stock() -> Iterator[None]:
    """While it is open, transformers loads packed checkpoints by itself."""
    from transformers.quantizers import auto

    ours = dict(auto.AUTO_QUANTIZER_MAPPING)
    auto.AUTO_QUANTIZER_MAPPING.update({method: ours[method].stock for method in THEIRS})
    try:
        yield
    finally:
        auto.AUTO_QUANTIZER_MAPPING.update(ours)


def _ours_or(stock: Callable[..., Any]) -> Any:
    """Return a replacement for transformers' own quantizer: it makes that one, or ours where we can read the checkpoint."""

    def quantizer(config: QuantizationConfigMixin, **kwargs: Any) -> Any:
        readable = not getattr(config, "dequantize", False) and kwargs.get("pre_quantized", True) and _readable(config)
        return (PackedQuantizer if readable else stock)(config, **kwargs)

    quantizer.stock = stock  # type: ignore[attr-defined]
    return quantizer


def _readable(config: QuantizationConfigMixin) -> bool:
    from compressor.model.hf_config.quantization_config import reader

    try:
        reader({"quantization_config": config.to_dict()}, "config.json")
    except SourceError:
        return False
    return True
