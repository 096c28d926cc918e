"""Blocks that go as a whole, and which: by how far each turns what passes it, evenly spaced, or by search.

Sources: Men et al., "ShortGPT", ACL 2025 findings, equation 1 (`cosine`); Liu et al., "Accelerating Inference in Large
Language Models with a Unified Layer Skipping Strategy", 2024 (`even`); the search is that of compressor/search.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cosine_similarity

from compressor.calibration.stream import CalibrationStream
from compressor.errors import RecipeError
from compressor.model.rewritten import Rewriting
from compressor.model.source import ModelSource, return_freed_memory
from compressor.pipeline import Event, Job, Tell
from compressor.search.levels import Choice, Kept, Level, Unit
from compressor.types import Trial

GOES, STAYS = 0, 1  # levels of a block
OPTIONS = (Kept(keep=0, of=1), Kept(keep=1, of=1))


@torch.no_grad()
def turns(job: Job, stream: CalibrationStream, tell: Tell) -> list[float]:
    """How far each block turns what passes it: 1 - the mean cosine of what enters a token's place and what leaves it."""
    found = []
    for index in range(len(job.source.layers)):
        block = job.source.block(index)
        total = torch.zeros(2, dtype=torch.float64, device=job.ranks.device)
        for hidden in stream.hidden:
            x = hidden.to(job.ranks.device)
            cosine = cosine_similarity(x.float(), block.forward(x).float(), dim=-1)
            total += torch.stack([cosine.double().sum(), torch.tensor(float(cosine.numel()), device=total.device).double()])
        job.ranks.sum_([total])
        found.append(1 - float(total[0] / total[1]))
        if index < len(job.source.layers) - 1:
            stream.advance(block)
        job.source.release(block)
        return_freed_memory()
        tell(Event("turns", index + 1, len(job.source.layers)))
    return found


def least(turned: Sequence[float], count: int) -> Choice:
    """Without the blocks that turn least."""
    going = sorted(range(len(turned)), key=lambda index: (turned[index], index))[:count]
    return tuple(GOES if index in going else STAYS for index in range(len(turned)))


def even(blocks: int, count: int) -> Choice:
    """With the first and the last, and those between at equal distances."""
    staying = blocks - count
    kept = {round(i * (blocks - 1) / max(staying - 1, 1)) for i in range(staying)}
    return tuple(STAYS if index in kept else GOES for index in range(blocks))


@dataclass(frozen=True)
class Blocks:
    """Whole blocks as levels of a search: each goes or stays."""

    source: ModelSource

    @property
    def units(self) -> Sequence[Unit]:
        """One for each block."""
        found = []
        for block in (self.source.block(index, load=False) for index in range(len(self.source.layers))):
            stored = [self.source.names[f"{block.prefix}.{name}"] for name, _ in block.module.named_parameters()]
            headers = [self.source.checkpoint.headers[name] for name in stored]
            weights, bits = sum(math.prod(h.shape) for h in headers), 8 * sum(h.nbytes for h in headers)
            levels = tuple(Level(option, option.keep * bits, 1.0 - option.keep, 0.0) for option in OPTIONS)
            found.append(Unit(block.prefix, block.index, (), weights, 0.0, 0.0, 0.0, levels))
        return found

    def trial(self, unit: str, level: int, device: torch.device, dtype: torch.dtype) -> Trial:
        """A block that is passed over, or as it is."""
        return Trial({}, {}, skips=level == GOES)


def number(source: ModelSource, ratio: float, whole: int) -> int:
    """Of blocks that have to go for a share of so many parameters.

    Raises:
        RecipeError: not one would stay.
    """
    each, blocks = min(unit.weights for unit in Blocks(source).units), len(source.layers)
    count = math.ceil(ratio * whole / each)
    if count >= blocks:
        raise RecipeError(
            f"prune_depth: ratio {ratio:g} of {whole:,} parameters takes {count} blocks away and the model has {blocks}; the "
            f"most is {math.floor(1000 * (blocks - 1) * each / whole) / 1000}, or take from the width too with prune_width"
        )
    return count


def without(source: ModelSource, choice: Choice) -> Rewriting:
    """The model without the blocks that go, the others numbered anew; lists in its config with an entry for each block too.

    Raises:
        RecipeError: blocks have different parameters, so that one cannot take the place of another.
    """
    kept = [index for index, level in enumerate(choice) if level == STAYS]
    inside = [_parameters(source, index) for index in range(len(choice))]
    if any(names.keys() != inside[0].keys() for names in inside):
        raise RecipeError(f"{source.path}: its blocks have different parameters, none can take the place of another")
    copies = {inside[new][name]: inside[old][name] for new, old in enumerate(kept) for name in inside[old] if new != old}
    removed = {stored for names in inside[len(kept) :] for stored in names.values()}
    config: dict[str, Any] = {
        key: [entry[index] for index in kept]
        for key, entry in source.raw_config.items()
        if isinstance(entry, list) and len(entry) == len(choice)
    }
    return Rewriting({}, copies, {"num_hidden_layers": len(kept), **config}, removed=frozenset(removed))


def _parameters(source: ModelSource, index: int) -> Mapping[str, str]:
    """Names on disk by names inside the block."""
    start = f"{source.prefix}.{index}."
    return {name.removeprefix(start): stored for name, stored in source.names.items() if name.startswith(start)}
