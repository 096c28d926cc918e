import pytest
import torch

from compressor.assets import DEMO_MODEL
from compressor.errors import CalibrationError
from compressor.formats.int_group import IntGroup
from compressor.model.source import ModelSource
from compressor.pipeline.calibration.stats import Hessian, Mismatch
from compressor.pipeline.calibration.stream import CalibrationStream, watching
from compressor.pipeline.ranks import Ranks

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokens():
    return list(torch.randint(4096, (5, 24), generator=torch.Generator().manual_seed(0)).split(2))


@pytest.fixture
def source():
    return ModelSource(DEMO_MODEL, CPU)


def inputs_of(source, tokens, layer):
    """Independent: what a layer of the whole, plain model reads, by a hook on stock transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    seen = []
    model.get_submodule(layer).register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in tokens:
            model(batch)
    return torch.cat(seen).double()


def test_layers_that_read_the_same_tensor_share_one_statistic(source, tokens):
    stream = CalibrationStream(source.first_inputs(tokens), Ranks(), CPU)
    block = source.block(0)
    stats = stream.collect(block, list(block.layers), (Hessian,))
    assert stats.taps(block.layers) == [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ]
    assert stats["self_attn.q_proj", Hessian] is stats["self_attn.v_proj", Hessian]


@pytest.mark.parametrize("layer", ["self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj"])
def test_the_hessian_of_a_deep_block_is_that_of_the_plain_model(source, tokens, layer):
    stream = CalibrationStream(source.first_inputs(tokens), Ranks(), CPU)
    for index in range(2):
        stream.advance(source.block(index))
    block = source.block(2)
    hessian = stream.collect(block, list(block.layers), (Hessian,))[layer, Hessian]
    x = inputs_of(source, tokens, f"{block.prefix}.{layer}")
    assert hessian.count == len(x) == 5 * 24
    torch.testing.assert_close(hessian.value.double(), x.T @ x / len(x), rtol=1e-3, atol=1e-4 * float(x.square().mean()))


def test_collecting_leaves_no_hook_and_moves_nothing(source, tokens):
    stream = CalibrationStream(source.first_inputs(tokens), Ranks(), CPU)
    before = [batch.clone() for batch in stream.hidden]
    block = source.block(0)
    stream.collect(block, ["mlp.down_proj"], (Hessian,))
    assert all(torch.equal(a, b) for a, b in zip(before, stream.hidden, strict=True))
    assert not any(module._forward_pre_hooks for module in block.module.modules())


def test_a_block_that_overflows_is_named(source, tokens):
    stream = CalibrationStream([torch.full((1, 4, 256), float("inf"))], Ranks(), CPU)
    with pytest.raises(CalibrationError, match=r"model\.layers\.0: its output is not finite"):
        stream.advance(source.block(0))


@pytest.mark.parametrize("width", [1, 7, 128, 300, 700])
def test_a_hessian_is_the_mean_outer_product_at_any_width(width):
    x = torch.randn(50, width)
    hessian = Hessian(width, CPU)
    hessian.update(x)
    torch.testing.assert_close(hessian.value, x.T @ x / 50)


def test_a_hessian_does_not_depend_on_how_tokens_are_cut():
    x = torch.randn(64, 200)
    whole, parts = (Hessian(200, CPU) for _ in range(2))
    whole.update(x)
    for part in x.split(5):
        parts.update(part)
    torch.testing.assert_close(whole.value, parts.value)
    assert torch.equal(whole.value, whole.value.T)


@pytest.fixture
def halved(source, tokens):
    """Two streams before block 2, every down_proj before it being half of what it was; the block with q_proj halved."""
    stream = CalibrationStream(source.first_inputs(tokens), Ranks(), CPU, two_streams=True)
    for index in range(3):
        block = source.block(index)
        block.unrounded = {}
        stream.enter(block)
        name = "self_attn.q_proj" if index == 2 else "mlp.down_proj"
        block.install({name: packed(block.weight(name) / 2)})
        if index < 2:
            stream.advance(block)
    return stream, block


def packed(w_OI):
    grid = IntGroup(bits=8, group_size=32).fit(w_OI)
    return grid.pack(grid.round(w_OI, 0))


def test_targets_are_the_hidden_states_of_the_plain_model(halved, source, tokens):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    with torch.no_grad():
        expected = [model(batch, output_hidden_states=True).hidden_states[3] for batch in tokens]
    torch.testing.assert_close(halved[0].targets, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layer", ["self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj"])
def test_a_mismatch_is_between_the_compressed_and_the_plain_model(halved, source, tokens, layer):
    stream, block = halved
    stats = stream.collect(block, list(block.layers), (Hessian, Mismatch))
    seen = []
    with watching(block, [layer], lambda name, x: seen.append(x.flatten(0, -2))):
        for hidden in stream.hidden:
            block.forward(hidden)
    x, dense = torch.cat(seen).double(), inputs_of(source, tokens, f"{block.prefix}.{layer}")
    expected = (dense - x).T @ x / len(x)
    torch.testing.assert_close(
        stats[layer, Mismatch].value.double(), expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max())
    )
    assert expected.abs().max() > 0.01 * (x.T @ x / len(x)).abs().max()


def test_without_a_compressed_layer_there_is_no_mismatch(source, tokens):
    stream = CalibrationStream(source.first_inputs(tokens), Ranks(), CPU, two_streams=True)
    block = source.block(0)
    block.unrounded = {}
    stream.enter(block)
    assert not stream.collect(block, ["mlp.down_proj"], (Mismatch,))["mlp.down_proj", Mismatch].value.any()


def test_one_stream_keeps_no_dense_hidden_states(source, tokens):
    stream = CalibrationStream(source.first_inputs(tokens), Ranks(), CPU)
    stream.enter(source.block(0))
    assert stream.dense == stream.targets == []
