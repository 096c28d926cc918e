"""Find what can be dropped from a decoder block: channels of its MLP, groups of its attention heads.

A part of a block computes units in parallel, and one linear layer, the writer, sums them. Unit u has `rows[name]` adjacent
rows of each layer and bias before the writer, starting at u * rows[name], and `columns` adjacent columns of the writer:

    mlp        unit: a channel                    rows: of gate_proj, up_proj           columns: of down_proj
    self_attn  unit: a head of keys and values    rows: of k_proj, v_proj, and of its   columns: of o_proj
               with the query heads that read it  query heads in q_proj

A block without a unit's rows and columns computes the same as one where the unit's columns are zero.

Shape suffixes: O out_features, I in_features, U units, S kept columns.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.errors import RecipeError
from compressor.model.block import Block
from compressor.model.source import ModelSource
from compressor.model.surgery.skip_sublayers import ATTENTION, MLP

FAMILIES = "Llama, Mistral, Qwen2, Qwen3, Gemma, Granite, SmolLM3 and others of their build"


@dataclass(frozen=True, slots=True)
class Part:
    """A sub-layer of a block whose units can be dropped."""

    name: str
    writer: str  # name inside the block
    count: int  # number of units
    columns: int  # columns of the writer per unit
    rows: Mapping[str, int]  # layer, or parameter name of a bias -> rows per unit

    def columns_of(self, units_U: Tensor) -> Tensor:
        """Return the columns of the writer [S] that belong to some units."""
        return spread(units_U, self.columns)

    def sliced(self, block: Block, units_U: Tensor) -> dict[str, Tensor]:
        """Return the rows of some units, of every layer and bias before the writer."""
        return {name: values(block, name)[spread(units_U, rows)].clone() for name, rows in self.rows.items()}

    def parameters(self, block: Block) -> int:
        """Return the number of parameters of one unit."""
        before = sum(rows * values(block, name)[0].numel() for name, rows in self.rows.items())
        return before + self.columns * block.shape(self.writer)[0]


def spread(units_U: Tensor, run: int) -> Tensor:
    """Return the rows or columns of units that have `run` adjacent ones each."""
    return (units_U[:, None] * run + torch.arange(run, device=units_U.device)).flatten()


def values(block: Block, name: str) -> Tensor:
    """Return a layer's weight [O, I], or another parameter."""
    return block.weight(name) if name in block.layers else block.module.get_parameter(name)


def find_parts(source: ModelSource, block: Block) -> list[Part]:
    """Find the parts of a block, in the order of computation.

    Args:
        source: The model, for its config.
        block: Block of the model. It need not be resident.

    Raises:
        RecipeError: The block has a different structure, or lacks a sub-layer.
    """
    gone = [name for name in (ATTENTION, MLP) if f"{block.prefix}.{name}" in source.absent]
    if gone:
        raise RecipeError(
            f"{source.path}: block {block.index} does without its {' and '.join(gone)}; width has to be taken before those go"
        )
    config = source.raw_config
    sizes = {key: config.get(key) for key in ("num_attention_heads", "intermediate_size", "hidden_size")}
    layers = {f"{ATTENTION}.{name}_proj" for name in "qkvo"} | {f"{MLP}.{name}_proj" for name in ("gate", "up", "down")}
    if not all(isinstance(size, int) for size in sizes.values()) or not layers <= set(block.layers):
        raise RecipeError(
            f"{source.path}: width can be taken from gated blocks with q/k/v/o_proj and gate/up/down_proj layers of one size "
            f"({FAMILIES}); model type `{config.get('model_type')}` has others; `prune_depth` may make it smaller"
        )
    heads = int(config["num_attention_heads"])
    groups = int(config.get("num_key_value_heads") or heads)
    query, key = (block.shape(f"{ATTENTION}.{name}_proj")[0] for name in "qk")
    groups = source.widths.get(f"{block.prefix}.{ATTENTION}", groups)
    width = key // groups
    attention = {"q_proj": query // groups, "k_proj": width, "v_proj": width}
    channels = block.shape(f"{MLP}.down_proj")[1]
    found = [
        Part(ATTENTION, f"{ATTENTION}.o_proj", groups, query // groups, _rows(block, ATTENTION, attention)),
        Part(MLP, f"{MLP}.down_proj", channels, 1, _rows(block, MLP, {"gate_proj": 1, "up_proj": 1})),
    ]
    for part in found:
        known = {f"{name}.weight" if name in block.layers else name for name in part.rows}
        known |= {f"{part.writer}.weight", f"{part.writer}.bias"}
        for name, parameter in block.module.named_parameters():
            if name.startswith(f"{part.name}.") and name not in known and parameter.numel() > width:
                raise RecipeError(
                    f"{block.prefix}.{name}: has {parameter.numel()} numbers that belong to heads or channels in a way that "
                    "is not known, so width cannot be taken from this model; `prune_depth` may make it smaller"
                )
    return found


def find_all(source: ModelSource) -> dict[str, tuple[Block, Part]]:
    """Find the parts of all blocks, by full name, in the order of computation. The blocks are on the meta device."""
    blocks = [source.block(index, load=False) for index in range(len(source.layers))]
    return {f"{block.prefix}.{part.name}": (block, part) for block in blocks for part in find_parts(source, block)}


def _rows(block: Block, part: str, layers: Mapping[str, int]) -> dict[str, int]:
    """Return rows per unit by layer, with those of the layers' biases added."""
    names = {f"{part}.{layer}": rows for layer, rows in layers.items()}
    parameters = dict(block.module.named_parameters())
    return names | {bias: rows for name, rows in names.items() if (bias := f"{name}.bias") in parameters}
