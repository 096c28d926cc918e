"""Limits that a model must keep for a check to pass, as CI sets them."""

import math
from dataclasses import dataclass

from compressor.errors import RecipeError
from compressor.evaluation.quality import Quality


@dataclass(frozen=True)
class Limits:
    """The worst figures that are accepted; None is no limit. All need a reference."""

    max_kl: float | None = None  # nats per token, overall and on every text
    max_kl_p99: float | None = None
    max_ppl_increase: float | None = None  # share of the reference's perplexity
    min_top1: float | None = None  # share of predictions

    def __post_init__(self) -> None:
        for name, most in (("max_kl", math.inf), ("max_kl_p99", math.inf), ("max_ppl_increase", math.inf), ("min_top1", 1.0)):
            value = getattr(self, name)
            least = -1.0 if name == "max_ppl_increase" else 0.0
            if value is not None and not (least <= value <= most and math.isfinite(value)):
                top = f" … {most:.0%}" if math.isfinite(most) else ""
                raise RecipeError(f"--{name.replace('_', '-')} {value:g}: no such limit; give a number from {least:g}{top}")

    @property
    def any(self) -> bool:
        """Whether there is a limit."""
        return self != Limits()

    def broken(self, quality: Quality) -> list[str]:
        """A sentence for every limit that a model breaks. On the worst of several texts it must hold, too."""
        found = []
        for name, figures in [("", quality.overall), *((f" on {name}", f) for name, (f, _) in quality.texts.items())]:
            assert figures.kl is not None and figures.kl_p99 is not None and figures.top1_agreement is not None
            assert figures.reference_perplexity is not None
            increase = figures.perplexity / figures.reference_perplexity - 1
            checks = (
                (self.max_kl, figures.kl, 1, "KL {:.4g}{} exceeds --max-kl {:.4g}"),
                (self.max_kl_p99, figures.kl_p99, 1, "99th percentile of KL {:.4g}{} exceeds --max-kl-p99 {:.4g}"),
                (self.max_ppl_increase, increase, 1, "perplexity grew by {:.2%}{}, more than --max-ppl-increase {:.2%}"),
                (self.min_top1, figures.top1_agreement, -1, "top-1 agreement {:.2%}{} is below --min-top1 {:.2%}"),
            )
            for limit, value, sign, sentence in checks:
                if limit is not None and not sign * value <= sign * limit:
                    found.append(sentence.format(value, name, limit))
            if len(quality.texts) == 1:
                break  # the only text is everything
        return found


def share(text: str | None, option: str) -> float | None:
    """A share written as `2%` or `0.02`.

    Raises:
        RecipeError: neither.
    """
    if text is None:
        return None
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError as error:
        raise RecipeError(f"{option} {text}: write a share such as 2% or 0.02") from error
