"""The packed layers of a checkpoint: which of its tensors belong to them, and what each of them is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from compressor.errors import SourceError
from compressor.formats.base import Format, QuantizedTensor, borrowed
from compressor.model.checkpoint import Checkpoint
from compressor.model.hf_config import quantization_config
from compressor.recipe import registry

DENSE = "weight"


class PackedLayers:
    """Finds packed layers by the names of their tensors, and reads them by what config.json says of them.

    Layers go by the name that their dense weight would have in the checkpoint, `<base>.weight`.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], checkpoint: Checkpoint) -> None:
        self.path, self.checkpoint = path, checkpoint
        quantized = "quantization_config" in config
        self._format_of = quantization_config.reader(config, str(path)) if quantized else None
        self._tensors: dict[str, set[str]] = {}  # base -> last parts of the names of all its tensors, if it is packed
        for stored in checkpoint:
            base, _, leaf = stored.rpartition(".")
            self._tensors.setdefault(base, set()).add(leaf)
        families = [set(registry.exported("format", name).part_names) for name in registry.available("format")]
        self._tensors = {b: has for b, has in self._tensors.items() if any(len(has & names) > 1 for names in families)}
        self._part_names = set().union(*families)

    def __contains__(self, weight: str) -> bool:
        base, _, leaf = weight.rpartition(".")
        return leaf == DENSE and base in self._tensors

    def owner(self, stored: str) -> str:
        """The layer that a tensor is a part of; of any other tensor its own name."""
        base, _, leaf = stored.rpartition(".")
        return f"{base}.{DENSE}" if base in self._tensors and leaf in self._part_names else stored

    def format(self, weight: str, layer: str) -> Format:
        """How a layer is packed, which is asked for by its full module name."""
        if self._format_of is None:
            raise SourceError(f"{self.path}: layer {layer} is packed but config.json has no quantization_config; restore it")
        return self._format_of(layer, self._tensors[weight.removesuffix(f".{DENSE}")])

    def read(
        self,
        weight: str,
        layer: str,
        shape: tuple[int, int],
        names: Mapping[str, str],
        *,
        meta: bool = False,
    ) -> QuantizedTensor:
        """A layer whose dense weight has a shape (O, I).

        Args:
            weight: Its name in the checkpoint.
            layer: Its full module name.
            shape: Shape of the dense weight.
            names: In the checkpoint, of all parameters of the model.
            meta: Leave the parts on the meta device, of which only the headers are read.

        Raises:
            SourceError: parts are missing, too many, or not what the format needs.
        """
        base, fmt = weight.removesuffix(f".{DENSE}"), self.format(weight, layer)
        try:
            expected = fmt.checkpoint_parts(shape)
        except ValueError as error:
            raise SourceError(f"{self.path}: {layer} cannot be packed as config.json has it: {error}") from error
        for part in sorted(self._tensors[base] & self._part_names - set(expected)):
            raise SourceError(f"{self.path}: {base}.{part} is not part of {fmt.label}; such checkpoints cannot be read")
        parts = {}
        lender, lent = borrowed(fmt, shape)
        if lender and f"{lender}.weight" not in names:
            raise SourceError(f"{self.path}: {layer} uses the codebooks of {lender}, which is no layer of this model")
        owners = dict.fromkeys(expected, base) | dict.fromkeys(
            lent, names.get(f"{lender}.weight", "").removesuffix(f".{DENSE}")
        )
        for part, (dtype, size) in {**expected, **lent}.items():
            name = f"{owners[part]}.{part}"
            if name not in self.checkpoint:
                raise SourceError(f"{self.path}: {name} is missing; the checkpoint is not complete")
            header = self.checkpoint.headers[name]
            if header.dtype != dtype and not (header.dtype.is_floating_point and dtype.is_floating_point):
                raise SourceError(
                    f"{self.path}: {name} is stored as {header.dtype} where {fmt.label} needs {dtype}; "
                    "the config and the weights do not belong together"
                )
            if header.shape != size:
                raise SourceError(
                    f"{self.path}: {name} has shape {list(header.shape)} where {fmt.label} of a "
                    f"{list(shape)} weight needs {list(size)}; the config and the weights do not belong together"
                )
            parts[part] = torch.empty(size, dtype=header.dtype, device="meta") if meta else self.checkpoint.read(name)
        return QuantizedTensor(fmt, shape, parts)
