"""Limits break exactly when a figure is worse."""

from dataclasses import replace
from typing import Any

import pytest

from compressor.errors import RecipeError
from compressor.evaluation.limits import Limits, share
from compressor.evaluation.quality import Figures, Quality
from compressor.evaluation.text import Protocol, Text

GOOD = Figures(
    tokens=100, nll=2.0, perplexity=10.2, bits_per_byte=1.0, reference_nll=1.98, reference_perplexity=10.0,
    reference_bits_per_byte=1.0, delta_nll=0.02, kl=0.04, kl_median=0.01, kl_p99=0.5, top1_agreement=0.95, flips=0.01,
)  # fmt: skip


def quality(*figures: Figures) -> Quality:
    """Over the mean of some texts, here simply the first."""
    texts = {f"text {n}": (f, Text(f"text {n}", "all", (), 1, "")) for n, f in enumerate(figures)}
    return Quality(figures[0], texts, {}, Protocol(8, 8, False), "float32")


@pytest.mark.parametrize(
    ("limits", "worse", "named"),
    [
        ({"max_kl": 0.04}, {"kl": 0.041}, "--max-kl 0.04"),
        ({"max_kl_p99": 0.5}, {"kl_p99": 0.51}, "--max-kl-p99 0.5"),
        ({"max_ppl_increase": 0.021}, {"perplexity": 10.22}, "--max-ppl-increase 2.10%"),
        ({"min_top1": 0.95}, {"top1_agreement": 0.949}, "--min-top1 95.00%"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_limit_holds_up_to_its_value_and_breaks_beyond(limits: dict[str, Any], worse: dict[str, Any], named: str) -> None:
    assert Limits(**limits).broken(quality(GOOD)) == []
    (sentence,) = Limits(**limits).broken(quality(replace(GOOD, **worse)))
    assert named in sentence


def test_a_figure_that_is_not_a_number_breaks_its_limit() -> None:
    assert Limits(max_kl=1.0).broken(quality(replace(GOOD, kl=float("nan")))) != []


def test_of_several_texts_each_must_keep_the_limit() -> None:
    (sentence,) = Limits(max_kl=0.05).broken(quality(GOOD, replace(GOOD, kl=0.2)))
    assert "text 1" in sentence


@pytest.mark.parametrize(("text", "value"), [("2%", 0.02), ("0.02", 0.02), ("150%", 1.5), (None, None)])
def test_a_share_may_be_written_as_percentage(text: str | None, value: float | None) -> None:
    assert share(text, "--x") == value


@pytest.mark.parametrize("text", ["two", "%", ""])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="--max-ppl-increase"):
        share(text, "--max-ppl-increase")
