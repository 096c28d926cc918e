"""Vectors whose input channels have norms, or of whose channels some are dense: what happens around the kernel's product.

Parts are those of the vectors, then

    norm       bf16  [K'] or [1]   if there are norms: activations are multiplied by them first
    dense      bf16  [N, K - K']   if there are dense channels: their product is added,
    channels   int32 [K - K']      which they are, and
    order      int32 [K']          which the others

The kernels know nothing of it: they get the activations of the K' others, times the norms, and the vectors' own parts.

Shape suffixes: M tokens, N out_features, K in_features.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import linear

from compressor.formats.numerics.codes import VectorCodes, others
from compressor.runtime.kernels.layouts.vectors import Vectors

NORMED, ORDERED = "-normed", "-ordered"


@dataclass(frozen=True)
class Around:
    """One arrangement; its name says all of it."""

    inner: Vectors
    normed: bool
    ordered: bool  # some channels are dense
    by_rows: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return f"{self.inner.name}{NORMED if self.normed else ''}{ORDERED if self.ordered else ''}"

    @staticmethod
    def parse(name: str) -> "Around | None":
        """The layout of this name, or None if it is another family's."""
        ordered, rest = name.endswith(ORDERED), name.removesuffix(ORDERED)
        normed, rest = rest.endswith(NORMED), rest.removesuffix(NORMED)
        inner = Vectors.parse(rest)
        return Around(inner, normed, ordered) if inner is not None and (normed or ordered) else None

    @property
    def chunk(self) -> int:
        """Columns of a tile."""
        return self.inner.chunk

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the tensors, in the order in which the operator takes them."""
        dense = ("dense", "channels", "order") if self.ordered else ()
        return (*self.inner.parts, *(["norm"] if self.normed else []), *dense)

    @staticmethod
    def of(codes: VectorCodes) -> "Around | None":
        """The layout that takes these codes, or None: nothing is around them, or the vectors have no layout."""
        inner = Vectors.of(_bare(codes))
        normed, ordered = codes.norm is not None, codes.dense_ON is not None
        return Around(inner, normed, ordered) if inner is not None and (normed or ordered) else None

    def arrange(self, codes: VectorCodes) -> dict[str, Tensor]:
        """The parts."""
        parts = self.inner.arrange(_bare(codes))
        if codes.norm is not None:
            parts["norm"] = codes.norm
        if codes.dense_ON is not None and codes.channels_N is not None:
            order = others(codes.channels_N, codes.columns).int()
            parts |= {"dense": codes.dense_ON, "channels": codes.channels_N, "order": order}
        return parts

    def restore(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> VectorCodes:
        """The codes that were arranged."""
        dense = len(parts["channels"]) if self.ordered else 0
        inner = self.inner.restore(parts, (shape[0], shape[1] - dense))
        return replace(inner, norm=parts.get("norm"), dense_ON=parts.get("dense"), channels_N=parts.get("channels"))

    def entering(self, x_MK: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the vectors that the kernel multiplies by."""
        x_MK = x_MK[:, parts["order"]] if self.ordered else x_MK
        return x_MK * parts["norm"].to(x_MK.dtype) if self.normed else x_MK

    def beside(self, x_MK: Tensor, parts: Mapping[str, Tensor]) -> Tensor | None:
        """Return what is added to the kernel's product, [M, N]."""
        return linear(x_MK[:, parts["channels"]], parts["dense"].to(x_MK.dtype)) if self.ordered else None


def _bare(codes: VectorCodes) -> VectorCodes:
    return replace(codes, norm=None, dense_ON=None, channels_N=None)
