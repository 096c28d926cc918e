"""GPTQ's layout, against layers that GPTQModel and auto-round wrote and what GPTQModel makes of them (golden/README.md)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from compressor.errors import SourceError
from compressor.formats.base import QuantizedTensor
from compressor.formats.gptq_int import GptqInt
from compressor.formats.numerics.codes import values
from compressor.model.hf_config import quantization_config

GOLDEN = Path(__file__).parent / "golden" / "gptq.safetensors"
VARIANTS = ["b4", "b4actasym2", "b3asym", "b2asym", "b8asym", "autoround", "b4zero", "b3zero"]
SHAPE = (32, 128)


def golden(variant: str) -> tuple[QuantizedTensor, torch.Tensor]:
    """A stored layer, read by its `quantization_config`, and what GPTQModel makes of it."""
    with safe_open(GOLDEN, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(f"{variant}.")]  # noqa: SIM118 - not iterable itself
        parts = {name.removeprefix(f"{variant}."): file.get_tensor(name) for name in names}
        config = json.loads(file.metadata()[variant])
    theirs = parts.pop("dequantized")
    fmt = quantization_config.reader({"quantization_config": config}, "here")("layer", parts.keys())
    return QuantizedTensor(fmt, SHAPE, parts), theirs


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_weight_is_what_gptqmodel_makes_of_it(variant: str) -> None:
    packed, theirs = golden(variant)
    assert torch.equal(packed.dequantize().half(), theirs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_its_codes_are_stored_again_byte_for_byte(variant: str) -> None:
    packed, _ = golden(variant)
    again = packed.format.stored(packed.format.codes(packed), SHAPE)
    assert again.parts.keys() == packed.parts.keys()
    for name, part in packed.parts.items():
        assert again.parts[name].dtype == part.dtype
        assert torch.equal(again.parts[name], part), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_its_parts_are_those_that_the_format_names(variant: str) -> None:
    packed, _ = golden(variant)
    assert {name: (part.dtype, tuple(part.shape)) for name, part in packed.parts.items()} == packed.format.checkpoint_parts(
        SHAPE
    )


def test_with_act_order_the_columns_come_by_group() -> None:
    packed, theirs = golden("b4actasym2")
    codes = packed.format.codes(packed)
    assert codes.order_I is not None
    assert sorted(codes.order_I.tolist()) == list(range(SHAPE[1]))
    g_idx = packed.parts["g_idx"][codes.order_I]
    assert torch.equal(g_idx, torch.arange(SHAPE[1], dtype=torch.int32) // 32)
    by_hand = (codes.codes_OI.float() - codes.zero.float()[:, g_idx]) * codes.scale.float()[:, g_idx]
    assert torch.equal(by_hand.half(), theirs[:, codes.order_I])
    for group in codes.order_I.split(32):
        assert group.tolist() == sorted(group.tolist())


def test_the_golden_layers_have_what_they_are_there_for() -> None:
    zeros = {variant: golden(variant)[0] for variant in VARIANTS}
    codes = {variant: packed.format.codes(packed) for variant, packed in zeros.items()}
    assert {variant for variant in VARIANTS if (codes[variant].zero == 0).any()} == {"b4zero", "b3zero"}
    assert [variant for variant in VARIANTS if codes[variant].order_I is not None] == ["b4actasym2"]
    assert all(code.zero.unique().numel() > 1 for variant, code in codes.items() if variant != "b4")


def test_symmetric_zero_points_look_as_in_other_programs() -> None:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    word = {}
    for name in ("gptq", "gptq_v2"):
        grid = GptqInt(bits=4, group_size=32, checkpoint_format=name).fit(weight)
        packed = grid.pack(grid.round(weight, 0))
        word[name] = {f"{value & 0xFFFFFFFF:08x}" for value in packed.parts["qzeros"].flatten().tolist()}
    assert word == {"gptq": {"77777777"}, "gptq_v2": {"88888888"}}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 1e4])
def test_packing_loses_nothing(magnitude: float, bits: int, checkpoint_format: str, symmetric: bool) -> None:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).abs() * magnitude  # zero points of 0, too
    fmt = GptqInt(bits=bits, group_size=64, symmetric=symmetric, checkpoint_format=checkpoint_format, g_idx=bits == 4)
    grid = fmt.fit(weight)
    codes = grid.round(weight, 0)
    packed = grid.pack(codes)
    assert torch.equal(packed.dequantize(), grid.decode(codes, 0))
    assert torch.equal(values(fmt.codes(packed)), grid.decode(codes, 0))
    assert torch.isfinite(packed.dequantize()).all()


def test_groups_of_different_sizes_are_refused() -> None:
    packed, _ = golden("b4actasym2")
    parts = {**packed.parts, "g_idx": packed.parts["g_idx"].clone()}
    parts["g_idx"][0] = (parts["g_idx"][0] + 1) % 4
    with pytest.raises(
        SourceError, match=r"gptq4ag32-v2: g_idx does not put 32 of 128 input channels into each group; .*original"
    ):
        packed.format.codes(QuantizedTensor(packed.format, SHAPE, parts))


@pytest.mark.parametrize(
    ("options", "message"), [({"bits": 5}, "bits: 5 is none of 2, 3, 4, 8"), ({"group_size": 0}, "group_size: 0")]
)
def test_impossible_options_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GptqInt(**options)


def test_labels_tell_variants_apart() -> None:
    variants = [
        GptqInt(bits=4, group_size=group, symmetric=symmetric, checkpoint_format=name, g_idx=g_idx)
        for group in (-1, 128)
        for symmetric in (True, False)
        for name in ("gptq", "gptq_v2")
        for g_idx in (True, False)
    ]
    assert len({fmt.label for fmt in variants}) == len(variants)
