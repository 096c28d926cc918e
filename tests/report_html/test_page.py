"""The page, as text."""

import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from plotly.offline import get_plotlyjs
from reports import SHA, full, quality, report, rows

from compressor.report.html.page import render

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7 * 7 }}`$&amp;"


class Page(HTMLParser):
    """Elements and visible text of a page without Plotly's own code."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.source = html.replace(get_plotlyjs(), "")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.hidden = ""
        self.feed(self.source)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.hidden = tag if tag in ("script", "style", "title") else self.hidden
        self.text += " " if tag in ("td", "th", "p", "div", "dd", "pre") else ""

    def handle_endtag(self, tag: str) -> None:
        self.hidden = "" if tag == self.hidden else self.hidden

    def handle_data(self, data: str) -> None:
        self.text += "" if self.hidden else data

    @property
    def figures(self) -> dict[str, Any]:
        found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', self.source, re.DOTALL)
        assert found
        return dict(json.loads(found[1]))

    @property
    def places(self) -> set[str | None]:
        return {attributes["id"] for _, attributes in self.elements if attributes.get("class") == "plot"}


class TestContent:
    def test_the_headline(self) -> None:
        text = Page(render([full()])).text
        for figure in (
            "3.73 MB",
            "44.5% of the original’s 8.4 MB",
            "4.12",
            "7.10",
            "17.25",
            "+4.55%",
            "0.0123",
            "90.0%",
            "1.50 ×",
        ):
            assert figure in text

    def test_everything_that_was_measured(self) -> None:
        text = Page(render([full()])).text
        assert "samples of 128, stride 64, begun with BOS, float32" in text
        assert "arc_easy acc 500 0.6125 ± 0.0149 0.5625 ± 0.0151 31 / 17 9.6% 0.059" in text
        assert "transformers failed logits differ by 0.3" in text
        assert "vllm skipped it is not installed" in text
        assert "chats.jsonl 16 128 2,048 5 4444" in text
        assert "layer 2: damp was raised" in text
        assert "compress run recipe.yaml demo --out /models/demo-int4" in text
        assert "pass: gptq" in text
        assert "2.6.0" in text
        assert "Peak memory of demo-int4: 400 MB" in text

    def test_where_a_sample_departs_from_the_original_is_marked(self) -> None:
        assert "<pre>\na, <mark>c): pass</mark></pre>" in render([full()])

    def test_what_is_missing_is_said(self) -> None:
        text = Page(render([report(quality=None, calibration=None, command="", rows=[], recipe=None)])).text
        for words in (
            "Quality was not measured; compress eval DIR --reference MODEL --save",
            "Not measured; compress bench DIR",
            "Not measured; compress eval DIR --reference MODEL --tasks NAME --save",
            "Not verified; compress verify DIR",
            "None were generated",
            "No calibration data",
            "Warnings: none",
            "no layer was compressed",
            "does not tell the command",
            "holds no recipe",
        ):
            assert words in text

    def test_only_the_needed_keys_suffice(self) -> None:
        from compressor.report.html.schema import NEEDED

        text = Page(render([{key: value for key, value in report().items() if key in NEEDED}])).text
        assert "Quality was not measured" in text

    def test_quality_without_the_original(self) -> None:
        page = Page(render([report(quality=quality(kl=None))]))
        assert "the original’s was not measured" in page.text
        assert {"quality-perplexity", "position-nll"} <= page.places
        assert not {"quality-kl", "position-kl"} & page.places

    def test_only_paired_backticks_are_code(self) -> None:
        page = render([report(warnings=["`<a>` and a ` alone"])])
        assert "<code>&lt;a&gt;</code> and a ` alone</li>" in page

    def test_a_part_that_some_models_lack(self) -> None:
        text = Page(render([full("demo-a"), report("demo-b")])).text
        assert "b: not measured; compress bench DIR" in text

    def test_a_layer_outside_the_blocks_is_named(self) -> None:
        head = {"layer": "lm_head", "option": "int8", "bits_per_weight": 8.1, "error": 1e-5}
        assert "Outside the blocks: lm_head (int8, 8.100 bits per weight" in Page(render([report(rows=[*rows(), head])])).text

    def test_a_mixed_plan_shows_in_the_map_of_bits(self) -> None:
        mixed = [
            *rows(2),
            *({**row, "layer": row["layer"].replace("layers.1", "layers.2")} for row in rows(2, "int8", 8.1)[4:]),
        ]
        page = Page(render([report(rows=mixed)]))
        (drawn,) = page.figures["bits-0"]["data"]
        assert {tuple(line) for line in drawn["z"]} == {(4.125, 4.125, 8.1)}
        assert "int8" in page.text


class TestSeveral:
    def test_each_is_named_and_the_front_marked(self) -> None:
        worse = report("demo-b", size_bytes=4_000_000, quality=quality(18.0, 0.5))
        text = Page(render([report("demo-a"), worse, report("demo-c", size_bytes=1_000_000, quality=quality(30, 1.0))])).text
        assert "3 compressed models of demo" in text
        assert "a ● 3.73 MB" in text
        assert "b 4 MB" in text
        assert "c ● 1 MB" in text

    def test_each_plot_has_its_place(self) -> None:
        page = Page(render([full("demo-a"), full("demo-b")]))
        assert page.places == set(page.figures)
        assert len(page.figures) == 2 + 2 * 2 + 2

    def test_other_text_is_noted_and_marked(self) -> None:
        assert "†" not in Page(render([report("demo-a"), report("demo-b")])).text.replace("† marks models", "")
        other = report("demo-c", quality=quality(sha256="b" * 64))
        text = Page(render([report("demo-a"), report("demo-b"), other])).text
        assert "† c: judged on other text than the rest" in text
        assert "c † 3.73 MB" in text

    def test_other_originals_are_noted(self) -> None:
        other = report("demo-b", fingerprint={"model": "9" * 64})
        assert "different originals" in Page(render([report("demo-a"), other])).text
        assert "different originals" not in Page(render([report("demo-a"), report("demo-b")])).text

    def test_samples_of_one_prompt_stand_together(self) -> None:
        assert Page(render([full("demo-a"), full("demo-b")])).text.count("def f(") == 1

    def test_a_title_can_be_given(self) -> None:
        assert "<title>Ours &lt;b&gt;</title>" in render([report()], "Ours <b>")


def poisoned(value: Any) -> Any:
    """The same data with hostile text for every text that is not looked up."""
    if isinstance(value, str):
        return f"{value}{HOSTILE}"
    if isinstance(value, list):
        return [poisoned(item) for item in value]
    if isinstance(value, dict):
        kept = ("layer", "phase", "sha256")
        return {key: item if key in kept else poisoned(item) for key, item in value.items()}
    return value


class TestHostileText:
    @pytest.mark.parametrize("count", [1, 2])
    def test_it_adds_no_element(self, count: int) -> None:
        harmless, hostile = Page(render([full()] * count)), Page(render([poisoned(full())] * count))
        assert {tag for tag, _ in hostile.elements} == {tag for tag, _ in harmless.elements}
        assert [tag for tag, _ in hostile.elements].count("script") == 3
        assert not any(name.startswith("on") for _, attributes in hostile.elements for name in attributes)
        assert "{{ 7 * 7 }}" in hostile.text
        assert hostile.figures.keys() == harmless.figures.keys()

    def test_names_in_plots_are_text(self) -> None:
        figures = Page(render([poisoned(full())])).figures
        assert "<script" not in json.dumps(figures)
        assert "&lt;/script&gt;" in json.dumps(figures)

    def test_layers_too(self) -> None:
        named = [{**row, "layer": f"{row['layer']}{HOSTILE.replace('.', '')}"} for row in rows()]
        assert [tag for tag, _ in Page(render([report(rows=named)])).elements].count("img") == 0


class TestSelfContained:
    def test_it_loads_nothing(self) -> None:
        page = Page(render([full("demo-a"), full("demo-b")]))
        assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttpRequest|import\(", page.source)
        assert not any({"src", "href", "srcset", "data", "action"} & attributes.keys() for _, attributes in page.elements)
        assert not {"link", "iframe", "img", "object", "embed", "base"} & {tag for tag, _ in page.elements}

    def test_the_browser_is_told_to_load_nothing(self) -> None:
        (policy,) = [a["content"] for _, a in Page(render([report()])).elements if "http-equiv" in a]
        assert policy is not None
        assert policy.startswith("default-src 'none';")

    def test_a_model_of_32_blocks_takes_little_beside_plotly(self) -> None:
        kinds = (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
        many = [{**rows(1)[0], "layer": f"model.layers.{block}.{kind}"} for block in range(32) for kind in kinds]
        assert len(Page(render([full(rows=many)])).source.encode()) < 300_000

    def test_the_same_reports_give_the_same_page(self) -> None:
        assert render([full()]) == render([full()])
        assert SHA[:8] in render([full()])
