"""Small floating-point numbers: every code and every tie, against torch's own types, Python's arithmetic and the papers."""

import bisect
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from compressor.formats.numerics.minifloat import E2M1, E4M3, E5M2, E4M3Scale, E8M0Scale, Minifloat, RealScale, ScaleType

ALL = [Minifloat.parse(f"e{e}m{m}") for e in range(1, 8) for m in range(8 - e) if e + m >= 2]
TORCH = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
KINDS: dict[str, ScaleType] = {"e4m3": E4M3Scale(), "e8m0": E8M0Scale(), "bf16": RealScale()}


@pytest.fixture(params=ALL, ids=lambda kind: kind.name)
def kind(request: pytest.FixtureRequest) -> Minifloat:
    found: Minifloat = request.param
    return found


def near(points: Tensor) -> Tensor:
    """Numbers, and their neighbours in fp32, of both signs."""
    around = [points, torch.nextafter(points, torch.tensor(torch.inf)), torch.nextafter(points, torch.tensor(-torch.inf))]
    return torch.cat([*around, *(-x for x in around)])


class TestCodes:
    def test_every_code_is_its_bits(self, kind: Minifloat) -> None:
        """Oracle: the definition in fractions: bias 2^(E-1) - 1, an exponent of zero is subnormal."""
        bias = 2 ** (kind.exponent - 1) - 1
        for code, found in enumerate(kind.magnitudes):
            exponent, mantissa = code >> kind.mantissa, Fraction(code % 2**kind.mantissa, 2**kind.mantissa)
            expected = (
                mantissa * Fraction(2) ** (1 - bias) if exponent == 0 else (1 + mantissa) * Fraction(2) ** (exponent - bias)
            )
            assert Fraction(found) == expected
        assert len(kind.magnitudes) == kind.sign - kind.reserved

    def test_every_number_has_its_code_and_back(self, kind: Minifloat) -> None:
        codes = torch.arange(kind.sign - kind.reserved, dtype=torch.uint8)
        both = torch.cat([codes, codes + kind.sign])
        assert torch.equal(kind.encode(kind.decode(both)), both)
        assert torch.equal(kind.decode(both), kind.round(kind.decode(both)))

    @pytest.mark.parametrize("name", TORCH)
    def test_all_256_patterns_are_those_of_torch(self, name: str) -> None:
        codes = torch.arange(256).to(torch.uint8)
        expected = codes.view(TORCH[name]).float()
        finite = expected.isfinite()
        assert torch.equal(Minifloat.parse(name).decode(codes.where(finite, 0)), expected.where(finite, 0.0))
        assert int((~finite).sum()) == 2 * Minifloat.parse(name).reserved

    def test_e2m1_is_the_table_of_the_specification(self) -> None:
        assert E2M1.magnitudes == (0, 0.5, 1, 1.5, 2, 3, 4, 6)

    @pytest.mark.parametrize(
        ("name", "magnitudes"),
        [("e1m2", (0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5)), ("e3m0", (0, 0.25, 0.5, 1, 2, 4, 8, 16))],
    )
    def test_other_kinds_of_4_bits(self, name: str, magnitudes: tuple[float, ...]) -> None:
        assert Minifloat.parse(name).magnitudes == magnitudes

    @pytest.mark.parametrize("name", ["e0m3", "e8m0", "e1m0", "e5m4", "fp4", "e2m"])
    def test_others_are_refused(self, name: str) -> None:
        with pytest.raises(ValueError, match=r"bits? of exponent"):
            Minifloat.parse(name)


class TestRounding:
    def test_it_is_to_nearest_ties_to_even(self, kind: Minifloat) -> None:
        """Oracle: exact arithmetic over all numbers, at every tie and number, beside them, and at random in between."""
        numbers = torch.tensor(kind.magnitudes)
        random = torch.rand(500, generator=torch.Generator().manual_seed(0)) * min(kind.largest * 1.1, 1e30)
        x = near(torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2, random]))
        values = [Fraction(value) for value in kind.magnitudes]  # in rising order, so the nearest are beside the place of x
        for given, code in zip(x.tolist(), kind.encode(x).tolist(), strict=True):
            size = abs(Fraction(given))
            place = bisect.bisect(values, size)
            around = range(max(place - 1, 0), min(place + 1, len(values)))
            least = min(abs(size - values[c]) for c in around)
            nearest = [c for c in around if abs(size - values[c]) == least]
            even = [c for c in nearest if c % 2 == 0] if kind.mantissa or 0 in nearest else nearest[-1:]
            assert code % kind.sign == (nearest if len(nearest) == 1 else even)[0], given

    @pytest.mark.parametrize("name", TORCH)
    def test_it_is_that_of_torch(self, name: str) -> None:
        """For every bf16 number there is, saturated."""
        kind, x = Minifloat.parse(name), torch.arange(65536).to(torch.uint16).view(torch.bfloat16).float()
        x = x[x.isfinite()]
        expected = x.clamp(-kind.largest, kind.largest).to(TORCH[name])
        assert torch.equal(kind.encode(x), expected.view(torch.uint8))
        assert torch.equal(kind.round(x), expected.float())

    def test_decoding_the_codes_and_rounding_are_the_same(self, kind: Minifloat) -> None:
        x = torch.randn(5003, generator=torch.Generator().manual_seed(0)) * kind.largest**0.5
        assert torch.equal(kind.decode(kind.encode(x)), kind.round(x))

    def test_it_saturates(self, kind: Minifloat) -> None:
        x = torch.tensor([3e38, -3e38, torch.inf, -torch.inf])
        assert torch.equal(kind.round(x), torch.tensor([1.0, -1, 1, -1]) * kind.largest)
        assert torch.equal(kind.decode(kind.encode(x)), kind.round(x))

    def test_denormal_numbers_become_zero_of_their_sign(self) -> None:
        x = torch.tensor([1e-42, -1e-42, 0.0, -0.0])
        for kind in (E2M1, E4M3, E5M2):
            assert kind.encode(x).tolist() == [0, kind.sign, 0, kind.sign]

    def test_a_view_that_is_not_contiguous_is_rounded_all_the_same(self, kind: Minifloat) -> None:
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
        assert torch.equal(kind.encode(x.T), kind.encode(x).T)


class TestScales:
    @pytest.mark.parametrize(
        ("name", "places"),
        [("e4m3", range(1, 127)), ("e8m0", range(-126, 121)), ("bf16", range(1 << 7, (255 << 7)))],
    )
    def test_every_scale_is_found_at_its_place(self, name: str, places: range) -> None:
        scales, there = KINDS[name], torch.tensor(places)
        found = scales.at(there)
        assert (found[1:] > found[:-1]).all()
        assert torch.equal(scales.nearest(found), there.int())
        assert torch.equal(scales.stored(found).float(), found)
        assert torch.equal(scales.at(torch.tensor([places[0] - 1, places[-1] + 1])), found[[0, -1]])

    @pytest.mark.parametrize("name", KINDS)
    def test_the_nearest_scale_is_the_nearest(self, name: str) -> None:
        scales, x = KINDS[name], torch.logspace(-8, 8.6, 5003, base=2.0)
        place = scales.nearest(x)
        found, *others = ((scales.at(p) - x).abs() for p in (place, place - 1, place + 1))
        assert all((found <= other).all() for other in others)

    @pytest.mark.parametrize("element", [E2M1, E4M3], ids=lambda kind: kind.name)
    def test_a_power_of_two_cuts_off_an_eighth_at_most_and_wastes_none(self, element: Minifloat) -> None:
        largest = torch.logspace(-30, 30, 4001, base=2.0)
        scale = E8M0Scale().at(E8M0Scale().ceiling(largest, element))
        held = largest / scale
        top = 2.0 ** torch.tensor(element.largest).log2().floor()
        assert 0.875 * top - 1e-3 <= held.min() <= held.max() < 1.75 * top


def test_the_smallest_normal_number_is_the_end_of_the_subnormal_ones(kind: Minifloat) -> None:
    """What lies between zero and it is evenly spaced."""
    numbers = torch.tensor(kind.magnitudes[: 2**kind.mantissa + 1])
    steps = numbers[1:] - numbers[:-1]
    assert (steps == steps[0]).all()
