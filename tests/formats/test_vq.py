"""Vector quantization: k-means and the bytes of codebooks and indices."""

import itertools

import pytest
import torch

from compressor.errors import RecipeError, SourceError
from compressor.formats.base import QuantizedTensor
from compressor.formats.numerics.codebook import kmeans, near, nearest
from compressor.formats.numerics.codes import VectorCodes, values
from compressor.formats.vq import VQ, VectorGrid
from compressor.runtime.kernels.layouts import layout_for
from compressor.runtime.kernels.layouts import named as layout_name
from compressor.runtime.kernels.op import packed_linear


def drawn(count: int = 600, length: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, length, generator=generator), torch.rand(count, generator=generator) + 0.1


class TestKMeans:
    def test_the_nearest_is_found(self) -> None:
        x, _ = drawn()
        codebook = x[:32] * 0.9
        distances = torch.cdist(x.double(), codebook.double())
        assert torch.equal(nearest(x, codebook), distances.argmin(1))
        assert torch.equal(near(x, codebook, 3).sort(1).values, distances.topk(3, largest=False).indices.sort(1).values)

    def test_the_objective_never_rises(self) -> None:
        x, weight = drawn()
        _, errors = kmeans(x, weight, 32, iterations=50)
        assert len(errors) > 5
        assert all(later <= earlier for earlier, later in itertools.pairwise(errors))

    def test_at_the_end_entries_are_the_weighted_means_of_what_is_nearest(self) -> None:
        x, weight = drawn()
        codebook, _ = kmeans(x, weight, 8, iterations=500)
        index = nearest(x, codebook)
        for entry in range(8):
            own = index == entry
            mean = (x[own] * weight[own, None]).sum(0) / weight[own].sum()
            torch.testing.assert_close(codebook[entry], mean, atol=2e-3, rtol=0)

    def test_it_beats_random_entries_by_far(self) -> None:
        x, weight = drawn(4000, 2)
        _, errors = kmeans(x, weight, 16, iterations=50)
        best = min(
            float(((x - c[nearest(x, c)]).square().sum(1) * weight).sum())
            for c in (x[torch.randperm(4000, generator=torch.Generator().manual_seed(i))[:16]] for i in range(20))
        )
        assert errors[-1] < 0.75 * best
        assert errors[-1] / float(2 * weight.sum()) < 0.115  # two normal numbers in 4 bits: .1089 where optimal

    def test_as_many_entries_as_different_vectors_are_exact(self) -> None:
        x, weight = drawn(20)
        codebook, errors = kmeans(x.repeat(30, 1), weight.repeat(30), 32, iterations=5)
        assert errors[-1] == 0
        assert torch.equal(codebook[nearest(x, codebook)], x)

    def test_a_vector_without_weight_does_not_count(self) -> None:
        x, weight = drawn()
        weight[::2] = 0
        some, _ = kmeans(x, weight, 8, iterations=20)
        x[::2] += 100
        again, _ = kmeans(x, weight, 8, iterations=20)
        assert some.abs().max() < 10
        assert again.abs().max() < 10

    def test_entries_that_nothing_is_nearest_to_are_used(self) -> None:
        x = torch.cat([torch.zeros(1000, 2), torch.randn(40, 2, generator=torch.Generator().manual_seed(0))])
        codebook, _ = kmeans(x, torch.ones(1040), 16, iterations=30)
        assert len(nearest(x, codebook).unique()) == 16

    def test_a_seed_repeats_itself(self) -> None:
        x, weight = drawn()
        assert torch.equal(*(kmeans(x, weight, 16, iterations=9, seed=3)[0] for _ in range(2)))


FORMATS = [
    VQ(vector=8, bits=5),
    VQ(vector=4, bits=8, residual_bits=3),
    VQ(vector=2, bits=11, residual_bits=12),
    VQ(vector=1, bits=2),
]


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(48, 200, generator=torch.Generator().manual_seed(0))


def grid(fmt: VQ, weight: torch.Tensor) -> VectorGrid:
    return fmt.fit(weight, torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label)
def test_a_weight_is_made_of_entries_as_the_layout_says(fmt: VQ, weight: torch.Tensor) -> None:
    """From the bits of the index, one by one."""
    fitted = grid(fmt, weight)
    packed = fitted.pack(fitted.round(weight, 0))
    words = [[int(word) & 0xFFFFFFFF for word in row] for row in packed.parts["weight_index"].tolist()]
    for v, i in ((0, 0), (3, 77), (48 // fmt.vector - 1, 199)):
        stream = sum(word << (32 * k) for k, word in enumerate(words[v]))
        code = stream >> i * fmt.index_bits & 2**fmt.index_bits - 1
        entry = packed.parts["weight_codebook"][code % 2**fmt.bits].float()
        if fmt.residual_bits:
            entry = entry + packed.parts["weight_residual"][code >> fmt.bits].float()
        assert torch.equal(packed.dequantize()[v * fmt.vector : (v + 1) * fmt.vector, i], entry)
    assert torch.equal(packed.dequantize(), fitted.decode(fitted.round(weight, 0), 0))


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label)
def test_every_bit_is_counted(fmt: VQ, weight: torch.Tensor) -> None:
    fitted = grid(fmt, weight)
    packed = fitted.pack(fitted.round(weight, 0))
    index = 48 // fmt.vector * 32 * -(-200 * fmt.index_bits // 32)
    books = 16 * fmt.vector * (2**fmt.bits + (2**fmt.residual_bits if fmt.residual_bits else 0))
    assert sum(8 * part.nbytes for part in packed.parts.values()) == fmt.stored_bits((48, 200)) == index + books


def test_entry_and_residual_are_chosen_together(weight: torch.Tensor) -> None:
    """No sum of two entries is nearer, where all entries are tried."""
    fitted = VQ(vector=4, bits=3, residual_bits=3).fit(weight)
    assert fitted.residual_KD is not None
    sums = (fitted.codebook_KD[:, None] + fitted.residual_KD).flatten(0, 1)
    x = weight.view(12, 4, 200).transpose(1, 2).flatten(0, 1)
    best = torch.cdist(x.double(), sums.double()).amin(1)
    found = fitted.decode(fitted.round(weight, 0), 0).view(12, 4, 200).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close((found - x).double().norm(dim=1), best, atol=1e-5, rtol=1e-5)


def test_more_bits_and_longer_vectors_lose_less(weight: torch.Tensor) -> None:
    def missed(fmt: VQ) -> float:
        fitted = fmt.fit(weight)
        return float((fitted.decode(fitted.round(weight, 0), 0) - weight).square().mean())

    assert missed(VQ(vector=2, bits=4)) < missed(VQ(vector=1, bits=2))
    assert missed(VQ(vector=2, bits=6)) < 0.5 * missed(VQ(vector=2, bits=4))
    assert missed(VQ(vector=4, bits=4, residual_bits=4)) < 0.5 * missed(VQ(vector=4, bits=4))


def test_importance_moves_the_codebook_towards_what_counts(weight: torch.Tensor) -> None:
    importance = torch.ones(200)
    importance[:20] = 100
    fmt = VQ(vector=4, bits=4)
    missed = [
        (g.decode(g.round(weight, 0), 0) - weight).square()[:, :20].sum()
        for g in (fmt.fit(weight), fmt.fit(weight, importance))
    ]
    assert missed[1] < 0.95 * missed[0]


@pytest.mark.parametrize(
    ("fmt", "name"),
    [
        (VQ(vector=8, bits=12), "vectors12"),
        (VQ(vector=8, bits=8, residual_bits=8), "vectors8+8"),
        (VQ(vector=8, bits=13), None),
        (VQ(vector=4, bits=8), None),
        (VQ(vector=8, bits=10, residual_bits=7), None),
    ],
    ids=str,
)
def test_the_kernels_take_what_they_are_fast_at(fmt: VQ, name: str | None) -> None:
    index = torch.zeros(2, 4, dtype=torch.int32)
    codes = VectorCodes(index, torch.zeros(2**fmt.bits, fmt.vector).bfloat16())
    if fmt.residual_bits:
        codes = VectorCodes(index, codes.codebook, index, torch.zeros(2**fmt.residual_bits, fmt.vector).bfloat16())
    layout = layout_for(codes)
    assert (layout.name if layout else None) == name


def test_a_layout_gives_back_what_it_was_given(weight: torch.Tensor) -> None:
    fmt = VQ(vector=8, bits=6, residual_bits=4)
    fitted = fmt.fit(weight)
    packed = fitted.pack(fitted.round(weight, 0))
    layout = layout_for(codes := fmt.codes(packed))
    assert layout is not None
    again = fmt.stored(layout.restore(layout.arrange(codes), (48, 200)), (48, 200))
    assert all(torch.equal(again.parts[name], part) for name, part in packed.parts.items())


@pytest.mark.parametrize("normed", [0, 1, 40])
@pytest.mark.parametrize("dense", [0, 3])
def test_norms_and_dense_channels_are_around_the_product(normed: int, dense: int) -> None:
    g = torch.Generator().manual_seed(0)
    index, book = torch.randint(16, (2, 40), generator=g), torch.randn(16, 8, generator=g).bfloat16()
    codes = VectorCodes(
        index.int(),
        book,
        norm=torch.rand(normed, generator=g).bfloat16() if normed else None,
        dense_ON=torch.randn(16, dense, generator=g).bfloat16() if dense else None,
        channels_N=torch.tensor([0, 7, 42], dtype=torch.int32) if dense else None,
    )
    layout = layout_for(codes)
    assert layout is not None
    assert layout_name(layout.name) == layout
    parts = layout.arrange(codes)
    again = layout.restore(parts, (16, 40 + dense))
    assert torch.equal(values(again), values(codes))
    x = torch.randn(5, 40 + dense, generator=g)
    y = packed_linear(x, [parts[name] for name in layout.parts], None, layout.name, 16, "reference")
    torch.testing.assert_close(y, x @ values(codes).T, rtol=1e-4, atol=1e-4)
    kept = [i for i in range(40 + dense) if not dense or i not in (0, 7, 42)]
    columns = [book.float()[index[:, k]].flatten() * (1 if codes.norm is None else codes.norm[k % normed]) for k in range(40)]
    torch.testing.assert_close(values(codes)[:, kept], torch.stack(columns, 1).float())


def test_only_vptq_chooses_norms_and_dense_channels(weight: torch.Tensor) -> None:
    with pytest.raises(RecipeError, match=r"vq8k4nlo0\.1: only `vptq` chooses norms and dense channels"):
        VQ(bits=4, norm="layer", outliers=0.1).fit(weight)


def test_dense_channels_that_cannot_be_are_refused() -> None:
    fmt = VQ(bits=4, outliers=0.1)
    parts = {name: torch.zeros(size, dtype=dtype) for name, (dtype, size) in fmt.checkpoint_parts((8, 20)).items()}
    for channels in ([3, 3], [7, 2], [-1, 2], [2, 20]):
        parts["weight_channels"] = torch.tensor(channels, dtype=torch.int32)
        with pytest.raises(SourceError, match="weight_channels are not ascending numbers below 20"):
            QuantizedTensor(fmt, (8, 20), parts).dequantize()


def test_a_borrower_counts_no_codebook() -> None:
    own = VQ(vector=4, bits=8, residual_bits=3, norm="layer")
    lent = own.borrowing("model.layers.0.mlp.up_proj")
    assert own.stored_bits((48, 200)) - lent.stored_bits((48, 200)) == 16 * 4 * (2**8 + 2**3)
    with pytest.raises(ValueError, match="layers that share codebooks need norms"):
        VQ(lender="model.layers.0.mlp.up_proj")


def test_rows_that_vectors_do_not_divide_name_the_numbers_and_a_remedy() -> None:
    with pytest.raises(ValueError, match="out_features 172 is not a multiple of vector 8; use a divisor such as 4"):
        VQ().stored_bits((172, 16))


@pytest.mark.parametrize(
    "options",
    [{"vector": 0}, {"vector": 17}, {"bits": 0}, {"bits": 17}, {"residual_bits": -1}, {"bits": 16, "residual_bits": 16}],
)
def test_what_cannot_be_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="is not in"):
        VQ(**options)


def test_codebooks_in_fp16_are_read_without_a_kernel() -> None:
    index, book = torch.zeros(2, 4, dtype=torch.int32), torch.rand(16, 8).half()
    packed = QuantizedTensor(fmt := VQ(vector=8, bits=4), (16, 4), {"weight_index": index[:, :1], "weight_codebook": book})
    assert torch.equal(packed.dequantize(), book[0].float().repeat(2)[:, None].expand(16, 4))
    assert layout_for(fmt.codes(packed)) is None


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label)
def test_zeros_stay_zeros(fmt: VQ) -> None:
    weight = torch.zeros(48, 32)
    fitted = fmt.fit(weight)
    assert not fitted.pack(fitted.round(weight, 0)).dequantize().any()
