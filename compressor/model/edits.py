"""Make changes to a whole checkpoint."""

from compressor.model.edited import Rewriting
from compressor.model.source import ModelSource


def fewer_sublayers(source: ModelSource, gone: frozenset[str]) -> Rewriting:
    """The model without some attentions and MLPs, by full name, which only our loader reads."""
    starts = tuple(f"{name}." for name in gone)
    removed = frozenset(stored for name, stored in source.names.items() if starts and name.startswith(starts))
    removed = removed.union(*(source.unused.below(name.removeprefix(f"{source.prefix}.")) for name in gone))
    widths = {name: count for name, count in source.unsaid.items() if name not in gone}
    return Rewriting({}, removed=removed, absent=gone, widths=widths)
