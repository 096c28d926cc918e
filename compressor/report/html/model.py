"""View of one report for the page: every figure by name, None if it was not measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from compressor.report.html import numbers

_OPTIONAL = (
    "quality",
    "tasks",
    "samples",
    "speed",
    "verification",
    "calibration",
    "warnings",
    "command",
    "recipe",
    "layout",
    "version",
    "versions",
    "fingerprint",
    "seconds",
    "peak_memory_bytes",
    "peak_device_memory_bytes",
)
_FIGURES = (
    "perplexity",
    "reference_perplexity",
    "kl",
    "kl_median",
    "kl_p99",
    "top1_agreement",
    "flips",
    "bits_per_byte",
    "reference_bits_per_byte",
    "delta_nll",
    "tokens",
)

# Commands and settings that measure what a report lacks.
JUDGE = "`compress eval DIR --reference MODEL --save`"
BENCH = "`compress bench DIR --reference MODEL --save`"
TASKS = "`compress eval DIR --reference MODEL --tasks NAME --save`"
VERIFY = "`compress verify DIR`"
GENERATE = "`--set evaluation.generate=2`"


@dataclass(frozen=True)
class Tile:
    """A figure of the headline."""

    name: str
    value: str
    note: str  # prose, with `code` between backticks


@dataclass(frozen=True)
class Model:
    """A compressed model and its report."""

    report: Mapping[str, Any]
    label: str
    comparable: bool  # evaluated on the same text as the others
    front: bool  # on the Pareto front

    @classmethod
    def of(cls, report: Mapping[str, Any], label: str, *, comparable: bool, front: bool) -> "Model":
        """Make a model from a report; keys that the report lacks become None."""
        return cls({**dict.fromkeys(_OPTIONAL), **report}, label, comparable, front)

    @property
    def name(self) -> str:
        """The label, marked if the model's figures are not comparable with the others'."""
        return self.label if self.comparable else f"{self.label} †"

    @cached_property
    def quality(self) -> dict[str, Any]:
        """Figures over all texts."""
        return figures(self.report["quality"] or {})

    @property
    def texts(self) -> list[dict[str, Any]]:
        """Figures by text."""
        return [{**text, **figures(text)} for text in (self.report["quality"] or {}).get("texts") or ()]

    @property
    def protocol(self) -> str | None:
        """Evaluation protocol in words: how text became predictions."""
        known = (self.report["quality"] or {}).get("protocol")
        return protocol(known) if known else None

    @property
    def computation(self) -> str | None:
        """Programs, device and dtype."""
        return (self.report["fingerprint"] or {}).get("computation")

    @property
    def speed_rows(self) -> list[Mapping[str, Any]]:
        """Measured speeds; the original's come first if it was measured too."""
        return list((self.report["speed"] or {}).get("rows") or ())

    @property
    def decoding(self) -> tuple[int, float, float | None] | None:
        """Smallest batch that was decoded, its tokens per second, and those of the original."""
        rows = [row for row in self.speed_rows if row["phase"] == "decode"]
        if not rows:
            return None
        batch = min(row["batch"] for row in rows)
        rates = [float(row["tokens_per_second"]) for row in rows if row["batch"] == batch]
        return batch, rates[-1], rates[0] if len(rates) > 1 else None

    def tiles(self) -> list[Tile]:
        """Return the headline's figures."""
        report, quality = self.report, self.quality
        share = report["size_bytes"] / report["source_size_bytes"] if report["source_size_bytes"] else None
        whole = f"{report['model_bits_per_weight']:.2f} over the whole model"
        return [
            Tile(
                "Size",
                numbers.size(report["size_bytes"]),
                f"{numbers.percent(share)} of the original’s {numbers.size(report['source_size_bytes'])}",
            ),
            Tile("Bits per weight", f"{report['bits_per_weight']:.2f}", f"in the compressed layers; {whole}"),
            self._perplexity(),
            Tile(
                "KL divergence",
                numbers.number(quality["kl"], 3),
                f"nats per token; median {numbers.number(quality['kl_median'], 3)}, "
                f"99th percentile {numbers.number(quality['kl_p99'], 3)}",
            )
            if quality["kl"] is not None
            else Tile("KL divergence", "not measured", f"{JUDGE} measures it"),
            Tile(
                "Top-1 agreement",
                numbers.percent(quality["top1_agreement"]),
                f"on the most likely token; {numbers.percent(quality['flips'])} flipped between right and wrong",
            )
            if quality["top1_agreement"] is not None
            else Tile("Top-1 agreement", "not measured", f"{JUDGE} measures it"),
            self._speed(),
        ]

    def _perplexity(self) -> Tile:
        value, original = self.quality["perplexity"], self.quality["reference_perplexity"]
        if value is None:
            return Tile("Perplexity", "not measured", f"{JUDGE} measures it")
        if not original:
            return Tile("Perplexity", numbers.number(value), "the original’s was not measured")
        change = numbers.percent(value / original - 1, 2, signed=True)
        return Tile("Perplexity", numbers.number(value), f"{change} from the original’s {numbers.number(original)}")

    def _speed(self) -> Tile:
        if self.decoding is None:
            return Tile("Decoding speed", "not measured", f"{BENCH} measures it")
        batch, rate, original = self.decoding
        beside = f"; {rate / original:.2f} × the original’s {numbers.number(original, 3)}" if original else ""
        return Tile("Decoding speed", numbers.number(rate, 3), f"tokens per second at batch {batch}{beside}")


def protocol(known: Mapping[str, Any]) -> str:
    """Describe in words how text became predictions."""
    begin = "begun with BOS" if known["bos"] else "no BOS"
    how = "one document each" if known["documents"] else f"stride {known['stride']}"
    return f"samples of {'up to ' if known['documents'] else ''}{known['seq_len']}, {how}, {begin}, {known['dtype']}"


def figures(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return all figures of quality by name, None for those that are not given."""
    return {key: given.get(key) for key in _FIGURES}


@dataclass(frozen=True)
class Sample:
    """A prompt, and its continuation in the text, by the original and by the models."""

    prompt: str
    text: str | None
    reference: str
    models: list[tuple[str, str, str]]  # label, the beginning that equals the original's continuation, the rest


def samples(models: Sequence[Model]) -> list[Sample]:
    """Collect the generated samples of all models, grouped by prompt."""
    found: dict[tuple[str, str], Sample] = {}
    for model in models:
        for one in model.report["samples"] or ():
            prompt, reference = str(one["prompt"]), str(one["reference"])
            sample = found.setdefault((prompt, reference), Sample(prompt, one.get("text"), reference, []))
            sample.models.append((model.label, *_divided(reference, str(one["model"]))))
    return list(found.values())


def _divided(reference: str, written: str) -> tuple[str, str]:
    """Split a text into the prefix that it shares with the reference, and the rest."""
    length = next((n for n, (a, b) in enumerate(zip(reference, written, strict=False)) if a != b), None)
    length = min(len(reference), len(written)) if length is None else length
    return written[:length], written[length:]
