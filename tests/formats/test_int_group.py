import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from compressor.formats.base import QuantizedTensor
from compressor.formats.int_group import IntGroup


@pytest.fixture
def weight():
    return torch.randn(48, 256, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 3, 256)


def squared_error(fmt, weight, **fit):
    grid = fmt.fit(weight, **fit)
    return float((grid.decode(grid.round(weight, 0), 0) - weight).square().sum())


def oracle(fmt):
    """The compressed-tensors package's own packer for a format."""
    strategy = {"strategy": "channel"} if fmt.group_size == -1 else {"strategy": "group", "group_size": fmt.group_size}
    arguments = QuantizationArgs(num_bits=fmt.bits, type="int", symmetric=fmt.symmetric, **strategy)
    layout = "pack-quantized" if fmt.packed else "int-quantized"
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments, format=layout)
    return scheme, BaseCompressor.get_value_from_registry(layout)


def compressed_tensors(fmt, packed):
    """What it makes of our values, scales and zero points."""
    codes, (scheme, compressor) = fmt.codes(packed), oracle(fmt)
    given = {"weight": packed.dequantize(), "weight_scale": packed.parts["weight_scale"].float()}
    if not fmt.symmetric:
        given["weight_zero_point"] = (codes.zero.int() - 2 ** (fmt.bits - 1)).to(torch.int8)
    return compressor.compress(given, scheme)


@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize("bits", range(2, 9))
def test_bytes_are_those_of_compressed_tensors(bits, group_size, weight):
    """The oracle is the compressed-tensors package: it packs our values with our scales, and must get our words."""
    fmt = IntGroup(bits=bits, group_size=group_size)
    grid = fmt.fit(weight)
    packed = grid.pack(grid.round(weight, 0))
    theirs = compressed_tensors(fmt, packed)
    assert QuantizationArgs(**fmt.compressed_tensors()["weights"]) == oracle(fmt)[0].weights
    assert torch.equal(theirs["weight_packed"], packed.parts["weight_packed"])
    assert torch.equal(theirs["weight_shape"], packed.parts["weight_shape"])


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize(("bits", "is_packed"), [(4, True), (3, True), (8, True), (8, False), (4, False)])
def test_bytes_of_the_asymmetric_kind_are_those_of_compressed_tensors(is_packed, bits, group_size, weight):
    fmt = IntGroup(bits=bits, group_size=group_size, symmetric=False, packed=is_packed)
    grid = fmt.fit(weight)
    packed = grid.pack(grid.round(weight, 0))
    theirs = compressed_tensors(fmt, packed)
    for name in packed.parts.keys() - {"weight_scale"}:
        assert torch.equal(theirs[name], packed.parts[name]), name


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("is_packed", [True, False])
def test_what_compressed_tensors_packs_is_read_and_stored_again(is_packed, dtype, symmetric, weight):
    """Their words with scales of any dtype: the same values as they make of them, and the same bytes again."""
    fmt = IntGroup(bits=8, group_size=64, symmetric=symmetric, packed=is_packed)
    grid = fmt.fit(weight)
    given = grid.pack(grid.round(weight, 0))
    parts = {**compressed_tensors(fmt, given), "weight_scale": given.parts["weight_scale"].to(dtype)}
    packed = QuantizedTensor(fmt, given.shape, {name: parts[name] for name in given.parts})
    scheme, compressor = oracle(fmt)
    theirs = compressor.decompress({**parts, "weight_scale": parts["weight_scale"].float()}, scheme)["weight"]
    assert torch.equal(packed.dequantize(), theirs)
    again = fmt.stored(fmt.codes(packed), packed.shape).parts
    assert all(again[name].dtype == part.dtype and torch.equal(again[name], part) for name, part in packed.parts.items())


@pytest.mark.parametrize("symmetric", [True, False])
def test_error_falls_with_bits_and_with_smaller_groups(symmetric, weight):
    by_bits = [squared_error(IntGroup(bits=b, group_size=64, symmetric=symmetric), weight) for b in range(2, 9)]
    by_group = [squared_error(IntGroup(bits=3, group_size=g, symmetric=symmetric), weight) for g in (-1, 128, 64, 32)]
    assert by_bits == sorted(by_bits, reverse=True)
    assert by_group == sorted(by_group, reverse=True)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_searched_scales_are_never_worse_than_the_range(bits, symmetric, weight):
    fmt = IntGroup(bits=bits, group_size=64, symmetric=symmetric)
    assert squared_error(fmt, weight) <= squared_error(fmt, weight, search=False)


def test_search_minimises_the_error_that_importance_weighs(weight):
    fmt = IntGroup(bits=3, group_size=64)
    importance = torch.zeros(256)
    importance[::64] = 1.0  # one channel of each group

    def important_error(**fit):
        grid = fmt.fit(weight, **fit)
        return float((grid.decode(grid.round(weight, 0), 0) - weight)[:, ::64].square().sum())

    assert important_error(importance_I=importance) < 0.5 * important_error()


def test_a_symmetric_grid_turns_to_the_longer_side():
    """At 2 bits the values are -2, -1, 0, 1 times the scale: 2 is representable only with a negative scale."""
    weight = torch.tensor([[2.0, 1.0, 0.0, -1.0] * 8])
    assert squared_error(IntGroup(bits=2, group_size=-1), weight) == 0.0


def test_zero_is_exact_in_every_format():
    weight = torch.zeros(4, 64)
    weight[:, 32:] = torch.randn(4, 32)
    for symmetric in (True, False):
        grid = IntGroup(bits=4, group_size=32, symmetric=symmetric).fit(weight)
        values = grid.decode(grid.round(weight, 0), 0)
        assert torch.equal(values[:, :32], weight[:, :32])
        assert torch.isfinite(values).all()


@pytest.mark.parametrize("magnitude", [1e-30, 1e-20, 1e20, 1e37])
def test_extreme_magnitudes_stay_finite_and_close(magnitude):
    weight = torch.linspace(-1, 1, 64).repeat(2, 1) * magnitude
    grid = IntGroup(bits=8, group_size=64).fit(weight)
    values = grid.decode(grid.round(weight, 0), 0)
    assert torch.isfinite(values).all()
    assert float(((values - weight) / magnitude).abs().max()) < 0.02


def test_a_group_size_that_does_not_divide_names_the_numbers_and_a_remedy():
    with pytest.raises(ValueError, match=r"in_features 172 is not a multiple of group_size 128.*divisor such as 86, or -1"):
        IntGroup(group_size=128).stored_bits((16, 172))


@pytest.mark.parametrize("options", [{"bits": 1}, {"bits": 9}, {"group_size": 0}, {"group_size": -2}])
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        IntGroup(**options)
