"""The CPU kernels against the product of the activations that they round, in double precision.

Every instruction set that this machine has runs; AMX, where it is missing, with a header in the place of its instructions.

Shape suffixes: M tokens, N out_features, K in_features.
"""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerance import TOLERANCE, error
from torch import Tensor
from torch.nn.functional import pad

from compressor.errors import KernelError
from compressor.formats.numerics.activations import token_scales
from compressor.formats.numerics.codes import IntCodes, values
from compressor.runtime.kernels import cpu
from compressor.runtime.kernels.layouts.int_groups import IntGroups

SOURCES = Path(cpu.__file__).parent
TILES = Path(__file__).with_name("amx_tiles.h")
BF16, FP32 = torch.bfloat16, torch.float32
GROUPS = {2: (32, 64, 128, 384, 0), 3: (32, 64, 128, 384, 0), 4: (16, 32, 64, 192, 576, 0), 8: (8, 16, 32, 96, 128, 0)}
EXACT = 1e-6  # of fp32: the integers are exact, their scaled sums are rounded

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="the package was built without a C compiler")


@pytest.fixture(scope="session")
def emulated_amx(tmp_path_factory: pytest.TempPathFactory) -> cpu.Library:
    """The kernels, with `tiles` for AMX's instructions."""
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler to build the emulation of AMX with")
    out = tmp_path_factory.mktemp("amx") / "kernels.so"
    flags = ["-O2", "-std=gnu11", "-ffp-contract=off", "-fvisibility=hidden", "-fPIC", "-shared", "-Wno-unknown-pragmas"]
    sources = sorted(map(str, SOURCES.glob("*.c")))
    subprocess.run([compiler, *flags, f'-DCOMPRESSOR_TILES="{TILES}"', *sources, "-o", str(out)], check=True)
    library = cpu.Library.open(out)
    if "amx" not in library.isas:
        pytest.skip("AMX is emulated with AVX-512, which this machine does not have")
    return library


@pytest.fixture(params=cpu.ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An instruction set."""
    own = cpu.library()
    assert own is not None
    name: str = request.param
    if name not in own.isas:
        if name != "amx":
            pytest.skip(f"this machine has no {name}")
        emulated = request.getfixturevalue("emulated_amx")
        monkeypatch.setattr(cpu, "library", lambda: emulated)
    return name


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def weight(bits: int, group: int, rows: int = 40, columns: int = 1152, dtype: torch.dtype = BF16) -> IntCodes:
    """Random codes; group 0 for the row."""
    generator = torch.Generator().manual_seed(rows + columns + bits + group)
    draw = lambda *shape: torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=generator)  # noqa: E731
    groups = columns // group if group else 1
    scale = (torch.rand(rows, groups, generator=generator) + 0.01).to(dtype)
    return IntCodes(bits, draw(rows, columns), scale, draw(rows, groups))


def activations(tokens: int, columns: int, dtype: torch.dtype = FP32) -> Tensor:
    generator = torch.Generator().manual_seed(tokens + columns)
    return torch.randn(tokens, columns, generator=generator).to(dtype)


def packed(codes: IntCodes) -> tuple[IntGroups, list[Tensor]]:
    layout = IntGroups.of(codes)
    assert layout is not None
    return layout, list(layout.arrange(codes).values())


def product(x_MK: Tensor, codes: IntCodes, isa: str | None, bias: Tensor | None = None) -> Tensor:
    """The kernels' product, with activations padded as the operator does it."""
    layout, parts = packed(codes)
    x_MK = pad(x_MK, (0, -x_MK.shape[1] % layout.chunk))
    return cpu.linear(x_MK, parts, layout, codes.codes_OI.shape[0], bias, isa)


def span_of(group: int) -> int:
    """Columns that share a scale of the activations: the largest power of two that divides the group, 32 at most."""
    return min(32, group & -group) if group else 32


def rounded(x_MK: Tensor, span: int) -> Tensor:
    """What the kernels make of activations: codes of 8 bits, times the scale of their span."""
    spans = pad(x_MK.float(), (0, -x_MK.shape[1] % span)).unflatten(1, (-1, span))
    largest = spans.abs().amax(2, keepdim=True)
    steps = torch.tensor(127.0) / largest  # a number divided by a tensor is a product with its reciprocal, twice rounded
    codes = (spans * torch.where(largest > 0, steps, 0)).round()
    exact: Tensor = codes.double() * (largest / 127).double()
    return exact.flatten(1)[:, : x_MK.shape[1]]


def expected(x_MK: Tensor, codes: IntCodes, group: int, bias: Tensor | None = None) -> Tensor:
    y_MN = rounded(x_MK, span_of(group)) @ values(codes).double().T
    return y_MN if bias is None else y_MN + bias.double()


@pytest.mark.parametrize(("bits", "group"), [(bits, group) for bits, groups in GROUPS.items() for group in groups])
def test_the_product_is_that_of_the_rounded_activations(isa: str, bits: int, group: int) -> None:
    codes = weight(bits, group)
    for tokens in (1, 2, 7, 8, 16, 17, 33, 65):
        x = activations(tokens, 1152)
        assert error(product(x, codes, isa), expected(x, codes, group)) < EXACT, tokens


@pytest.mark.parametrize("dtype", (BF16, FP32))
@pytest.mark.parametrize(("bits", "group"), [(2, 64), (3, 128), (4, 16), (4, 0), (8, 128), (8, 0)])
def test_with_given_scales_tokens_are_rounded_to_their_multiples(isa: str, bits: int, group: int, dtype: torch.dtype) -> None:
    """Codes are -128 to 127: the largest activation of a token, if positive, is cut off by half a step."""
    codes = weight(bits, group)
    layout, parts = packed(codes)
    for tokens in (1, 17, 65):
        x = activations(tokens, 1152, dtype)
        scale = x.float().abs().amax(1, keepdim=True) / 127.5
        steps = torch.round(x.float() / scale).clamp(-128, 127).double() * scale.double()
        y = cpu.linear(x, parts, layout, 40, None, isa, scale)
        assert error(y, steps @ values(codes).double().T) < (TOLERANCE if dtype == BF16 else EXACT), tokens


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_with_given_scales_no_sum_overflows(isa: str, bits: int) -> None:
    """All activations are -128 steps, all codes at their upper end."""
    codes = weight(bits, 0, 16, 1024)
    codes.codes_OI.fill_(2**bits - 1)
    codes.zero.fill_(0)
    layout, parts = packed(codes)
    y = cpu.linear(torch.full((5, 1024), -1000.0), parts, layout, 16, None, isa, torch.full((5, 1), 0.5))
    expected = -64 * 1024 * (2**bits - 1) * codes.scale.double().T
    torch.testing.assert_close(y.double(), expected.expand(5, 16), rtol=EXACT, atol=0)


@pytest.mark.parametrize("bad", (float("nan"), float("inf"), -float("inf")))
def test_with_given_scales_what_is_not_finite_is_not_hidden(isa: str, bad: float) -> None:
    codes, x = weight(4, 128), activations(20, 1152)
    layout, parts = packed(codes)
    good = cpu.product_of_tokens(x, parts, layout, 40, None)
    x[17, 1151] = bad
    y = cpu.linear(x, parts, layout, 40, None, isa, token_scales(x))
    assert not y[17].isfinite().any()
    others = [token for token in range(20) if token != 17]
    torch.testing.assert_close(y[others], good[others], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (15, 33), (17, 96), (16, 544), (50, 1000)])
def test_ragged_weights(isa: str, bits: int, rows: int, columns: int) -> None:
    codes = weight(bits, 0, rows, columns)
    for tokens in (1, 5):
        x = activations(tokens, columns)
        y = product(x, codes, isa)
        assert y.shape == (tokens, rows)
        assert error(y, expected(x, codes, 0)) < EXACT


@pytest.mark.parametrize("dtype", (BF16, FP32))
@pytest.mark.parametrize("scale", (BF16, torch.float16))
def test_dtypes_and_bias(isa: str, dtype: torch.dtype, scale: torch.dtype) -> None:
    codes, x, bias = weight(4, 64, dtype=scale), activations(3, 1152, dtype), activations(1, 40)[0].to(dtype) * 100
    y = product(x, codes, isa, bias)
    assert y.dtype == dtype
    assert error(y, expected(x, codes, 64, bias)) < (TOLERANCE if dtype == BF16 else EXACT)
    assert torch.equal(y, product(x, codes, isa, bias.double()))


def test_scales_of_half_precision_may_be_subnormal(isa: str) -> None:
    codes = weight(4, 64, dtype=torch.float16)
    codes.scale.copy_(2.0**-24 * torch.randint(0, 2048, codes.scale.shape))
    x = activations(2, 1152)
    assert error(product(x, codes, isa), expected(x, codes, 64)) < EXACT


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
@pytest.mark.parametrize("code", (0, -1))
@pytest.mark.parametrize("zero", (0, -1))
@pytest.mark.parametrize("sign", (1, -1))
def test_no_sum_overflows(isa: str, bits: int, code: int, zero: int, sign: int) -> None:
    """All activations are rounded to 127 or -127, codes and zero points are at their ends."""
    last = 2**bits - 1
    codes = weight(bits, 0, 16, 1024)
    codes.codes_OI.fill_(code & last)
    codes.zero.fill_(zero & last)
    x = torch.full((5, 1024), sign * 3.0)
    difference = ((code & last) - (zero & last)) * codes.scale.double().T
    torch.testing.assert_close(product(x, codes, isa).double(), sign * 3072 * difference.expand(5, 16), rtol=EXACT, atol=0)


def test_one_huge_activation_and_zeros(isa: str) -> None:
    codes = weight(4, 128)
    x = torch.zeros(3, 1152)
    x[1, 700] = 1e36
    x[2] = 1e-44
    codes.scale.fill_(2.0**-6)
    y = product(x, codes, isa)
    assert torch.equal(y[0], torch.zeros(40))
    torch.testing.assert_close(y[1], 1e36 * values(codes)[:, 700], rtol=EXACT, atol=0)
    assert y[2].abs().max() < 1e-35  # too small to be rounded to a multiple of anything


@pytest.mark.parametrize("bad", (float("nan"), float("inf"), -float("inf")))
@pytest.mark.parametrize("dtype", (BF16, FP32))
def test_what_is_not_finite_is_not_hidden(isa: str, bad: float, dtype: torch.dtype) -> None:
    codes, x = weight(4, 128), activations(20, 1152, dtype)
    good = product(x, codes, isa)
    x[17, 1151] = bad
    y = product(x, codes, isa)
    assert not y[17].isfinite().any()
    others = [token for token in range(20) if token != 17]
    assert torch.equal(y[others], good[others])


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_data_may_begin_anywhere(isa: str, bits: int) -> None:
    codes, x = weight(bits, 128), activations(3, 1152, BF16)
    layout, parts = packed(codes)
    moved = lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)  # noqa: E731
    shifted = [moved(part) for part in parts]
    assert all(part.data_ptr() % 16 for part in shifted)
    assert torch.equal(cpu.linear(moved(x), shifted, layout, 40, None, isa), cpu.linear(x, parts, layout, 40, None, isa))


@pytest.mark.usefixtures("two_threads")
def test_the_number_of_threads_changes_nothing(isa: str) -> None:
    codes = weight(4, 128, 530, 2048)
    for tokens in (1, 70):
        x = activations(tokens, 2048)
        two = product(x, codes, isa)
        torch.set_num_threads(1)
        assert torch.equal(two, product(x, codes, isa))
        torch.set_num_threads(2)


@pytest.mark.parametrize(("bits", "group"), [(bits, group) for bits, groups in GROUPS.items() for group in groups])
@pytest.mark.parametrize("dtype", (BF16, FP32, torch.float16))
def test_dense_weights_are_exact(isa: str, bits: int, group: int, dtype: torch.dtype) -> None:
    codes = weight(bits, group)
    layout, parts = packed(codes)
    assert torch.equal(cpu.dequantize(parts, layout, 40, 1152, dtype, isa), values(codes).to(dtype))


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_dense_weights_are_padded_with_zeros(isa: str, bits: int) -> None:
    codes = weight(bits, 0, 5, 300)
    codes.scale.fill_(1)
    layout, parts = packed(codes)
    assert torch.equal(cpu.dequantize(parts, layout, 5, 300, FP32, isa), values(codes))
    padded = 300 + -300 % layout.chunk
    zero = codes.zero.float()
    assert torch.equal(cpu.dequantize(parts, layout, 5, padded, FP32, isa)[:, 300:], (-zero).expand(5, padded - 300))


def heavy_tailed(tokens: int, columns: int) -> Tensor:
    """Student's t with three degrees of freedom: about every token has a number 20 times as large as most."""
    return activations(tokens, columns) / activations(3 * tokens, columns).view(3, tokens, columns).square().mean(0).sqrt()


def outlier_channels(tokens: int, columns: int) -> Tensor:
    """One channel of a hundred is ten times as large as the others."""
    x = activations(tokens, columns)
    x[:, 50::100] *= 10
    return x


@pytest.mark.parametrize("draw", (activations, heavy_tailed, outlier_channels))
@pytest.mark.parametrize("group", (32, 128, 0))
def test_rounding_activations_costs_less_than_a_hundredth(draw: Callable[[int, int], Tensor], group: int) -> None:
    codes, x = weight(4, group, 64, 2048), draw(64, 2048)
    assert error(product(x, codes, None), x.double() @ values(codes).double().T) < 1e-2


def test_an_instruction_set_that_is_missing_is_refused() -> None:
    with pytest.raises(KernelError, match="this machine has no instruction set `neon`; it has portable"):
        product(activations(1, 1152), weight(4, 128), "neon")


def test_obstacles(monkeypatch: pytest.MonkeyPatch) -> None:
    layout: Any = IntGroups(4, 128, "bf16")
    here = torch.device("cpu")
    assert cpu.obstacle(layout, here, BF16) is None
    assert cpu.obstacle(layout, here, FP32) is None
    assert cpu.obstacle(layout, here, torch.float16) is None
    assert "float64" in (cpu.obstacle(layout, here, torch.float64) or "")
    other: Any = object()
    assert cpu.obstacle(other, here, BF16) == "no kernel for this layout"
    monkeypatch.setattr(cpu, "library", lambda: None)
    assert "built without a C compiler" in (cpu.obstacle(layout, here, BF16) or "")
    with pytest.raises(KernelError, match="built without a C compiler; install one"):
        product(activations(1, 1152), weight(4, 128), None)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="tells loaded libraries by /proc")
def test_threads_are_those_of_torch() -> None:
    """A second OpenMP would start threads of its own beside torch's."""
    cpu.library()
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    runtimes = {name for name in mapped if Path(name).name.startswith(("libgomp", "libomp", "libiomp"))}
    assert len(runtimes) == 1
