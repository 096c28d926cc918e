"""How the kernels want weights to lie: one file per family, each giving back the codes that it was given."""

import functools
from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from compressor.errors import KernelError
from compressor.formats.numerics.codes import Codes, DenseCodes, FloatCodes, IntCodes, SignCodes, SparseCodes, VectorCodes
from compressor.runtime.kernels.layouts.around import Around
from compressor.runtime.kernels.layouts.floats import Floats
from compressor.runtime.kernels.layouts.fp8_rows import Fp8Rows
from compressor.runtime.kernels.layouts.input_groups import InputGroups
from compressor.runtime.kernels.layouts.int_groups import IntGroups
from compressor.runtime.kernels.layouts.lossless import Lossless
from compressor.runtime.kernels.layouts.signs import Signs
from compressor.runtime.kernels.layouts.vectors import Vectors


class Layout(Protocol):
    """An arrangement of a weight's elements; a frozen dataclass whose name says all of it."""

    @property
    def by_rows(
        self,
    ) -> bool: ...  # every part but `order` begins with the tiles of rows: two weights are joined by joining parts
    @property
    def name(self) -> str: ...

    @property
    def chunk(self) -> int: ...  # columns of a tile: activations come padded to a multiple

    @property
    def parts(self) -> tuple[str, ...]: ...  # names of the tensors, in the order the operator takes them

    def __hash__(self) -> int: ...
    def arrange(self, codes: Any) -> dict[str, Tensor]: ...
    def restore(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Codes: ...


FAMILIES: dict[type, tuple[Any, ...]] = {
    IntCodes: (IntGroups, InputGroups),
    FloatCodes: (Floats,),
    VectorCodes: (Vectors, Around),
    SignCodes: (Signs,),
    DenseCodes: (Lossless,),
    SparseCodes: (),
}


def layout_for(codes: Codes) -> Layout | None:
    """The layout for the kernels that decode, or None if none takes these codes."""
    return next((layout for family in FAMILIES[type(codes)] if (layout := family.of(codes)) is not None), None)


@functools.cache
def named(name: str) -> Layout:
    """The layout of a name.

    Raises:
        KernelError: no family has a layout of this name.
    """
    for families in (*FAMILIES.values(), (Fp8Rows,)):
        for family in families:
            if (layout := family.parse(name)) is not None:
                found: Layout = layout
                return found
    raise KernelError(f"kernels: no layout named `{name}`; was it written by a newer version?")
