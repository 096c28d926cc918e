"""Account for every tensor of a checkpoint that the model does not use.

Weights on disk and config.json can disagree. Each tensor without a place in the model is one of these:

* harmless: buffers that older versions of transformers saved, blocks for multi-token prediction, scales of a quantized
  cache without `kv_cache_scheme`, and whatever transformers itself ignores for the model class. They are carried along, and
  are renumbered with their block.
* passed over: parts that transformers ignores too with a warning and that cannot change the logits, such as a value head, a
  vision tower or a bias of zeros. The user is warned.
* refused: anything else, because the model would compute something other than what its files were saved for.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from transformers import PreTrainedModel

from compressor.errors import SourceError
from compressor.model.checkpoint import Checkpoint
from compressor.model.packed_layers import PackedLayers
from compressor.reading import elide

log = logging.getLogger(__name__)

BUFFERS = re.compile(r"(^|\.)(inv_freq|original_inv_freq|cos_cached|sin_cached|rope\.freqs|position_ids|masked_bias)$")
CAUSAL_MASK = re.compile(r"(^|\.)(attn|attention|self_attn)\.bias$")  # of shape [1, 1, positions, positions]
CACHE_SCALE = re.compile(r"\.([qkv]|kv|prob)_scale$|\.[kv]_proj\.output_scale$")
PREDICTION = re.compile(r"(^|\.)mtp[._]")  # parts for multi-token prediction outside the list of blocks
PREDICTION_BLOCK = re.compile(r"^(enorm|hnorm|eh_proj|shared_head)\b")  # what only such a block holds
PREDICTION_KEYS = re.compile(r"nextn|mtp")  # entries of config.json that count such blocks
ADAPTER = re.compile(
    r"\.(lora_\w+|base_layer|modules_to_save|original_module|ia3_l|hada_w\d_[ab]|lokr_w\w+|vera_\w+|oft_\w+|boft_\w+)(\.|$)"
)
QUANTIZED = re.compile(
    r"\.(weight_(scale|scale_inv|scale_2|packed|shape|zero_point|g_idx|global_scale|format)"
    r"|(input|output|activation)_(scale|zero_point|global_scale)|scale_inv|qweight|qzeros|scales|qscales|g_idx|SCB"
    r"|weight\.(absmax|nested_absmax|quant_map|nested_quant_map|quant_state\.\w+)|\w+_(blocks|scales|scale_inv))$"
)
OTHER_INPUTS = re.compile(
    r"(^|\.)\w*(visual|vision|image|audio|speech|video|projector|multi_modal|resampler)\w*\.", re.IGNORECASE
)
ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Unused:
    """Tensors on disk that the model does not use, and that do no harm.

    Args:
        names: Their names on disk.
        in_blocks: Tensors inside a numbered block: name -> number of the block and name inside it. Blocks beyond the model's
            own are for multi-token prediction.
        stem: Name on disk of the list of blocks.
        blocks: Number of blocks of the model.
        warnings: Sentences for the user.
    """

    names: frozenset[str] = frozenset()
    in_blocks: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    stem: str = ""
    blocks: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def cache_scales(self) -> frozenset[str]:
        """Return the names of scales of a quantized cache."""
        return frozenset(name for name in self.names if CACHE_SCALE.search(name))

    def renumbered(self, kept: Sequence[int]) -> dict[str, str]:
        """Return new name -> present name for the tensors inside blocks, when only some blocks are kept.

        Blocks for multi-token prediction follow the last block, as before.

        Args:
            kept: Numbers of the blocks that are kept, in order.
        """
        numbers = {old: new for new, old in enumerate(kept)}
        shift = len(kept) - self.blocks
        return {
            f"{self.stem}.{numbers.get(number, number + shift)}.{inside}": name
            for name, (number, inside) in self.in_blocks.items()
            if number in numbers or number >= self.blocks
        }

    def below(self, module: str) -> frozenset[str]:
        """Return the names of the tensors inside a module of a block, `<number>.<name inside the block>`."""
        return frozenset(n for n, (number, inside) in self.in_blocks.items() if f"{number}.{inside}".startswith(f"{module}."))


def log_warnings(*found: Unused) -> None:
    """Log the warnings of models that are opened for a use without a report."""
    for unused in found:
        for sentence in unused.warnings:
            log.warning("warning: %s", sentence)


@dataclass(frozen=True)
class Accounts:
    """Everything that decides which tensors of a checkpoint a model uses.

    Args:
        checkpoint: Tensors on disk.
        model: Skeleton on the meta device.
        packing: Packed layers of the checkpoint.
        names: Parameter -> name on disk.
        prefix: Full name of the list of decoder blocks in the model.
        config: Content of config.json.
        scales: Names on disk of the cache scales that the model uses.
    """

    checkpoint: Checkpoint
    model: PreTrainedModel
    packing: PackedLayers
    names: Mapping[str, str]
    prefix: str
    config: Mapping[str, Any]
    scales: frozenset[str]

    def check(self, tied: Mapping[str, str]) -> Unused:
        """Check that every parameter is on disk as the model needs it, and account for all other tensors.

        Args:
            tied: Parameter -> the one that it shares its tensor with.

        Raises:
            SourceError: an adapter that was not merged, weights that are quantized without their config, a parameter that is
                missing or has another shape or dtype, or a tensor that the model should use and does not know.
        """
        if (self.checkpoint.path / ADAPTER_CONFIG).is_file():
            raise SourceError(
                f"{self.checkpoint.path}: {ADAPTER_CONFIG} says that these weights have an adapter, which would be left out; "
                "merge it first (peft: model.merge_and_unload()), or remove its files"
            )
        used = set(self.names.values())
        unknown = [n for n in self.checkpoint if self.packing.owner(n) not in used and n not in self.scales]
        stem, count = self._stem(), self._blocks()
        numbered = {n: found for n in unknown if (found := _place(n, stem)) is not None}
        harmless = self._harmless(unknown, numbered, count, used)
        left = [name for name in unknown if name not in harmless]
        outside = {name for name in left if name not in numbered and not self._inside_decoder(name, stem, used)}
        self._refuse_causes([name for name in left if name not in outside or ADAPTER.search(name)])
        self._check_parameters(tied)
        zeros = {name for name in left if name.endswith(".bias") and name not in outside and self._is_zero(name)}
        self._refuse_rest([name for name in left if name not in outside | zeros], numbered, count, used)
        return Unused(frozenset(unknown), numbered, stem, count, tuple(self._warnings(sorted(outside), sorted(zeros))))

    def _stem(self) -> str:
        """Return the name on disk of the list of blocks; empty if tensors have other names on disk than in the model."""
        for name, stored in self.names.items():
            number, _, inside = name.removeprefix(f"{self.prefix}.").partition(".")
            if name.startswith(f"{self.prefix}.") and stored.endswith(f"{number}.{inside}"):
                return stored.removesuffix(f"{number}.{inside}").removesuffix(".")
        return ""

    def _blocks(self) -> int:
        return len(list(self.model.get_submodule(self.prefix).children()))

    def _harmless(
        self, unknown: Iterable[str], numbered: Mapping[str, tuple[int, str]], count: int, used: set[str]
    ) -> set[str]:
        """Return the names of tensors of a known kind that change nothing."""
        text = self.config.get("text_config")
        counters = {**self.config, **(text if isinstance(text, Mapping) else {})}
        predicted = sum(
            value for key, value in counters.items() if PREDICTION_KEYS.search(key) and type(value) is int and value > 0
        )
        predictors = {number for number, inside in numbered.values() if number >= count and PREDICTION_BLOCK.match(inside)}
        predictors |= set(range(count, min(count + predicted, count + len(numbered))))
        ignored = [re.compile(pattern) for pattern in self.model._keys_to_ignore_on_load_unexpected or ()]

        def harmless(name: str) -> bool:
            number = numbered[name][0] if name in numbered else None
            if number in predictors or ((number is None or number >= count) and PREDICTION.search(name)):
                return True
            if self._beside_weight(name, used):  # a part of a layer is never one of the buffers below
                return number is not None and CACHE_SCALE.search(name) is not None
            mask = CAUSAL_MASK.search(name) and len(self.checkpoint.headers[name].shape) == 4
            known = BUFFERS.search(name) or mask or (number is not None and CACHE_SCALE.search(name))
            return bool(known) or any(pattern.search(name) for pattern in ignored)

        found = {name for name in unknown if harmless(name)}
        packed_zero_biases = {  # AutoGPTQ gave a bias to layers that have none
            name
            for name in set(unknown) - found
            if name.endswith(".bias") and f"{name.removesuffix('bias')}weight" in self.packing and self._is_zero(name)
        }
        return found | packed_zero_biases

    def _beside_weight(self, name: str, used: set[str]) -> bool:
        """Whether a tensor lies in a module whose weight the model uses."""
        return f"{name.rpartition('.')[0]}.weight" in used

    def _inside_decoder(self, name: str, stem: str, used: set[str]) -> bool:
        """Whether a tensor belongs to what computes the logits of text, as far as its name tells."""
        if self._beside_weight(name, used) or self._beside_weight(name.rpartition(".")[0], used):
            return True
        decoder = stem.rpartition(".")[0]
        return name.startswith(f"{decoder}." if decoder else "") and not OTHER_INPUTS.search(name)

    def _is_zero(self, name: str) -> bool:
        tensor = self.checkpoint.read(name)
        return not bool(tensor.float().any())

    def _refuse_causes(self, names: Sequence[str]) -> None:
        """Refuse tensors whose names tell what went wrong."""
        if adapters := [name for name in names if ADAPTER.search(name)]:
            self._refuse(
                adapters, "belongs to an adapter that was not merged", "merge it first (peft: model.merge_and_unload())"
            )
        if quantized := [name for name in names if QUANTIZED.search(name)]:
            if "quantization_config" in self.config:
                self._refuse(
                    quantized, "is not part of a layer as quantization_config describes them", "use the original model"
                )
            self._refuse(
                quantized,
                "belongs to quantized weights, but config.json has no quantization_config",
                "restore it, or use the original model",
            )

    def _check_parameters(self, tied: Mapping[str, str]) -> None:
        """Check that every parameter is on disk in the shape and kind of dtype that the model needs."""
        where, state = self.checkpoint.path, self.model.state_dict()
        missing = [name for name in state if tied.get(name, name) not in self.names]
        if missing:
            raise SourceError(
                f"{where}: the checkpoint has no tensor for {missing[0]} ({len(missing)} missing); "
                "weights and config.json do not belong together, or this architecture is not supported"
            )
        for name, parameter in state.items():
            stored = self.names.get(name)
            if stored is None or stored in self.packing:
                continue
            header = self.checkpoint.headers[stored]
            if header.shape != tuple(parameter.shape):
                raise SourceError(
                    f"{where}: {stored} has shape {list(header.shape)} where config.json needs {list(parameter.shape)}; "
                    "weights and config.json do not belong together"
                )
            if parameter.is_floating_point() and not (header.dtype.is_floating_point and header.dtype.itemsize > 1):
                raise SourceError(
                    f"{where}: {stored} is stored as {header.dtype} where the model has real numbers, and config.json does "
                    "not say how it was quantized; restore quantization_config, or use the original model"
                )

    def _refuse_rest(self, names: Sequence[str], numbered: Mapping[str, tuple[int, str]], count: int, used: set[str]) -> None:
        """Refuse tensors that the model should use and does not know."""
        if biases := [name for name in names if name.endswith(".bias") and self._beside_weight(name, used)]:
            self._refuse(
                biases,
                "is a bias that config.json denies",
                "correct the config (attention_bias, mlp_bias, or the right model_type)",
            )
        if beyond := [name for name in names if name in numbered and numbered[name][0] >= count]:
            self._refuse(
                beyond, f"belongs to a block beyond the {count} of config.json", "correct the number of blocks there"
            )
        if names:
            self._refuse(names, "has no place in the model that config.json describes", "correct model_type or the config")

    def _refuse(self, names: Sequence[str], cause: str, remedy: str) -> NoReturn:
        others = f" ({len(names)} such tensors)" if len(names) > 1 else ""
        raise SourceError(f"{self.checkpoint.path}: {elide(names[0])}{others} {cause}; {remedy}")

    def _warnings(self, outside: Sequence[str], zeros: Sequence[str]) -> list[str]:
        """Return a sentence for each kind of tensor that is passed over."""
        found = []
        if outside:
            found.append(
                f"{self.checkpoint.path}: {_count(outside)} ({elide(outside[0])}) not used by the model, "
                "as transformers has it; carried along unchanged"
            )
        if zeros:
            found.append(
                f"{self.checkpoint.path}: {_count(zeros)} ({elide(zeros[0])}) a bias of zeros that config.json denies, "
                "which changes nothing; carried along unchanged"
            )
        return found


def _count(names: Sequence[str]) -> str:
    return "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are each"


def _place(name: str, stem: str) -> tuple[int, str] | None:
    """Return the number of the block that a tensor lies in and its name inside; None outside blocks."""
    found = re.fullmatch(rf"{re.escape(stem)}\.(\d{{1,6}})\.(.+)" if stem else r"(?!)", name)
    return (int(found[1]), found[2]) if found else None
