"""Depth pruning: drop blocks, or single attention and MLP layers, chosen by cosine similarity, at even spacing, or by search.

Sources: Men et al., "ShortGPT", ACL 2025 findings, equation 1 (`cosine`); Liu et al., "Accelerating Inference in Large
Language Models with a Unified Layer Skipping Strategy", 2024 (`even`); Sieberling et al., "EvoPress", ICML 2025, for
dropping attention and MLP separately. The search is that of compressor/pipeline/search.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch.nn.functional import cosine_similarity

from compressor.errors import RecipeError
from compressor.formats.base import GONE, Kept
from compressor.model.block import Block, Trial
from compressor.model.edited import Rewriting
from compressor.model.edits import fewer_sublayers
from compressor.model.source import ModelSource, return_freed_memory
from compressor.model.surgery.skip_sublayers import SUBLAYERS, substitutes
from compressor.passes.prune.renumbered import check_renumbered, corrected
from compressor.pipeline.calibration.stream import CalibrationStream
from compressor.pipeline.job import Event, Job, Tell
from compressor.pipeline.search.levels import Choice, Level, Unit

GOES, STAYS = 0, 1  # levels of a unit
OPTIONS = (GONE, Kept(1, 1))
Parts = Literal["blocks", "sublayers"]


@dataclass(frozen=True)
class Depth:
    """Blocks, or attentions and MLPs, as units of a search with two levels: dropped or kept.

    Args:
        source: The model.
        parts: Kind of unit: blocks or sub-layers.

    Raises:
        RecipeError: (by `units`) The sub-layers of this architecture cannot be dropped.
    """

    source: ModelSource
    parts: Parts = "blocks"

    @cached_property
    def units(self) -> Sequence[Unit]:
        """Return the units, in the order of computation."""
        found = []
        for block in (self.source.block(index, load=False) for index in range(len(self.source.layers))):
            if self.parts == "blocks":
                found.append(self._unit(block, block.prefix, ""))
                continue
            found += [self._unit(block, f"{block.prefix}.{name}", f"{name}.") for name in substitutes(block.module)]
        if not found:
            raise RecipeError(
                f"{self.source.path}: this architecture has no attention `self_attn` and MLP `mlp` that could go one by one; "
                "whole blocks may (parts: blocks, --by depth)"
            )
        return found

    def _unit(self, block: Block, name: str, inside: str) -> Unit:
        names = [own for own, _ in block.module.named_parameters() if own.startswith(inside)]
        headers = [self.source.checkpoint.headers[self.source.names[f"{block.prefix}.{own}"]] for own in names]
        weights, bits = sum(math.prod(h.shape) for h in headers), 8 * sum(h.nbytes for h in headers)
        levels = tuple(Level(option, option.keep * bits, 1.0 - option.keep, 0.0) for option in OPTIONS)
        return Unit(name, block.index, (), weights, 0.0, 0.0, 0.0, levels)

    def trial(self, unit: str, level: int, device: torch.device, dtype: torch.dtype) -> Trial:
        """Return the trial of a unit: dropped, or kept unchanged."""
        if level == STAYS:
            return Trial({}, {})
        whole = self.parts == "blocks"
        return Trial({}, {}, skips=() if whole else (unit.rpartition(".")[2],), whole=whole)

    def enough(self, going: int, way: Callable[[int], Choice]) -> Choice:
        """Return the choice with the fewest dropped units that drops at least `going` parameters.

        Args:
            going: Number of parameters to drop.
            way: Function from a number of dropped units to a choice.

        Raises:
            RecipeError: No unit would be kept.
        """
        for count in range(len(self.units)):
            choice = way(count)
            if sum(unit.weights for unit, level in zip(self.units, choice, strict=True) if level == GOES) >= going:
                return choice
        most = sum(unit.weights for unit in self.units) - max(unit.weights for unit in self.units)
        raise RecipeError(
            f"prune_depth: {going:,} parameters have to go, more than {self.parts} can without the last of them going too "
            f"({most:,}); give a smaller ratio, or take from the width too with prune_width"
        )

    def without(self, choice: Choice) -> Rewriting:
        """Return the change to the checkpoint that drops units.

        Raises:
            RecipeError: Blocks have different parameters, so they cannot be renumbered.
        """
        if self.parts == "blocks":
            return fewer_blocks(self.source, choice)
        gone = frozenset(unit.name for unit, level in zip(self.units, choice, strict=True) if level == GOES)
        return fewer_sublayers(self.source, gone)


@torch.no_grad()
def turns(job: Job, stream: CalibrationStream, parts: Parts, tell: Tell) -> list[float]:
    """Compute 1 - the mean cosine similarity of input and output hidden states, for each block, attention or MLP."""
    found: list[float] = []
    for index in range(len(job.source.layers)):
        block = job.source.block(index)
        both = parts == "sublayers" and len(substitutes(block.module)) == len(SUBLAYERS)
        inner = [block.trying(Trial({}, {}, skips=(SUBLAYERS[1],)))] if both else []
        total = torch.zeros(len(inner) + 1, 2, dtype=torch.float64, device=job.ranks.device)
        for hidden in stream.hidden:
            x = hidden.to(job.ranks.device)
            states = [x, *(part(x) for part in inner), block.forward(x)]
            for place, (before, after) in enumerate(itertools.pairwise(states)):
                cosine = cosine_similarity(before.float(), after.float(), dim=-1).double()
                total[place] += torch.stack([cosine.sum(), torch.ones_like(cosine).sum()])
        job.ranks.sum_([total])
        found += [1 - float(cosines / count) for cosines, count in total]
        if index < len(job.source.layers) - 1:
            stream.advance(block)
        job.source.release(block)
        return_freed_memory()
        tell(Event("turns", index + 1, len(job.source.layers)))
    return found


def least(turned: Sequence[float], count: int) -> Choice:
    """Return the choice that drops the units with the smallest values."""
    going = sorted(range(len(turned)), key=lambda index: (turned[index], index))[:count]
    return tuple(GOES if index in going else STAYS for index in range(len(turned)))


def even(units: int, count: int) -> Choice:
    """Return the choice that keeps the first, the last, and units at equal distances between them."""
    staying = units - count
    kept = {round(i * (units - 1) / max(staying - 1, 1)) for i in range(staying)}
    return tuple(STAYS if index in kept else GOES for index in range(units))


def fewer_blocks(source: ModelSource, choice: Choice) -> Rewriting:
    """Return the change that drops blocks and renumbers the others, also in config lists with an entry for each block.

    Raises:
        RecipeError: Blocks have different parameters, or one would compute something else under its new number.
    """
    kept = [index for index, level in enumerate(choice) if level == STAYS]
    inside = [_parameters(source, index) for index in range(len(choice))]
    if any(names.keys() != inside[0].keys() for names in inside):
        raise RecipeError(f"{source.path}: its blocks have different parameters, none can take the place of another")
    copies = {inside[new][name]: inside[old][name] for new, old in enumerate(kept) for name in inside[old] if new != old}
    removed = {stored for names in inside[len(kept) :] for stored in names.values()} | source.unused.in_blocks.keys()
    beside = source.unused.renumbered(kept)
    copies |= {new: old for new, old in beside.items() if new != old}
    removed -= beside.keys()
    number = type(source.model.config).attribute_map.get("num_hidden_layers", "num_hidden_layers")  # GPT-2: n_layer
    if number not in source.raw_config:
        raise RecipeError(
            f"{source.path}: config.json does not have the number of blocks in `{number}`, so whole blocks cannot go; "
            "attentions and MLPs may (parts: sublayers, --by sublayers)"
        )
    lists = {**source.model.config.to_dict(), **source.raw_config}  # to_dict adds lists derived from block numbers
    config: dict[str, Any] = {
        key: [entry[index] for index in kept]
        for key, entry in lists.items()
        if isinstance(entry, list) and len(entry) == len(choice) and key != "architectures" and "token" not in key
    }
    widths = {
        f"{source.prefix}.{new}.{part}": count
        for new, old in enumerate(kept)
        for part in SUBLAYERS
        if (count := source.unsaid.get(f"{source.prefix}.{old}.{part}")) is not None
    }
    config |= {number: len(kept)}
    fewer = Rewriting({}, copies, config, removed=frozenset(removed), widths=widths, blocks=kept)
    fewer = corrected(source, kept, fewer)
    check_renumbered(source, fewer)
    return fewer


def _parameters(source: ModelSource, index: int) -> Mapping[str, str]:
    """Return the names in the checkpoint by names inside the block."""
    start = f"{source.prefix}.{index}."
    return {name.removeprefix(start): stored for name, stored in source.names.items() if name.startswith(start)}
