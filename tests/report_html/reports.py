"""Reports as compress writes them, made up."""

from typing import Any

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
SHA = "a" * 64


def figures(perplexity: float, kl: float | None) -> dict[str, Any]:
    compared = kl is not None
    return {
        "tokens": 4064,
        "nll": 2.8,
        "perplexity": perplexity,
        "bits_per_byte": 2.18,
        "reference_nll": 2.75 if compared else None,
        "reference_perplexity": 16.5 if compared else None,
        "reference_bits_per_byte": 2.1 if compared else None,
        "delta_nll": 0.05 if compared else None,
        "kl": kl,
        "kl_median": kl,
        "kl_p99": 5 * kl if kl is not None else None,
        "top1_agreement": 0.9 if compared else None,
        "flips": 0.02 if compared else None,
    }


def quality(perplexity: float = 17.25, kl: float | None = 0.0123, sha256: str = SHA) -> dict[str, Any]:
    numbers = figures(perplexity, kl)
    return {
        **numbers,
        "source": "builtin",
        "seq_len": 128,
        "protocol": {"seq_len": 128, "stride": 64, "bos": True, "documents": False, "dtype": "float32"},
        "texts": [{"name": "builtin", "split": "held-out", "sha256": sha256, **numbers}],
        "positions": [{"first": 2**n, "last": 2 ** (n + 1) - 1, **numbers} for n in range(6)],
    }


def rows(blocks: int = 3, option: str = "int4g128", bits: float = 4.125) -> list[dict[str, Any]]:
    return [
        {
            "layer": f"model.layers.{block}.{kind}",
            "option": option,
            "bits_per_weight": bits,
            "error": 1e-4 * (1 + block) * (1 + n),
        }
        for block in range(blocks)
        for n, kind in enumerate(KINDS)
    ]


def report(out: str = "demo-int4", **changes: Any) -> dict[str, Any]:
    """The report of a run that measured quality and nothing else."""
    made = {
        "model": "demo",
        "path": f"/models/{out}",
        "out": out,
        "version": "0.1.0",
        "fingerprint": {
            "recipe": "1" * 64,
            "model": "2" * 64,
            "data": "3" * 64,
            "computation": "torch 2.6, cpu, torch.bfloat16",
        },
        "recipe": {"passes": [{"pass": "gptq", "damp": 0.01}]},
        "calibration": {"source": "chats.jsonl", "samples": 16, "seq_len": 128, "seed": 5, "sha256": "4" * 64},
        "versions": {"python": "3.11.7", "torch": "2.6.0"},
        "command": f"compress run recipe.yaml demo --out /models/{out}",
        "rows": rows(),
        "warnings": [],
        "bits_per_weight": 4.125,
        "model_bits_per_weight": 7.1,
        "size_bytes": 3_734_288,
        "source_size_bytes": 8_397_312,
        "layout": "compressed-tensors",
        "seconds": 61.2,
        "peak_memory_bytes": 564_707_328,
        "peak_device_memory_bytes": 0,
        "quality": quality(),
        "tasks": [],
        "samples": [],
        "speed": None,
        "verification": [],
    }
    return {**made, **changes}


def full(out: str = "demo-int4", **changes: Any) -> dict[str, Any]:
    """The report of a run after everything was measured."""
    speeds = (
        ("demo", "prefill", 4000.0, 0.03),
        (out, "prefill", 4100.0, 0.03),
        ("demo", "decode", 300.0, None),
        (out, "decode", 450.0, None),
    )
    return (
        report(
            out,
            warnings=["layer 2: `damp` was raised"],
            tasks=[
                {
                    "task": "arc_easy",
                    "metric": "acc",
                    "samples": 500,
                    "value": 0.5625,
                    "stderr": 0.0151,
                    "reference_value": 0.6125,
                    "reference_stderr": 0.0149,
                    "lost": 31,
                    "won": 17,
                    "flips": 0.096,
                    "p_value": 0.0591,
                }
            ],
            samples=[{"prompt": "def f(", "text": "x): ...", "reference": "a, b): pass", "model": "a, c): pass"}],
            speed={
                "device": "cpu",
                "threads": 2,
                "dtype": "float32",
                "bandwidth_gb_s": 11.3,
                "rows": [
                    {
                        "model": m,
                        "phase": p,
                        "batch": 1,
                        "tokens_per_second": s,
                        "gb_per_second": None,
                        "first_token_seconds": f,
                    }
                    for m, p, s, f in speeds
                ],
                "peak_memory_bytes": {"demo": 600_000_000, out: 400_000_000},
            },
            verification=[
                {"check": "tensors", "outcome": "passed", "detail": "58 tensors as recorded"},
                {"check": "transformers", "outcome": "failed", "detail": "logits differ by 0.3"},
                {"check": "vllm", "outcome": "skipped", "detail": "it is not installed"},
            ],
        )
        | changes
    )
