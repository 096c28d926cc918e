"""How fast a whole model writes with packed weights: one decoding step in a CUDA graph, beside the same model in bf16.

    scripts/gpu/model_speed [--blocks N] [--batch M …] [--bits B …] [--context N] [--out FILE.json]

The shape is that of Llama-3-8B, the weights are random codes: neither makes a difference to speed. transformers' own Llama
with a static cache runs the step; its linear layers are replaced by `PackedLinear`, q/k/v and gate/up fused, and the head,
which stays in bf16, is the same for both. A step is captured into a CUDA graph and replayed; ratios are taken within a round
of alternating replays.

Exit status: 0 measured, 2 no GPU.
"""

import argparse
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from compressor.formats.numerics.codes import IntCodes
from compressor.runtime.fuse import fuse
from compressor.runtime.kernels.layouts.int_groups import IntGroups
from compressor.runtime.packed_linear import PackedLinear, PackedWeight, Stored

GROUP, ROUNDS, REPLAYS = 128, 7, 20
LLAMA_3_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 8192, "tie_word_embeddings": False, "rope_theta": 500000.0,
}  # fmt: skip


def config(blocks: int) -> LlamaConfig:
    """Return the config that transformers builds the model from."""
    return LlamaConfig(num_hidden_layers=blocks, dtype="bfloat16", **LLAMA_3_8B)


def dense_model(blocks: int, device: torch.device) -> LlamaForCausalLM:
    """The model in bf16, random."""
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = LlamaForCausalLM(config(blocks))
        finally:
            torch.set_default_dtype(torch.float32)
    return model.eval().requires_grad_(False)


def random_linear(rows: int, columns: int, bits: int, device: torch.device) -> PackedLinear:
    """A packed layer of random codes that keeps activations of size one."""
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, device=device)
    groups = (rows, columns // GROUP)
    scale = torch.full(groups, 3.5 / (2**bits * columns**0.5), dtype=torch.bfloat16, device=device)
    zero = torch.full(groups, 2 ** (bits - 1), dtype=torch.uint8, device=device)
    made = IntCodes(bits, codes, scale, zero)
    layout = IntGroups.of(made)
    assert layout is not None
    weight = PackedWeight(layout, layout.arrange(made), (rows, columns), None, kernel="cuda")
    return PackedLinear(weight, slice(0, rows), Stored(None, bits, groups[1]))  # type: ignore[arg-type] # never saved


def packed_model(blocks: int, bits: int, device: torch.device) -> LlamaForCausalLM:
    """The model with packed linear layers; the rest in bf16, random."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config(blocks)).to(torch.bfloat16)
    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            model.model.set_submodule(name, random_linear(module.out_features, module.in_features, bits, device))
    for name, parameter in list(model.named_parameters()):
        values = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Parameter(values, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    fuse(model)
    return model.eval()


def captured_step(model: LlamaForCausalLM, batch: int, context: int, device: torch.device) -> Callable[[], None]:
    """One decoding step at a position in the middle of the cache, as a CUDA graph to replay."""
    cache = StaticCache(config=model.config, max_cache_len=context)
    token = torch.zeros(batch, 1, dtype=torch.long, device=device)
    place = torch.full((1,), context // 2, dtype=torch.long, device=device)

    def step() -> torch.Tensor:
        out = model(token, position_ids=place[None].expand(batch, 1), cache_position=place, past_key_values=cache)
        logits: torch.Tensor = out.logits
        return logits

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        step()
    return graph.replay


def seconds_of(replay: Callable[[], None]) -> float:
    """Mean of some replays."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(REPLAYS):
        replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000 / REPLAYS


def compare(blocks: int, bits: list[int], batches: list[int], context: int, device: torch.device) -> list[dict[str, Any]]:
    """A row for each width and batch, the dense model beside each."""
    rows = []
    dense = dense_model(blocks, device)
    for width in bits:
        packed = packed_model(blocks, width, device)
        held = sum(tensor.nbytes for tensor in (*packed.parameters(), *packed.buffers()))
        for batch in batches:
            steps = [captured_step(model, batch, context, device) for model in (dense, packed)]
            taken = [[seconds_of(step) for step in steps] for _ in range(ROUNDS)]
            row = {
                "bits": width,
                "batch": batch,
                "dense_ms": 1000 * median(a for a, _ in taken),
                "packed_ms": 1000 * median(b for _, b in taken),
                "speedup": median(a / b for a, b in taken),
                "packed_bytes": held,
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
        del packed
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description="Time a decoding step of a whole model, packed and dense.")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2, 8])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.stderr.write("scripts/gpu/model_speed: this machine has no CUDA GPU; run it on one that has\n")
        return 2
    rows = compare(options.blocks, options.bits, options.batch, options.context, torch.device("cuda"))
    if options.out:
        machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
        options.out.write_text(json.dumps({"machine": machine, "blocks": options.blocks, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
