"""What the plots show."""

import json
import math
import random

import pytest
from reports import KINDS, quality, report, rows

from compressor.report.html.numbers import duration, number, percent, size
from compressor.report.html.placing import place
from compressor.report.html.plots import layer_map, pareto_front, plot_data


def front(*found: tuple[int, float]) -> set[str]:
    reports = [report(f"m{n}", size_bytes=s, quality=quality(kl=kl)) for n, (s, kl) in enumerate(found)]
    points = plot_data(reports)["quality_size"]["points"]
    return {point["label"] for point in points if point["front"] and not point["original"]}


class TestFront:
    def test_it_is_what_nothing_beats(self) -> None:
        """Against the definition, on random points with many ties."""
        draw = random.Random(1)
        for _ in range(200):
            points = [(draw.randrange(4), draw.randrange(4)) for _ in range(draw.randrange(1, 9))]
            best = {p for p in points if all(p == q or p[0] < q[0] or p[1] < q[1] for q in points)}
            assert {points[i] for i in pareto_front(points)} == best
            assert pareto_front(points) == {i for i, p in enumerate(points) if p in best}

    def test_of_models(self) -> None:
        assert front((5_000_000, 0.001), (4_000_000, 0.1), (4_500_000, 0.2), (2_000_000, 0.9)) == {"m0", "m1", "m3"}

    def test_the_original_beats_what_is_larger_and_worse(self) -> None:
        assert front((9_000_000, 0.001), (4_000_000, 0.1)) == {"m1"}

    def test_another_text_takes_no_part(self) -> None:
        reports = [report("a"), report("b"), report("c", size_bytes=1, quality=quality(kl=1e-9, sha256="b" * 64))]
        points = {p["label"]: p for p in plot_data(reports)["quality_size"]["points"]}
        assert [points[name]["comparable"] for name in "abc"] == [True, True, False]
        assert [points[name]["front"] for name in "abc"] == [True, True, False]

    def test_without_kl_it_is_about_perplexity(self) -> None:
        reports = [report("a", quality=quality(20.0, None)), report("b", size_bytes=1, quality=quality(21.0, None))]
        shown = plot_data([*reports, report("c", size_bytes=2, quality=quality(22.0, None))])["quality_size"]
        assert shown["loss"] == "perplexity"
        assert [p["label"] for p in shown["points"] if p["front"]] == ["a", "b"]


class TestPlotData:
    def test_it_is_plain_json(self) -> None:
        bad = quality(math.inf, math.nan)
        broken = [{**row, "error": math.nan} for row in rows()]
        data = plot_data([report(quality=bad, rows=broken), report("none", quality=None)])
        assert json.loads(json.dumps(data, allow_nan=False)) == data

    def test_the_original_is_a_point(self) -> None:
        (original,) = [p for p in plot_data([report()])["quality_size"]["points"] if p["original"]]
        assert (original["size_bytes"], original["perplexity"], original["kl"]) == (8_397_312, 16.5, 0.0)

    def test_names_are_unique(self) -> None:
        reports = [report("demo-int4"), report("demo-int4"), report("demo-int3", path="elsewhere")]
        names = [one["label"] for one in plot_data(reports)["layers"]]
        assert len(set(names)) == 3
        assert names[2] == "int3"

    def test_one_model_keeps_its_name(self) -> None:
        assert plot_data([report("demo-int4")])["layers"][0]["label"] == "demo-int4"


class TestLayers:
    def test_every_layer_has_its_cell(self) -> None:
        found = layer_map(rows(3), "x")
        assert found["blocks"] == [0, 1, 2]
        assert found["kinds"] == [kind.rsplit(".", 1)[1] for kind in KINDS]
        assert found["layer"][2][1] == "model.layers.1.mlp.up_proj"
        assert found["error"][2][1] == pytest.approx(1e-4 * 2 * 3)

    def test_kinds_that_end_alike_keep_their_names(self) -> None:
        both = [{**rows(1)[0], "layer": f"transformer.h.0.{kind}.c_proj"} for kind in ("attn", "mlp")]
        assert layer_map(both, "x")["kinds"] == ["attn.c_proj", "mlp.c_proj"]

    def test_experts_share_a_cell(self) -> None:
        one = rows(1)[0]
        experts = [
            {**one, "layer": f"model.layers.0.mlp.experts.{n}.up_proj", "bits_per_weight": bits, "error": error}
            for n, (bits, error) in enumerate(((2.0, 0.5), (4.0, 0.1), (4.0, 0.2)))
        ]
        found = layer_map(experts, "x")
        assert found["kinds"] == ["up_proj"]
        assert found["bits_per_weight"] == [[pytest.approx(10 / 3)]]
        assert found["error"] == [[0.5]]

    def test_a_layer_that_was_left_out_is_a_gap(self) -> None:
        found = layer_map([row for row in rows(3) if row["layer"] != "model.layers.1.mlp.up_proj"], "x")
        assert found["error"][2][1] is None

    def test_what_belongs_to_no_block_stands_outside(self) -> None:
        head = {**rows(1)[0], "layer": "lm_head"}
        found = layer_map([*rows(1), head], "x")
        assert found["outside"] == [head]
        assert "lm_head" not in found["kinds"]


class TestNames:
    def test_they_do_not_cover_each_other(self) -> None:
        where = place([(0.5, 0.5), (0.5, 0.5), (0.52, 0.51)], ["one model", "another model", "a third model"])
        assert len({spot for spot in where if spot}) == len([spot for spot in where if spot])

    def test_they_stay_in_the_plot(self) -> None:
        assert place([(0.98, 0.5), (0.02, 0.5)], ["a name", "a name"]) == ["top left", "top right"]

    def test_one_without_room_is_left_out(self) -> None:
        assert place([(0.5, 0.5)], ["x" * 100]) == [None]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (number(16.892865), "16.89"),
        (number(0.0168457, 3), "0.0168"),
        (number(9.9996), "10.00"),
        (number(7.44e-5, 3), "7.44 × 10⁻⁵"),
        (number(-0.0159, 3, signed=True), "−0.0159"),
        (number(0.413, 3, signed=True), "+0.413"),
        (number(18_695.3, 3), "18,695"),
        (number(0.0), "0"),
        (number(math.inf), "∞"),
        (number(math.nan), "–"),
        (number(None), "–"),
        (percent(0.0109, 2, signed=True), "+1.09%"),
        (percent(-0.0003, 2, signed=True), "−0.03%"),
        (size(3_734_288), "3.73 MB"),
        (duration(0.0312), "31.2 ms"),
        (duration(61.2), "1 min 1 s"),
        (duration(7_260), "2 h 1 min"),
    ],
)
def test_numbers(text: str, expected: str) -> None:
    assert text == expected
