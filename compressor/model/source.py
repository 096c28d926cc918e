"""A model directory, read one decoder block at a time.

The model is built by transformers on the meta device, so it costs no memory, and a block's parameters are read when the
block's turn comes. Everything that depends on the architecture (masks, positions, embedding scale, final norm, logit
capping) runs through the model's own forward, with the blocks' forwards replaced for its duration:

* `first_inputs` runs the decoder on tokens and keeps what the first block would have received;
* `arguments` keeps, for each block, what it is called with besides the hidden states;
* `logits` runs the whole model and hands it finished hidden states in place of the last block's output.

Shape suffixes: B samples of a batch, S sequence, D hidden, V vocabulary.
"""

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from compressor.access import check_readable, kind_of
from compressor.errors import SourceError
from compressor.formats.base import Format, QuantizedTensor
from compressor.formats.numerics.activations import InputRounding, input_rounding, round_inputs
from compressor.model.architecture import check_config, decoder_blocks, linear_layers
from compressor.model.block import Arguments, Block
from compressor.model.checkpoint import Checkpoint, read_config
from compressor.model.edited import Rewriting, Rewritten
from compressor.model.hf_config.decilm import as_llama, llama_config, widths
from compressor.model.hf_config.quantization_config import absent_sublayers, cache_rounding, sublayer_widths, turned_layers
from compressor.model.limits import check_limits
from compressor.model.names import checkpoint_names
from compressor.model.packed_layers import PackedLayers
from compressor.model.surgery.kv_cache import KEYS, VALUES, CacheScales, attach, attentions
from compressor.model.surgery.online_hadamard import Blocks, turn_inputs
from compressor.model.surgery.resize import narrow
from compressor.model.surgery.skip_sublayers import leave_out
from compressor.model.unused import Accounts
from compressor.reading import elide

Kept = TypeVar("Kept")
GENERATION = "generation_config.json"


class ModelSource:
    """Yields resident blocks; every other parameter stays on the meta device until it is asked for."""

    def __init__(
        self,
        path: Path,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        rewritings: Sequence[Rewriting] = (),
    ) -> None:
        self.path, self.device, self.dtype, self.rewritings = path, device, dtype, rewritings
        self.config_changes = {key: value for rewriting in rewritings for key, value in rewriting.config.items()}
        self.raw_config = {**read_config(path), **self.config_changes}
        check_config(as_llama(self.raw_config, str(path)), str(path))
        self.checkpoint = functools.reduce(Rewritten, rewritings, Checkpoint(path))
        check_limits(as_llama(self.raw_config, str(path)), len(self.checkpoint.headers), str(path))
        self.model = skeleton(path, dtype, self.config_changes)
        self.absent = absent_sublayers(self.raw_config, str(path)).union(*(rewriting.absent for rewriting in rewritings))
        leave_out(self.model, self.absent, str(path))
        self.unsaid = sublayer_widths(self.raw_config, str(path))  # widths that need an entry of ours
        for rewriting in rewritings:
            self.unsaid = self.unsaid if rewriting.widths is None else dict(rewriting.widths)
        self.widths = {**widths(self.raw_config, str(path)), **self.unsaid}
        narrow(self.model, self.widths, str(path))
        self.prefix, self.layers = decoder_blocks(self.model)
        self.packing = PackedLayers(path, self.raw_config, self.checkpoint)
        self.cache = cache_rounding(self.raw_config, str(path))
        self.hadamard = self._turn({layer: size for rewriting in rewritings for layer, size in rewriting.hadamard.items()})
        self.names = checkpoint_names(self.model, self.checkpoint, self.packing)
        self.outside = [name for name in self.model.state_dict() if not name.startswith(f"{self.prefix}.")]
        self.tied = self._tie()
        accounts = Accounts(
            self.checkpoint, self.model, self.packing, self.names, self.prefix, self.raw_config, self.cache_tensors()
        )
        self.unused = accounts.check(self.tied)
        for name in self.model.state_dict():
            if self.names.get(name, "") in self.packing:
                self.read_packed(name.removesuffix(".weight"), meta=True)  # refuses parts that are missing or too many
        self._arguments: dict[tuple[int, int], list[Arguments]] = {}
        self._streams = False  # known to feed blocks nothing of the tokens but their hidden states

    def rewritten(self, rewriting: Rewriting) -> "ModelSource":
        """The model as it is after one more change."""
        return ModelSource(self.path, self.device, self.dtype, (*self.rewritings, rewriting))

    def numbers_in(self, before: "ModelSource") -> list[int]:
        """Return the number of each block in `before`, which is this model before its last changes."""
        numbers = list(range(len(before.layers)))
        for rewriting in self.rewritings[len(before.rewritings) :]:
            numbers = [numbers[index] for index in rewriting.blocks] if rewriting.blocks else numbers
        return numbers

    @property
    def peculiar(self) -> bool:
        """Whether its config alone, without an entry of ours, would make transformers build another model."""
        return bool(self.hadamard or self.absent or self.unsaid)

    @property
    def vocab_size(self) -> int:
        """Tokens the input embedding knows."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def ends(self) -> tuple[str, str]:
        """Names of the weights of embedding and head."""
        names = {module: name for name, module in self.model.named_modules()}
        embedding, head = (
            f"{names[m]}.weight" for m in (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        )
        return embedding, head

    @property
    def max_positions(self) -> int:
        """The longest sequence the model was made for; a large number if its config does not say."""
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 2**20)

    def packed(self) -> dict[str, Format]:
        """The layers that lie packed in the checkpoint, by full module name."""
        layers = {m.removesuffix(".weight"): name for m, name in self.names.items() if name in self.packing}
        return {layer: self.packing.format(name, layer) for layer, name in layers.items()}

    def block(self, index: int, load: bool = True) -> Block:
        """One block; without `load`, on the meta device, for its names and shapes. `release` it when done."""
        prefix, module = f"{self.prefix}.{index}", self.layers[index]
        if load:
            self._load(module, prefix)
        layers = linear_layers(module)
        return Block(
            index,
            prefix,
            module,
            layers,
            lambda shape: self.arguments(shape)[index],
            rounded=self._rounded(prefix, layers) if load else {},
            dtypes=self._dtypes(prefix, module),
            cache=self._cache(prefix, module) if load else None,
        )

    def _dtypes(self, prefix: str, module: nn.Module) -> dict[str, torch.dtype]:
        """Return the dtypes on disk of a block's dense parameters, by name inside it."""
        stored = {name: self.names[f"{prefix}.{name}"] for name, _ in module.named_parameters()}
        return {name: self.checkpoint.headers[at].dtype for name, at in stored.items() if at not in self.packing}

    def _rounded(self, prefix: str, layers: Iterable[str]) -> dict[str, InputRounding]:
        """The layers of a block that round what they multiply by, and how."""
        found = {}
        for name in layers:
            stored, layer = self.names[f"{prefix}.{name}.weight"], f"{prefix}.{name}"
            if stored not in self.packing:
                continue
            read = functools.partial(self._part, layer)
            if (how := input_rounding(self.packing.format(stored, layer), read)) is not None:
                found[name] = how
        return found

    def _part(self, layer: str, part: str) -> Tensor:
        """Return a tensor that is stored next to the weight of a layer."""
        return self.checkpoint.read(self.beside(f"{layer}.{part}"))

    def _turn(self, more: Blocks) -> Blocks:
        """Have layers be given turned activations: those of the checkpoint, and more."""
        shapes = {name: kind.weight(self.model.get_submodule(name)).shape for name, kind in linear_layers(self.model).items()}
        blocks = {**turned_layers(self.raw_config, shapes, str(self.path)), **more}
        turn_inputs(self.model, blocks)
        return blocks

    def _cache(self, prefix: str, module: nn.Module) -> CacheScales | None:
        """How a block rounds keys and values, as the checkpoint has it."""
        if self.cache is None:
            return None

        def read(name: str) -> Tensor:
            stored = self.beside(f"{prefix}.{name}")
            if stored not in self.checkpoint:
                raise SourceError(
                    f"{self.path}: {stored} is missing, which kv_cache_scheme needs; the checkpoint is not whole"
                )
            return self.checkpoint.read(stored).to(self.device)

        return CacheScales.read(self.cache, attentions(module), read)

    def cache_tensors(self) -> frozenset[str]:
        """Names on disk of the scales that keys and values are rounded with."""
        modules = attentions(self.model) if self.cache is not None else []
        inside = [name for name in modules if name.startswith(f"{self.prefix}.")]
        return frozenset(self.beside(f"{name}.{scale}") for name in inside for scale in (KEYS, VALUES))

    def beside(self, name: str) -> str:
        """The name on disk of a tensor that the model does not have, inside a module that it has."""
        module, _, leaf = name.rpartition(".")
        known = next(parameter for parameter in self.names if parameter.startswith(f"{module}."))
        return f"{self.names[known].removesuffix(known.removeprefix(module))}.{leaf}"

    def release(self, block: Block) -> None:
        """Drop a block's parameters."""
        for module in block.module.modules():
            for leaf, parameter in module._parameters.items():
                if parameter is not None:
                    _assign(module, leaf, parameter.to("meta"))

    def blocks(self) -> Iterator[Block]:
        """Each block in order, resident until the next one is requested."""
        for index in range(len(self.layers)):
            block = self.block(index)
            yield block
            self.release(block)
            return_freed_memory()

    def whole(self, linear: Callable[[QuantizedTensor, Tensor | None], nn.Module] | None = None) -> PreTrainedModel:
        """The model with every parameter in memory. The source must not be used afterwards.

        Args:
            linear: Makes a module of a packed weight and its bias; it takes the place of the packed layers of the blocks.
                None has them dequantised.
        """
        for index, module in enumerate(self.layers):
            prefix = f"{self.prefix}.{index}"
            self._load(module, prefix, linear)
            if linear is None:
                round_inputs(module, self._rounded(prefix, linear_layers(module)))
            if (cache := self._cache(prefix, module)) is not None:
                for name, scales in cache.scales.items():
                    attach(module.get_submodule(name), cache.rounding, *scales)
            return_freed_memory()
        self._load_outside(lambda name: True)
        self.model.tie_weights(recompute_mapping=False)
        return self.model

    def read(self, name: str) -> Tensor:
        """One parameter or buffer by module name: dense, as stored if it is not packed."""
        stored = self.names[name]
        if stored not in self.packing:
            return self.checkpoint.read(stored)
        return self.read_packed(name.removesuffix(".weight")).dequantize()

    def read_packed(self, layer: str, *, meta: bool = False) -> QuantizedTensor:
        """A packed layer by full module name; with `meta`, its parts on the meta device: names, dtypes and shapes."""
        module = self.model.get_submodule(layer)
        linear = linear_layers(module).get("")
        if linear is None:
            raise SourceError(f"{self.path}: {layer} is packed but no linear layer; such checkpoints cannot be read")
        rows, columns = linear.weight(module).shape
        return self.packing.read(self.names[f"{layer}.weight"], layer, (rows, columns), self.names, meta=meta)

    def first_inputs(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """Return the hidden states [B, S, D] that the first block receives, on the CPU, for each batch of tokens [B, S].

        What blocks are called with besides is kept for `arguments`.
        """
        return self.kept_inputs(batches, list)

    @torch.no_grad()
    def kept_inputs(self, batches: Sequence[Tensor], keep: Callable[[Iterable[Tensor]], Kept]) -> Kept:
        """The same, put by `keep` where they are to lie, one batch after the other."""

        def received() -> Iterator[Tensor]:
            for tokens in batches:
                hidden, self._arguments[tokens.shape[0], tokens.shape[1]] = self._front(tokens.to(self.device))
                yield hidden.cpu()

        with self._resident(lambda name: not self._is_head(name)):
            self._check_streams()
            return keep(received())

    @torch.no_grad()
    def arguments(self, shape: tuple[int, int]) -> list[Arguments]:
        """Return the arguments of each block besides the hidden states, for tokens of a shape (B, S) without padding."""
        if shape not in self._arguments:
            with self._resident(lambda name: not self._is_head(name)):
                self._check_streams()
                tokens = torch.zeros(shape, dtype=torch.long, device=self.device)
                _, self._arguments[shape] = self._front(tokens)
        return self._arguments[shape]

    def forget_arguments(self) -> None:
        """Drop what is kept for `arguments`: after text of many lengths it adds up."""
        self._arguments.clear()

    def _check_streams(self) -> None:
        """Refuse an architecture whose blocks are told more of the tokens than their hidden states."""
        if self._streams:
            return
        others = torch.arange(min(16, self.max_positions), device=self.device)[None] % self.vocab_size
        if not _same(self._front(torch.zeros_like(others))[1], self._front(others)[1]):
            raise SourceError(
                f"{self.path}: blocks of model type `{self.model.config.model_type}` are told more of the tokens than "
                "their hidden states; this architecture cannot be streamed block by block"
            )
        self._streams = True

    def _front(self, tokens_BS: Tensor) -> tuple[Tensor, list[Arguments]]:
        """Return the hidden states that the first block receives, and the other arguments of each block."""
        received: list[Tensor] = []
        recorded: list[Arguments] = []

        def keep(index: int, hidden: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
            received.append(hidden)
            recorded.append((args, {k: v for k, v in kwargs.items() if k not in ("past_key_values", "use_cache")}))
            return hidden

        with _replaced(self.layers, keep):
            self.model.base_model(tokens_BS, use_cache=False)
        return received[0], recorded

    @torch.no_grad()
    def logits(self, batches: Iterator[Tensor] | Sequence[Tensor]) -> Iterator[Tensor]:
        """Final norm and head on the last block's outputs [B, S, D]: logits [B, S, V], one batch at a time."""
        with self.head() as head:
            for finished in batches:
                yield head(finished.to(self.device))

    @contextlib.contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Yield a function from the last block's outputs [B, S, D] to logits [B, S, V], on the device. It works while the
        context is open.
        """
        last = len(self.layers) - 1
        embedding = self.model.get_input_embeddings()
        unused = next(f"{n}.weight" for n, m in self.model.named_modules() if m is embedding)  # unless the head is tied to it
        width = embedding.weight.shape[1]

        def logits(finished: Tensor) -> Tensor:
            def give(index: int, hidden: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
                return finished if index == last else hidden

            with _replaced(self.layers, give):
                start = torch.zeros(*finished.shape[:2], width, dtype=self.dtype, device=self.device)
                return self.model(inputs_embeds=start, use_cache=False).logits  # type: ignore[no-any-return]

        with self._resident(lambda name: name != unused):
            yield logits

    def _is_head(self, name: str) -> bool:
        """Whether a parameter outside the blocks belongs to an output head that is not tied to the embedding."""
        head = self.model.get_output_embeddings()
        return head is not None and any(name == f"{n}.weight" for n, m in self.model.named_modules() if m is head)

    def _load(
        self,
        module: nn.Module,
        prefix: str,
        linear: Callable[[QuantizedTensor, Tensor | None], nn.Module] | None = None,
    ) -> None:
        """Read a module's parameters and persistent buffers, and move everything to the device; `linear` as in `whole`."""
        layers = linear_layers(module)
        packed = [name for name in layers if self.names[f"{prefix}.{name}.weight"] in self.packing]
        kept = {f"{name}.weight" for name in packed} if linear is not None else set()
        state = {name: self._read_sound(f"{prefix}.{name}") for name in module.state_dict() if name not in kept}
        for name in packed if linear is None else ():
            state[f"{name}.weight"] = layers[name].parameter(state[f"{name}.weight"])
        module.load_state_dict(state, assign=True, strict=not kept)
        if linear is not None:
            for name in packed:
                bias = getattr(module.get_submodule(name), "bias", None)
                module.set_submodule(name, linear(self.read_packed(f"{prefix}.{name}"), bias))
            turn_inputs(
                module, {name: self.hadamard[full] for name in packed if (full := f"{prefix}.{name}") in self.hadamard}
            )
        module.requires_grad_(False)
        _move_buffers(module, self.device)

    def _read_sound(self, name: str) -> Tensor:
        """Read a tensor, to the device and the dtype of computation.

        Raises:
            SourceError: it holds NaN or infinite values.
        """
        tensor = self.read(name)
        if not tensor.is_floating_point():
            return tensor.to(self.device)
        tensor = tensor.to(self.device, self.dtype)
        if not torch.isfinite(torch.stack(tensor.aminmax())).all():  # unlike a mask of the tensor, takes no memory
            bad = int((~torch.isfinite(tensor)).sum())
            raise SourceError(
                f"{self.path}: {name} holds {bad} NaN or infinite values of {tensor.numel()}; "
                "such a model cannot be used, get a sound copy"
            )
        return tensor

    @contextlib.contextmanager
    def _resident(self, wanted: Callable[[str], bool]) -> Iterator[None]:
        """Keep the wanted parameters outside the blocks in memory while the context is open."""
        before = self._load_outside(wanted)
        try:
            yield
        finally:
            for module, leaf, tensor in before:
                _assign(module, leaf, tensor)

    def _load_outside(self, wanted: Callable[[str], bool]) -> list[tuple[nn.Module, str, Tensor]]:
        """Read the wanted parameters outside the blocks, tied ones once; returns what stood in their places."""
        inside = f"{self.prefix}."
        before: list[tuple[nn.Module, str, Tensor]] = []
        loaded: dict[str, Tensor] = {}
        for name in self.outside:
            if not (wanted(name) or name in self.tied.values()):
                continue
            owner = self.tied.get(name, name)
            if owner not in loaded:
                loaded[owner] = self._read_sound(owner)
            parent, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(parent)
            before.append((module, leaf, getattr(module, leaf)))
            _assign(module, leaf, loaded[owner])
        for name, child in self.model.named_modules():
            if not f"{name}.".startswith(inside):
                _move_buffers(child, self.device, recurse=False)
        return before

    def _tie(self) -> dict[str, str]:
        """Parameters that are another one under a second name: name -> the name it is read by.

        As transformers has it: of a pair the one that is stored is read, and two that are stored and differ are not tied.
        """
        pairs: dict[str, str] = self.model.all_tied_weights_keys
        tied = {}
        for name, owner in list(pairs.items()):
            if name not in self.names:
                tied[name] = owner
            elif owner not in self.names:
                tied[owner] = name
            elif _equal(self.read(name), self.read(owner)):
                tied[name] = owner
            else:
                del pairs[name]
        return tied


def return_freed_memory() -> None:
    """Give freed pages back to the system; without it a long run creeps upward by fragmentation."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return  # not glibc: its allocator has no such call


def skeleton(path: Path, dtype: torch.dtype, changes: Mapping[str, Any] = MappingProxyType({})) -> PreTrainedModel:
    """The model that transformers builds from a directory's configs, changed: parameters on the meta device, buffers real."""
    check_readable([path / GENERATION], SourceError)
    generation = kind_of(path / GENERATION, SourceError)
    try:
        config = _config(path, changes)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if generation is not None:  # end tokens above all
            model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:  # a config can be wrong in as many ways as there are models
        reason = elide(" ".join(str(error).split()) or type(error).__name__, 150)
        raise SourceError(f"{path}: transformers cannot build a causal language model from config.json: {reason}") from error
    assert isinstance(model, PreTrainedModel)
    return model.eval().requires_grad_(False)


def _config(path: Path, changes: Mapping[str, Any]) -> PreTrainedConfig:
    """As it will be read from config.json with the changes: validated, and with keys that the class has no field for."""
    if (llama := llama_config(path, changes)) is not None:
        return llama
    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    return type(config).from_dict({**read_config(path), **changes}) if changes else config


def _same(a: Any, b: Any) -> bool:
    """Whether two nested arguments hold equal tensors; what is no tensor and no container does not count."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, Mapping):
        return all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return all(_same(x, y) for x, y in zip(a, b, strict=True))
    return True


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _assign(module: nn.Module, leaf: str, tensor: Tensor) -> None:
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor


def _move_buffers(module: nn.Module, device: torch.device, recurse: bool = True) -> None:
    for child in module.modules() if recurse else [module]:
        for name, buffer in child._buffers.items():
            if buffer is not None and buffer.device != device and buffer.device.type != "meta":
                child._buffers[name] = buffer.to(device)


@contextlib.contextmanager
def _replaced(
    layers: nn.ModuleList, call: Callable[[int, Tensor, tuple[Any, ...], Mapping[str, Any]], Tensor]
) -> Iterator[None]:
    """Have `call(index, hidden, other args, kwargs)` stand in for every block's forward.

    Raises:
        SourceError: the model does not hand one block's output, untouched, to the next; it cannot be streamed.
    """
    given: list[Tensor] = []

    def stand_in(index: int) -> Callable[..., Tensor]:
        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if index != len(given) or (given and hidden is not given[-1]):
                raise SourceError(
                    f"{type(layers[0]).__name__}: block {index} is not called on the output of block {index - 1}; "
                    "this architecture cannot be streamed block by block"
                )
            given.append(call(index, hidden, args, kwargs))
            if index == len(layers) - 1:
                result = given[-1]
                given.clear()
                return result
            return given[-1]

        return forward

    for index, layer in enumerate(layers):
        layer.forward = stand_in(index)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
