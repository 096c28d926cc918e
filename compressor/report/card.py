"""The model card: README.md of a compressed model."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

OWN_LOADER = """```python
import compressor

model = compressor.load("{out}")
```

Load it with the `compressor` package, or import that before transformers' own `from_pretrained`. Plain transformers does not
know this layout and would start from random weights.
"""

STOCK_LOADER = """```python
from transformers import AutoModelForCausalLM{packages}

model = AutoModelForCausalLM.from_pretrained("{out}"{trust})
```

"""
CODE = """The code that this trusts is `decilm.py`, beside the weights. `AutoTokenizer.from_pretrained` takes the same.

"""
DEQUANTISED = """Plain transformers dequantises the weights. With `import compressor` before, or by `compressor.load("{out}")`
they stay packed in memory and are multiplied by kernels made for them.
"""

STOCK_PACKAGES = {
    "dense": "",
    "compressed-tensors": "compressed-tensors",
    "gptq": "optimum gptqmodel",
}  # packages that transformers needs, by layout
SOFT_PROMPT = """```python
from peft import PeftModel

model = PeftModel.from_pretrained(model, "{out}/soft_prompt")
```

This puts a prompt of {tokens} learned tokens before every text, which take as many of its positions. KL divergence from the
original on text that it was not learned from, nats per token: {without:.4g} without it, {prompted:.4g} with it{before}.
"""

FIGURES = (  # figures of quality: key, description, format
    ("reference_perplexity", "perplexity, original", ".4g"),
    ("perplexity", "perplexity, this model", ".4g"),
    ("kl", "KL divergence from the original, nats per token", ".4g"),
    ("top1_agreement", "top-1 agreement with the original", ".2%"),
)


def model_card(report: Mapping[str, Any]) -> str:
    """Write the Markdown that a user of the model needs: how to load it, how much quality it lost, how it was made.

    Args:
        report: Content of report.json.
    """
    lines = [
        "---", "library_name: transformers", "tags:", "- compressed", "---", "",
        f"# {report['out']}", "",
        f"{report['model']}, compressed with compressor {report.get('version', '')}: "
        f"{report['size_bytes'] / 1e6:.1f} MB of weights instead of {report['source_size_bytes'] / 1e6:.1f} MB.", "",
        _loader(report),
        *_prompt(report),
        "| | |", "|---|---|",
        f"| bits per weight, compressed layers, scales included | {report['bits_per_weight']:.3f} |",
        f"| bits per weight, whole model | {report['model_bits_per_weight']:.3f} |",
        *_quality(report.get("quality")),
    ]  # fmt: skip
    if report.get("calibration"):
        c = report["calibration"]
        lines += [
            "",
            f"Calibrated on {c['samples']} samples of {c['seq_len']} tokens (`{c['source']}`, seed {c['seed']}).",
        ]
    if report.get("warnings"):
        lines += ["", "Warnings of the run:", "", *(f"- {warning}" for warning in report["warnings"])]
    lines += [
        "",
        f"Recipe: `recipe.yaml`. Every layer's error: `report.json`. Made with {json.dumps(report.get('versions'))}.",
    ]
    return "\n".join(lines) + "\n"


def _loader(report: Mapping[str, Any]) -> str:
    """Return the section on loading the model."""
    layout, out, code = report.get("layout", ""), report["out"], bool(report.get("runs_code"))
    if layout not in STOCK_PACKAGES:
        return OWN_LOADER.format(out=out)
    packages = f"  # and `pip install {STOCK_PACKAGES[layout]}`" if STOCK_PACKAGES[layout] else ""
    loader = STOCK_LOADER.format(out=out, packages=packages, trust=", trust_remote_code=True" if code else "")
    return loader + (CODE if code else "") + (DEQUANTISED.format(out=out) if packages else "")


def _prompt(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield the section on the learned soft prompt, if there is one."""
    for step in report.get("pruning") or ():
        if step["pass"] == "soft_prompt":
            without, prompted = step["kl"]
            before = ", both before weights were rounded" if report.get("rows") else ""
            yield SOFT_PROMPT.format(
                out=report["out"], tokens=step["tokens"], without=without, prompted=prompted, before=before
            )


def _quality(quality: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield table rows for the measured figures, and a sentence on the text they were measured on."""
    if quality is None:
        yield from ("", "The quality of this model was not measured.")
        return
    for key, name, form in FIGURES:
        if quality.get(key) is not None:
            yield f"| {name} | {quality[key]:{form}} |"
    yield ""
    yield (
        f"Measured on {quality['tokens']:,} predictions of text (`{quality['source']}`), "
        f"samples of {quality['seq_len']} tokens."
    )
