"""Run by `compressor.evaluation.verify.loaders` in a process of its own: what transformers alone makes of a directory.

    python stock.py DIRECTORY ANSWER data|trusted TOKEN…

ANSWER receives the logits [S, V], fp32, and what transformers says of the keys that it found or missed. The code that a
directory brings runs only if that is `trusted`.
"""

import contextlib
import sys


def answer(directory: str, to: str, tokens: list[int], *, trusted: bool) -> None:
    """Load the model as anybody would and compute logits, in fp32."""
    sys.modules["compressor"] = None  # type: ignore[assignment]  # any import of this package now fails: nothing may help
    import torch
    from transformers import AutoModelForCausalLM

    options = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": trusted}
    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype="float32", output_loading_info=True, **options)
    keys = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    with torch.no_grad():
        # The first call decompresses, some kinds of number to bfloat16 whatever was asked for, by which fp32 cannot multiply.
        with contextlib.suppress(RuntimeError):
            model(torch.tensor([tokens[:1]]), use_cache=False)
        torch.nn.Module.float(model)  # what transformers says of quantized models holds for packed ones
        logits_1SV = model(torch.tensor([tokens]), use_cache=False).logits
    torch.save({"logits": logits_1SV[0].float().clone(), **keys}, to)


if __name__ == "__main__":
    answer(sys.argv[1], sys.argv[2], [int(token) for token in sys.argv[4:]], trusted=sys.argv[3] == "trusted")
