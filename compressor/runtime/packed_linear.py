"""Linear layers whose weight stays packed in memory.

`PackedWeight` holds a weight in the layout of the kernels and multiplies by it; `PackedLinear` stands where an `nn.Linear`
stood and gives out its rows of a `PackedWeight`: all of them, or, after fusing, a part of what several layers that read the
same activations share. A state dict holds the weight as it lies on disk, so a loaded model saves as it was.

What no layout takes stays a `StoredLinear`: as it lies on disk, dequantised at every call.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from compressor.formats.base import Format, QuantizedTensor, borrowed
from compressor.formats.numerics.activations import InputRounding, in_product, input_rounding
from compressor.formats.numerics.codes import Codes, FloatCodes, IntCodes
from compressor.runtime.kernels import native
from compressor.runtime.kernels.dispatch import AUTO
from compressor.runtime.kernels.layouts import Layout, layout_for
from compressor.runtime.kernels.layouts.tile_order import ROWS
from compressor.runtime.kernels.op import packed_linear

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # what floating-point parts are kept as, by their size


@dataclass
class _Product:
    """A product that several layers take their rows of."""

    x: Tensor
    version: int | None
    y: Tensor
    takers: set[int] = field(default_factory=set)

    def of(self, x: Tensor, taker: int) -> bool:
        """Whether it is the product with x, and a layer has not had its rows yet."""
        return self.x is x and self.version == _version(x) and taker not in self.takers


class PackedWeight(nn.Module):
    """A weight [rows, columns] in a layout of the kernels, with its bias.

    Args:
        layout: How the parts lie.
        parts: By name; kept as integers, so that a change of the model's dtype leaves them alone.
        shape: (rows, columns) of the dense weight.
        bias: [rows], or None.
        kernel: "auto", or the kernel to use.
        takers: How many layers share the product.
        rounding: Rounding of activations before the product (compressor/formats/numerics/activations.py).
    """

    bias: Tensor | None

    def __init__(
        self,
        layout: Layout,
        parts: Mapping[str, Tensor],
        shape: tuple[int, int],
        bias: Tensor | None,
        kernel: str = AUTO,
        takers: int = 1,
        rounding: InputRounding | None = None,
    ) -> None:
        super().__init__()
        self.layout, self.shape, self.kernel, self.takers, self.rounding = layout, shape, kernel, takers, rounding
        self._dtypes = {name: part.dtype for name, part in parts.items()}
        for name, part in parts.items():
            as_bits = part.view(BITS[part.itemsize]) if part.is_floating_point() else part
            self.register_buffer(f"part_{name}", as_bits, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self._product: _Product | None = None

    @property
    def parts(self) -> dict[str, Tensor]:
        """The tensors by name, as the layout made them."""
        return {name: getattr(self, f"part_{name}").view(dtype) for name, dtype in self._dtypes.items()}

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + bias."""
        parts, left = list(self.parts.values()), in_product(self.rounding)
        x = x if left or self.rounding is None else self.rounding(x)
        y: Tensor = packed_linear(x, parts, self.bias, self.layout.name, self.shape[0], self.kernel, left)
        return y

    def take(self, x: Tensor, taker: int) -> Tensor:
        """The same, computed once for all layers that share it: they are called one after the other on one tensor.

        The product is kept until each has had its rows.
        """
        if self.takers == 1:
            y: Tensor = self(x)
            return y
        product = self._product
        if product is None or not product.of(x, taker):
            product = _Product(x, _version(x), self(x))
        product.takers.add(taker)
        self._product = product if len(product.takers) < self.takers else None
        return product.y

    def extra_repr(self) -> str:
        return f"{self.shape[0]} x {self.shape[1]}, {self.layout.name}, kernel={self.kernel}"


class PackedLinear(nn.Module):
    """Stands for a linear layer: some rows of a packed weight.

    Args:
        weight: The packed weight, perhaps shared.
        rows: Rows of the fused weight that are this layer's.
        stored: Origin of the weight: its format, and how finely its groups were stored.
        taker: Number of this layer among those that share the weight.
    """

    def __init__(self, weight: PackedWeight, rows: slice, stored: "Stored", taker: int = 0) -> None:
        super().__init__()
        self.packed, self.rows, self.stored, self.taker = weight, rows, stored, taker
        self._lender: tuple[Lender, ...] = ()
        self.in_features, self.out_features = weight.shape[1], rows.stop - rows.start

    @property
    def lender(self) -> "Lender | None":
        """The layer that lends this one parts, once `link` has found it."""
        return self._lender[0] if self._lender else None

    def borrow_from(self, lender: "Lender") -> None:
        """Take over what is lent when a state dict is loaded."""
        self._lender = (lender,)  # no module of this one

    @property
    def bias(self) -> Tensor | None:
        """[out_features], or None."""
        bias = self.packed.bias
        return None if bias is None else bias[self.rows]

    def forward(self, x: Tensor) -> Tensor:
        y = self.packed.take(x, self.taker)
        return y if self.packed.takers == 1 else y[..., self.rows]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out_features, in_features]."""
        whole: Tensor = self.quantized().dequantize().to(dtype)
        return whole

    def quantized(self) -> QuantizedTensor:
        """The weight as it lies on disk."""
        tiles = slice(self.rows.start // ROWS, -(-self.rows.stop // ROWS))
        own = {name: part if name == "order" else part[tiles] for name, part in self.packed.parts.items()}
        codes = self.packed.layout.restore(own if self.packed.takers > 1 else self.packed.parts, self._shape)
        return self.stored.again(codes, self._shape)

    @property
    def _shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, part in self.quantized().own.items():
            destination[f"{prefix}{name}"] = part
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(  # as nn.Module calls it
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = self.quantized()
        missing = [f"{prefix}{name}" for name in own.own if f"{prefix}{name}" not in state_dict]
        missing_keys += missing
        if missing:
            return
        lent = {} if self.lender is None else self.lender.quantized().parts  # it comes first, and has its new ones
        given = {name: state_dict[f"{prefix}{name}"] if name in own.own else lent[name] for name in own.parts}
        parts = {name: given[name].to(part.device) for name, part in own.parts.items()}
        wrong = [name for name, part in own.parts.items() if parts[name].shape != part.shape]
        if wrong:
            error_msgs.append(
                f"{prefix}{wrong[0]}: has shape {list(parts[wrong[0]].shape)}, not {list(own.parts[wrong[0]].shape)}"
            )
            return
        loaded = QuantizedTensor(own.format, own.shape, parts)
        codes = own.format.codes(loaded)
        new, self.stored = self.packed.layout.arrange(codes), Stored.of(loaded, codes)
        self.packed.rounding = input_rounding(own.format, parts.__getitem__)
        tiles = slice(self.rows.start // ROWS, -(-self.rows.stop // ROWS))
        for name, part in self.packed.parts.items():
            (part[tiles] if self.packed.takers > 1 and name != "order" else part).copy_(new[name])
        if self.bias is not None and f"{prefix}bias" in state_dict:
            self.bias.copy_(state_dict[f"{prefix}bias"])

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.stored.format.label}"


@dataclass(frozen=True)
class Stored:
    """The properties of a packed tensor that are needed to make it again from the codes of a layout."""

    format: Format
    bits: int | None  # of integers, which a layout may widen
    groups: int | None  # in a row, which a layout may divide
    rows: int = 1  # that share a scale of floating-point numbers, of which a layout may make one for each
    inputs: float | None = None  # what activations are rounded by, of which a layout knows nothing

    @staticmethod
    def of(tensor: QuantizedTensor, codes: Codes) -> "Stored":
        """Return the properties of a tensor and its codes."""
        if isinstance(codes, IntCodes):
            return Stored(tensor.format, codes.bits, codes.scale.shape[1])
        if isinstance(codes, FloatCodes):
            return Stored(tensor.format, None, None, codes.rows, codes.inputs)
        return Stored(tensor.format, None, None)

    def again(self, codes: Codes, shape: tuple[int, int]) -> QuantizedTensor:
        """The tensor."""
        if isinstance(codes, IntCodes) and self.groups is not None and self.bits is not None:
            each = codes.scale.shape[1] // self.groups
            codes = replace(codes, bits=self.bits, scale=codes.scale[:, ::each], zero=codes.zero[:, ::each])
        if isinstance(codes, FloatCodes):
            codes = replace(codes, scale=codes.scale[:: self.rows], rows=self.rows, inputs=self.inputs)
        return self.format.stored(codes, shape)


class StoredLinear(nn.Module):
    """A linear layer whose weight lies as on disk; each call dequantises it."""

    bias: nn.Parameter | None

    def __init__(self, tensor: QuantizedTensor, bias: Tensor | None) -> None:
        super().__init__()
        self.format, self.names = tensor.format, tuple(tensor.own)
        for name, part in tensor.own.items():
            self.register_parameter(name, nn.Parameter(part, requires_grad=False))
        self._lent = {name: part for name, part in tensor.parts.items() if name not in tensor.own}
        self._lender: tuple[Lender, ...] = ()
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self.out_features, self.in_features = tensor.shape

    def quantized(self) -> QuantizedTensor:
        """The weight as it lies on disk."""
        own = {name: getattr(self, name).data for name in self.names}
        lent = self._lent
        if self._lender:
            theirs = self._lender[0].quantized().parts
            lent = {name: theirs[name] for name in lent}
        return QuantizedTensor(self.format, (self.out_features, self.in_features), {**own, **lent})

    def borrow_from(self, lender: "Lender") -> None:
        """From now on have the parts of a layer that lends them."""
        self._lender = (lender,)  # no module of this one

    def forward(self, x: Tensor) -> Tensor:
        how = input_rounding(self.format, lambda part: getattr(self, part))
        x = x if how is None else how(x)
        return linear(x, self.quantized().dequantize().to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.format.label}, no kernel"


Lender = PackedLinear | StoredLinear


def link(model: nn.Module) -> None:
    """Tell layers that share parts of each other."""
    for module in model.modules():
        if isinstance(module, PackedLinear | StoredLinear):
            fmt = module.stored.format if isinstance(module, PackedLinear) else module.format
            lender = borrowed(fmt, (module.out_features, module.in_features))[0]
            if lender:
                found = model.get_submodule(lender)
                assert isinstance(found, PackedLinear | StoredLinear)
                module.borrow_from(found)


def packed_linear_module(
    tensor: QuantizedTensor, bias: Tensor | None, device: torch.device, kernel: str = AUTO
) -> PackedLinear | StoredLinear:
    """A layer for a packed weight and its bias [O], on a device."""
    tensor = QuantizedTensor(tensor.format, tensor.shape, {n: part.to(device) for n, part in tensor.parts.items()})
    codes = tensor.format.codes(tensor)
    rounding = input_rounding(tensor.format, tensor.parts.__getitem__)
    layout: Layout | None = native.layout(codes, rounding, device) if kernel in (AUTO, "native") else None
    layout = layout or layout_for(codes)
    if layout is None:
        return StoredLinear(tensor, bias)
    weight = PackedWeight(layout, layout.arrange(codes), tensor.shape, bias, kernel, rounding=rounding)
    return PackedLinear(weight, slice(0, tensor.shape[0]), Stored.of(tensor, codes))


def _version(x: Tensor) -> int | None:
    """Counts changes in place; tensors of inference mode have no such count, and a compiler removes such changes."""
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version
