"""FP8 products on tensor cores; torch computes the same product on a CPU, slowly."""

import parity
import pytest
import torch
from tolerance import TOLERANCE, error

from compressor.formats.fp8 import FP8
from compressor.formats.numerics.activations import IN_PRODUCTS, FloatTokens
from compressor.formats.numerics.codes import FloatCodes, values
from compressor.formats.numerics.minifloat import E2M1, E4M3
from compressor.runtime.kernels import dispatch, native
from compressor.runtime.kernels.layouts import named
from compressor.runtime.kernels.layouts.fp8_rows import Fp8Rows
from compressor.runtime.kernels.op import packed_linear
from compressor.runtime.packed_linear import PackedLinear, packed_linear_module

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def fp8_codes(rows: int, columns: int, shared: int = 1, dtype: torch.dtype = torch.bfloat16) -> FloatCodes:
    codes = (
        torch.randint(0, 126, (rows, columns), dtype=torch.uint8) + torch.randint(0, 2, (rows, columns)).to(torch.uint8) * 128
    )
    return FloatCodes(E4M3, codes, (0.01 * torch.rand(rows // shared, 1) + 0.001).to(dtype), rows=shared)


@pytest.mark.parametrize("shape", [(32, 64), (21, 200), (16, 16)], ids=str)
@pytest.mark.parametrize(("whole", "dtype"), [(False, torch.bfloat16), (True, torch.float32)])
def test_the_product_is_that_of_the_rounded_tokens(shape: tuple[int, int], whole: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    codes = fp8_codes(*shape, shape[0] if whole else 1, dtype)
    layout = Fp8Rows.of(codes)
    assert layout is not None
    for tokens, bias_N in ((1, None), (17, torch.randn(shape[0]).bfloat16())):
        x_MK = parity.activations(tokens, shape[1])
        exact = parity.product(FloatTokens(E4M3)(x_MK.double().float()), codes, bias_N)
        stored = parity.in_stored_order(x_MK, codes, layout.chunk)
        found = native.product(stored, list(layout.arrange(codes).values()), layout, shape[0], bias_N)
        assert found.shape == exact.shape
        assert error(found, exact) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shared", [1, 21])
def test_codes_come_back(shared: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    codes = fp8_codes(21, 100, shared, dtype)
    layout = Fp8Rows.of(codes)
    assert layout is not None
    assert named(layout.name) == layout
    back = layout.restore(layout.arrange(codes), (21, 100))
    assert torch.equal(back.codes_OI, codes.codes_OI)
    assert torch.equal(back.scale[::shared], codes.scale)
    assert torch.equal(values(back), values(codes))


def test_other_codes_are_left_to_other_kernels() -> None:
    codes = torch.zeros(32, 64, dtype=torch.uint8)
    for element, scale, rows in (
        (E2M1, torch.ones(32, 1), 1),
        (E4M3, torch.ones(32, 2), 1),
        (E4M3, torch.ones(32, 1).to(torch.float8_e4m3fn), 1),
    ):
        assert Fp8Rows.of(FloatCodes(element, codes, scale, rows=rows)) is None


def test_a_weight_lies_for_it_where_the_device_and_the_activations_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, rounding = fp8_codes(32, 64), IN_PRODUCTS["fp8"]
    assert native.layout(codes, rounding, CPU) is None
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for capability, fits in (((8, 6), False), ((8, 9), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert (native.layout(codes, rounding, GPU) is not None) == fits
        assert (native.obstacle(Fp8Rows("bf16"), GPU, torch.bfloat16) is None) == fits
    with monkeypatch.context() as older:
        older.delattr(torch.nn.functional, "scaled_mm")
        assert "newer" in str(native.lacking(GPU))
    assert native.layout(codes, None, GPU) is None
    assert native.layout(codes, IN_PRODUCTS["int8"], GPU) is None
    assert "float16" in str(native.obstacle(Fp8Rows("bf16"), GPU, torch.float16))
    assert "FP8" in str(native.obstacle(named("int4-g128-bf16"), GPU, torch.bfloat16))


def test_a_layer_gives_the_same_as_without_it_and_saves_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this CPU were such a device."""
    torch.manual_seed(0)
    monkeypatch.setattr(native, "lacking", lambda _: None)
    monkeypatch.setattr(native, "about", lambda _: "torch")
    monkeypatch.setitem(dispatch.DEVICES, "native", "cpu")
    tensor = (grid := FP8(activations="fp8").fit(w := torch.randn(40, 96))).pack(grid.round(w, 0))
    dispatch.choose.cache_clear()
    try:
        layer, other = (packed_linear_module(tensor, None, CPU, kernel) for kernel in ("auto", "reference"))
        assert isinstance(layer, PackedLinear)
        assert isinstance(layer.packed.layout, Fp8Rows)
        x = torch.randn(2, 3, 96).bfloat16()
        assert error(layer(x), other(x)) < TOLERANCE
        assert all(torch.equal(part, layer.quantized().parts[name]) for name, part in tensor.parts.items())
    finally:
        dispatch.choose.cache_clear()


def test_where_no_kernel_rounds_tokens_they_are_rounded_in_front() -> None:
    torch.manual_seed(0)
    codes = fp8_codes(16, 32)
    layout = Fp8Rows.of(codes)
    assert layout is not None
    x = torch.randn(5, 32)
    y = packed_linear(x, list(layout.arrange(codes).values()), None, layout.name, 16, "reference", "fp8")
    torch.testing.assert_close(y, FloatTokens(E4M3)(x) @ values(codes).T)
