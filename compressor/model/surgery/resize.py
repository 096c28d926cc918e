"""Sub-layers with a width of their own: fewer channels in the MLP of one block, fewer heads in the attention of another.

A config says one number for all blocks. Where a block has fewer, its linear layers are made so; the code of transformers
tells heads and channels from what these layers put out. Heads of keys and values go with all query heads that read them, so
what is left reads them as before.
"""

from collections.abc import Mapping

from torch import nn

from compressor.errors import SourceError
from compressor.model.surgery.skip_sublayers import ATTENTION, MLP

READERS = {ATTENTION: ("q_proj", "k_proj", "v_proj"), MLP: ("gate_proj", "up_proj")}  # lose rows
WRITER = {ATTENTION: "o_proj", MLP: "down_proj"}  # loses columns
COUNTS = ("num_heads", "num_attention_heads", "num_key_value_heads", "intermediate_size")  # that modules may note down


def units(module: nn.Module, leaf: str) -> int:
    """Heads of keys and values of an attention, channels of an MLP; by its name in a block."""
    if leaf == MLP:
        return int(module.get_submodule(WRITER[MLP]).in_features)  # type: ignore[arg-type]
    return int(module.get_submodule("k_proj").out_features) // int(module.head_dim)  # type: ignore[arg-type]


def narrow(model: nn.Module, widths: Mapping[str, int], where: str) -> None:
    """Make linear layers as narrow as they are stored, on the meta device.

    Args:
        model: Model of transformers.
        widths: Heads of keys and values, or channels, by full name of the attention or MLP.
        where: For errors.

    Raises:
        SourceError: the model has no such sub-layer, or not so many units of it.
    """
    for name, count in widths.items():
        leaf = name.rpartition(".")[2]
        try:
            module = model.get_submodule(name)
            layers = [*READERS[leaf], WRITER[leaf]]
            before, found = units(module, leaf), {layer: module.get_submodule(layer) for layer in layers}
        except (AttributeError, KeyError) as error:
            raise SourceError(
                f"{where}: {name} is said to be narrower, but is no attention or MLP of linear layers"
            ) from error
        if not 0 < count <= before:
            raise SourceError(f"{where}: {name} is said to have {count} heads or channels; it can have from 1 to {before}")
        for layer, linear in found.items():
            rows, columns = linear.weight.shape  # type: ignore[misc]
            shape = (rows, columns * count // before) if layer == WRITER[leaf] else (rows * count // before, columns)
            module.set_submodule(layer, _like(linear, *shape))
        for attribute in COUNTS:
            if isinstance(known := getattr(module, attribute, None), int):
                setattr(module, attribute, known * count // before)


def _like(linear: nn.Module, rows: int, columns: int) -> nn.Linear:
    """A linear layer of another shape."""
    weight = linear.get_parameter("weight")
    made = nn.Linear(columns, rows, bias=getattr(linear, "bias", None) is not None, device="meta", dtype=weight.dtype)
    return made.requires_grad_(weight.requires_grad)
