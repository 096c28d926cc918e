"""Levels and the divergence of whole models, against what transformers computes with the same weights put in."""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from compressor.errors import OutputError, RecipeError
from compressor.model.source import ModelSource
from compressor.pipeline.blocks import open_stream
from compressor.pipeline.calibration.data import Samples
from compressor.pipeline.calibration.hidden import keeping
from compressor.pipeline.job import Job
from compressor.pipeline.ranks import Ranks
from compressor.pipeline.search.fitness import Fitness, Teacher, opened
from compressor.pipeline.search.levels import LevelDB
from compressor.pipeline.search.measure import measure
from compressor.recipe.schema import make_recipe

SAMPLES, SEQ_LEN = 6, 24
OPTIONS = [{"format": "int_group", "bits": bits, "group_size": 32} for bits in (2, 3, 8)]


@dataclass(frozen=True)
class Measured:
    """A tiny model with its levels."""

    path: Path
    levels: LevelDB
    tokens: Tensor

    @property
    def source(self) -> ModelSource:
        return ModelSource(self.path, torch.device("cpu"))


def job(path: Path, *passes: dict[str, object]) -> Job:
    recipe = make_recipe({"passes": list(passes) or [{"pass": "gptq", "options": OPTIONS}]})
    return Job(ModelSource(path, torch.device("cpu")), recipe.passes, {}, Ranks())


def fill(levels: LevelDB, work: Job, tokens: Tensor) -> list[str]:
    """Measure what is missing; returns the blocks that something was measured in."""
    told: list[str] = []
    with levels.open():
        samples = Samples(tokens, "", "")
        stream = functools.partial(open_stream, work, samples, keeping(None), lambda event: None)
        measure(work, stream, levels, lambda event: told.append(event.what))
    return [what for what in told if what]


@pytest.fixture(scope="module")
def measured(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Measured]:
    path = tiny("llama")
    tokens = torch.randint(0, 200, (SAMPLES, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    levels = LevelDB(tmp_path_factory.mktemp("levels"), {"model": "a"})
    fill(levels, job(path), tokens)
    yield Measured(path, levels, tokens)


def put_in(measured: Measured, choice: tuple[int, ...]) -> torch.nn.Module:
    """The model of transformers with the weights of a choice."""
    model = AutoModelForCausalLM.from_pretrained(measured.path, dtype=torch.float32)
    for unit, level in zip(measured.levels.units, choice, strict=True):
        prefix = unit.name[: unit.name.index(".", len("model.layers."))]
        for layer, packed in measured.levels.edits(unit.name, level).items():
            model.get_submodule(f"{prefix}.{layer}").weight.data = packed.dequantize()
    return model


def whole_kl(reference: Tensor, logits: Tensor) -> Tensor:
    p, q = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("resident", [True, False])
@torch.no_grad()
def test_fitness_is_the_divergence_of_the_model_with_these_weights(measured: Measured, resident: bool) -> None:
    source, units = measured.source, measured.levels.units
    dense = AutoModelForCausalLM.from_pretrained(measured.path, dtype=torch.float32)(measured.tokens).logits
    choices = [tuple(seed * (n + 1) % 3 for n in range(len(units))) for seed in (0, 1, 2)] + [(2,) * len(units)]
    some = [1, 4, 5]
    expected = [float(whole_kl(dense, put_in(measured, choice)(measured.tokens).logits)[some].mean()) for choice in choices]
    with opened(source, resident=resident) as model:
        found = Fitness(source, model, measured.levels, measured.tokens, Ranks())(choices, some)
    assert found == pytest.approx(expected, rel=2e-4)


def test_choices_that_share_their_beginnings_are_scored_as_each_by_itself(measured: Measured) -> None:
    source, count = measured.source, len(measured.levels.units)
    base = (1,) * count
    choices = [(*base[:unit], level, *base[unit + 1 :]) for unit in range(count) for level in (0, 2)]
    with opened(source, resident=True) as model:
        fitness = Fitness(source, model, measured.levels, measured.tokens, Ranks(), kept=10**7)
        together = fitness(choices, range(SAMPLES))
        assert together == pytest.approx([fitness([choice], range(SAMPLES))[0] for choice in choices], rel=1e-6)


def test_choices_that_do_not_fit_into_memory_together_take_several_turns(
    measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, count = measured.source, len(measured.levels.units)
    choices = [(level,) * count for level in (2, 0, 1)]
    with opened(source, resident=True) as model:
        fitness = Fitness(source, model, measured.levels, measured.tokens, Ranks())
        expected = fitness(choices, [0, 1])
        monkeypatch.setattr("compressor.pipeline.search.fitness.STATES", 1)
        assert fitness(choices, [0, 1]) == pytest.approx(expected, rel=1e-6)
    assert expected[0] < expected[2] < expected[1]


def test_of_the_kept_probabilities_the_divergence_is_never_more_than_of_all() -> None:
    torch.manual_seed(0)
    reference, logits = 3 * torch.randn(4, 50, 300), 3 * torch.randn(4, 50, 300)
    whole = whole_kl(reference, logits)
    kept = [Teacher.of(reference, count).divergence(logits) for count in (1, 10, 100, 299)]
    for less, more in itertools.pairwise([*kept, whole]):
        assert bool((less <= more + 1e-5).all())
    assert torch.allclose(Teacher.of(reference, 300).divergence(logits), whole, atol=1e-5)
    assert torch.allclose(Teacher.of(reference, 10).divergence(reference), torch.zeros((), dtype=torch.float64), atol=1e-5)


def test_a_teacher_that_is_certain_gives_no_nan() -> None:
    reference = torch.full((1, 1, 5), -1e4)
    reference[..., 2] = 1e4
    assert float(Teacher.of(reference, 2).divergence(torch.zeros(1, 1, 5))) == pytest.approx(torch.tensor(5.0).log().item())


def test_levels_count_what_is_stored_and_more_bits_lose_less(measured: Measured) -> None:
    for unit in measured.levels.units:
        assert [level.option.label for level in unit.levels] == ["int2g32", "int3g32", "int8g32"]
        assert [level.bits for level in unit.levels] == sorted(level.bits for level in unit.levels)
        errors = [level.error for level in unit.levels]
        assert errors == sorted(errors, reverse=True)
        for number, level in enumerate(unit.levels):
            edits = measured.levels.edits(unit.name, number)
            assert level.bits == sum(8 * part.nbytes for new in edits.values() for part in new.parts.values())
            assert level.bits == sum(level.option.stored_bits(new.shape) for new in edits.values())


@torch.no_grad()
def test_a_levels_error_is_that_of_its_block(measured: Measured) -> None:
    model = AutoModelForCausalLM.from_pretrained(measured.path, dtype=torch.float32)
    seen: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, out: seen.append(out))
    model(measured.tokens)
    unit = next(unit for unit in measured.levels.units if unit.name.endswith("layers.1.mlp.down_proj"))
    dense = seen[1]
    seen.clear()
    layer = model.get_submodule(unit.name)
    layer.weight.data = measured.levels.edits(unit.name, 0)["mlp.down_proj"].dequantize()
    model(measured.tokens)
    expected = float((seen[1] - dense).square().sum() / dense.square().sum())
    assert unit.levels[0].error == pytest.approx(expected, rel=1e-3)


def test_measuring_again_measures_nothing(measured: Measured) -> None:
    again = LevelDB(measured.levels.journal.directory, {"model": "a"})
    assert fill(again, job(measured.path), measured.tokens) == []
    assert again.units == measured.levels.units


def test_a_database_that_was_broken_off_is_filled_up_to_the_same(measured: Measured, tmp_path: Path) -> None:
    part = LevelDB(tmp_path / "levels", {"model": "a"})
    fill(part, job(measured.path), measured.tokens)
    lines = (tmp_path / "levels" / "journal.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "levels" / "journal.jsonl").write_text("".join(lines[:4]) + lines[4][:30])  # killed while it wrote a line
    again = LevelDB(tmp_path / "levels", {"model": "a"})
    assert fill(again, job(measured.path), measured.tokens)
    assert again.units == measured.levels.units


def test_levels_of_another_model_are_not_used(measured: Measured) -> None:
    with pytest.raises(OutputError, match=r"model changed .* name another directory with --levels"):
        fill(LevelDB(measured.levels.journal.directory, {"model": "b"}), job(measured.path), measured.tokens)


def test_two_cannot_write_the_same_levels(measured: Measured) -> None:
    with measured.levels.open(), pytest.raises(OutputError, match="another run is writing here; wait for it or name another"):
        fill(LevelDB(measured.levels.journal.directory, {"model": "a"}), job(measured.path), measured.tokens)


@pytest.mark.parametrize(
    "step",
    [
        {"pass": "adadim", "options": OPTIONS},
        {"pass": "gptq", "options": OPTIONS, "asymmetric_calibration": 0.5},
        {"pass": "vptq", "share": "block", "options": [{"format": "vq", "vector": 4, "bits": 4, "norm": "layer"}]},
    ],
)
def test_passes_that_cannot_be_tried_layer_by_layer_are_refused(
    measured: Measured, tmp_path: Path, step: dict[str, object]
) -> None:
    with pytest.raises(RecipeError, match="cannot be measured by itself"):
        fill(LevelDB(tmp_path / "levels", {}), job(measured.path, step), measured.tokens)
