"""The model card: README.md of a compressed model."""

import json

from compressor.report import Report

OWN_LOADER = """```python
import compressor

model = compressor.load("{out}")
```

Load it with the `compressor` package. Plain transformers does not know this layout and would start from random weights.
"""

STOCK_LOADER = """```python
from transformers import AutoModelForCausalLM  # and `pip install compressed-tensors`

model = AutoModelForCausalLM.from_pretrained("{out}")
```
"""


def model_card(report: Report) -> str:
    """Markdown with what a user of the model has to know: how to load it, what it cost, how it was made."""
    loader = (STOCK_LOADER if report.layout == "compressed-tensors" else OWN_LOADER).format(out=report.out)
    lines = [
        "---", "library_name: transformers", "tags:", "- compressed", "---", "",
        f"# {report.out}", "",
        f"{report.model}, compressed with compressor {report.version}: "
        f"{report.size_bytes / 1e6:.1f} MB of weights instead of {report.source_size_bytes / 1e6:.1f} MB.", "",
        loader,
        "| | |", "|---|---|",
        f"| bits per weight, compressed layers, scales included | {report.bits_per_weight:.3f} |",
        f"| bits per weight, whole model | {report.model_bits_per_weight:.3f} |",
    ]  # fmt: skip
    if report.quality:
        q = report.quality
        lines += [
            f"| perplexity, original | {q['reference_perplexity']:.4g} |",
            f"| perplexity, this model | {q['perplexity']:.4g} |",
            f"| KL divergence from the original, nats per token | {q['kl']:.4g} |",
            f"| top-1 agreement with the original | {q['top1_agreement']:.2%} |",
            "",
            f"Measured on {q['tokens']:,} predictions of held-out text (`{q['source']}`), samples of {q['seq_len']} tokens.",
        ]
    else:
        lines += ["", "The quality of this model was not measured."]
    if report.calibration:
        c = report.calibration
        lines += [
            "",
            f"Calibrated on {c['samples']} samples of {c['seq_len']} tokens (`{c['source']}`, seed {c['seed']}).",
        ]
    if report.warnings:
        lines += ["", "Warnings of the run:", "", *(f"- {warning}" for warning in report.warnings)]
    lines += [
        "",
        f"Recipe: `recipe.yaml`. Every layer's error: `report.json`. Made with {json.dumps(dict(report.versions))}.",
    ]
    return "\n".join(lines) + "\n"
