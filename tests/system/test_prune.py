"""`compress prune`: what it says, what it writes, what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from harness import TEXT, CommandLine, Fate, Fork, Result, contents, dies_at_call, dies_at_rename, on_ranks
from safetensors.torch import load_file

REPORTS = ("report.json", "report.html", "README.md")  # name the place and the time
SMALL = ("--samples", 4, "--seq-len", 64, "--no-eval")
TRIED = ("--set", "passes.0.search.tokens=256")  # of width
SEARCHED = (
    *(
        "--set",
        "passes.0.search.tokens=512",
        "--set",
        "passes.0.search.table_tokens=128",
        "--set",
        "passes.0.search.rounds=1",
    ),
    *("--set", "passes.0.search.evolve={generations: 2, offspring: 4, stages: [[1, 128]]}"),
)
WAYS = {"width": TRIED, "depth": SEARCHED, "sublayers": SEARCHED}


@pytest.fixture
def compress(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Result]:
    """The command line, calibrating on a text that is quick to read."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    line = CommandLine(capsys)
    return lambda verb, *rest: line(verb, *rest, *(("--calibration", text) if verb == "prune" else ()))


@pytest.mark.parametrize("by", WAYS)
def test_the_share_that_is_asked_for_goes_and_no_less(
    by: str, tiny: Path, out: Path, compress: Callable[..., Result]
) -> None:
    result = compress("prune", tiny, "--ratio", 0.1, "--by", by, *SMALL, *WAYS[by], "--out", out)
    assert result.code == 0, result.err
    report = json.loads((out / "report.json").read_text())
    before, after = report["pruning"][0]["parameters"]
    assert after <= 0.9 * before
    assert f"{after:,} of {before:,}" in result.out
    assert report["size_bytes"] < report["source_size_bytes"]
    loads = "transformers" in next(line for line in result.out.splitlines() if "loads with" in line)
    assert loads == (by != "sublayers")


@pytest.mark.parametrize(("layout", "loader"), [("per-layer", "compressor"), ("block-configs", "transformers")])
def test_blocks_with_widths_of_their_own_are_shown_by_their_range(
    layout: str, loader: str, tiny: Path, out: Path, compress: Callable[..., Result]
) -> None:
    arguments = ("prune", tiny, "--ratio", 0.1, "--layout", layout, *SMALL, *SEARCHED, "--out", out)
    result = compress(*arguments)
    assert result.code == 0, result.err
    assert "channels stay" in result.out
    assert loader in next(line for line in result.out.splitlines() if "loads with" in line)
    assert ("import compressor" in (out / "README.md").read_text()) == (layout == "per-layer")


def test_a_pruned_model_is_quantized_in_the_same_run_and_the_size_is_known_before(
    tiny: Path, out: Path, compress: Callable[..., Result]
) -> None:
    arguments = ("prune", tiny, "--ratio", 0.25, "--of", "mlp", "--bits", 8, *SMALL, "--out", out)
    forecast = compress(*arguments, "--dry-run", "--json").json
    report = compress(*arguments, "--json").json
    assert forecast["exact"]
    assert report["size_bytes"] == forecast["size_bytes"]
    assert report["bits_per_weight"] == pytest.approx(forecast["bits_per_weight"])


@pytest.mark.parametrize("by", WAYS)
def test_two_ranks_prune_the_same(by: str, tiny: Path, tmp_path: Path, compress: Callable[..., Result]) -> None:
    text = tmp_path / "text.txt"
    ways = {**WAYS, "width": (*TRIED, "--no-heads")}
    data = ("--samples", 32, "--seq-len", 256, "--no-eval", "--no-verify")
    arguments = ("prune", tiny, "--ratio", 0.1, "--by", by, *data, *ways[by])
    assert compress(*arguments, "--out", tmp_path / "one").code == 0
    results = on_ranks(tmp_path / "log", *arguments, "--calibration", text, "--out", tmp_path / "two")
    assert [result.code for result in results] == [0, 0], results[0].err
    one, two = (json.loads((tmp_path / name / "report.json").read_text())["pruning"][0] for name in ("one", "two"))
    assert (one.get("gone"), one.get("keep")) == (two.get("gone"), two.get("keep"))


RANKED: dict[str, list[dict[str, object]]] = {
    "a step that one rank has no sample of": [{"pass": "prune_taylor", "ratio": 0.1, "steps": 2, "batch": 1}],
    "fewer samples to compare on than ranks": [{"pass": "prune_width", "ratio": 0.1, "search": {"tokens": 64}}],
    "what is trained": [
        {"pass": "prune_depth", "ratio": 0.1, "by": "even"},
        {"pass": "distil_blocks", "steps": 2, "batch": 2},
        {"pass": "recover", "steps": 2, "batch": 1},
    ],
}


@pytest.mark.parametrize("passes", RANKED.values(), ids=RANKED)
def test_three_ranks_leave_what_one_does(
    passes: list[dict[str, object]], tiny: Path, tmp_path: Path, compress: Callable[..., Result]
) -> None:
    text = tmp_path / "text.txt"
    recipe = tmp_path / "recipe.yaml"
    data = {"source": str(text), "samples": 65, "seq_len": 256}
    recipe.write_text(yaml.safe_dump({"passes": passes, "calibration": data, "evaluation": None}))
    arguments = ("run", recipe, tiny, "--no-verify", "--dtype", "float32")
    assert compress(*arguments, "--out", tmp_path / "one").code == 0
    results = on_ranks(tmp_path / "log", *arguments, "--out", tmp_path / "three", fates=(None, None, None))
    assert [result.code for result in results] == [0, 0, 0], results[0].err
    one, three = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "three"))
    assert one.keys() == three.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(three[name], tensor, rtol=0, atol=2e-4)


DEATHS: dict[str, tuple[str, Fate]] = {
    "while widths are made": ("width", (dies_at_rename, ("model.layers.2.mlp.safetensors", True))),
    "before shapes are compared": ("width", (dies_at_call, ("compressor.passes.prune.searching", "Fitness"))),
    "while a search goes on": ("sublayers", (dies_at_call, ("compressor.pipeline.search.find", "evolve"))),
    "while the model is written": ("depth", (dies_at_rename, ("block-00001.safetensors", True))),
}


@pytest.mark.parametrize(("by", "fate"), DEATHS.values(), ids=DEATHS)
def test_a_run_that_is_killed_goes_on_to_the_same(
    by: str, fate: Fate, tiny: Path, tmp_path: Path, compress: Callable[..., Result]
) -> None:
    arguments = ("prune", tiny, "--ratio", 0.1, "--by", by, *SMALL, *WAYS[by], "--no-verify")
    assert compress(*arguments, "--out", tmp_path / "whole").code == 0
    killed = (*arguments, "--calibration", tmp_path / "text.txt", "--out", tmp_path / "out")
    assert Fork(tmp_path / "log", *killed, fate=fate).result().code == -9
    assert not (tmp_path / "out").exists()
    result = compress(*arguments, "--out", tmp_path / "out", "--resume")
    assert result.code == 0, result.err
    assert contents(tmp_path / "out", REPORTS) == contents(tmp_path / "whole", REPORTS)
    assert not (tmp_path / "out.pruning").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--ratio", 1), "ratio: 1.0 is not from 0 up to, without, 1"),
        (("--ratio", -0.1), "ratio: -0.1 is not from 0"),
        (("--ratio", 0.95), "cannot be taken from width alone, the most is 0."),
        (("--ratio", 0.95, "--by", "depth"), "more than blocks can"),
        (("--ratio", 0.95, "--by", "sublayers"), "more than sublayers can"),
        (("--by", "length"), "--by length: width, hidden, depth or sublayers"),
        (("--by", "depth", "--of", "mlp"), "--of mlp are for --by width"),
        (("--by", "sublayers", "--multiple", 64), "--multiple is for --by width and --by hidden"),
        (("--by", "hidden", "--no-heads"), "are for --by width"),
        (("--score", "taylor", "--layout", "per-layer"), "leave out one"),
        (("--score", "taylr"), "score: Input should be 'obs'"),
        (("--of", "heads"), "of: Input should be 'model'"),
        (("--multiple", 0), "multiple: 0 is not a positive number"),
        (("--multiple", 0, "--bits", 4), "multiple: 0 is not a positive number"),
        (("--multiple", 4096), "in steps of 4096 channels; give a smaller ratio or multiple"),
        (("--bits", "nan"), "--bits nan: no number of bits"),
        (("--score", "cfsp"), "set heads: false"),
    ],
)
def test_what_makes_no_sense_is_refused(
    flags: tuple[object, ...], said: str, tiny: Path, out: Path, compress: Callable[..., Result]
) -> None:
    result = compress("prune", tiny, *flags, *SMALL, "--out", out)
    assert result.code == 2
    assert said in result.err
    assert not out.exists()


def test_a_quantized_model_is_not_pruned(tiny: Path, tmp_path: Path, out: Path, compress: Callable[..., Result]) -> None:
    packed = tmp_path / "packed"
    assert compress("quantize", tiny, "--bits", 8, "--no-calibration", "--no-eval", "--out", packed).code == 0
    assert "already quantized" in compress("prune", packed, *SMALL, "--out", out).error
