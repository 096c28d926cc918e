"""Whether the loaders that claim to read a directory compute what they should: ours, streamed, and stock transformers.

Shape suffixes: S positions, V vocabulary.
"""

import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.errors import SourceError
from compressor.evaluation.predict import final_hidden
from compressor.evaluation.verify.check import NotCheckedError, Progress, WrongError, refuse
from compressor.model.hf_config import decilm
from compressor.model.hf_config.quantization_config import OWN, STOCK_NEEDS
from compressor.model.memory import available_memory, parameters
from compressor.model.source import ModelSource
from compressor.pipeline.manifest import MANIFEST, Manifest
from compressor.pipeline.probe import Record, probe_tokens
from compressor.report.compatibility import activation_bits, per_tensor, stock_dtype

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Mean difference of the likely tokens' log-probabilities, nats. The same machine gives 0, or what rounding takes from the
# record; another adds in another order. For that, 16-bit dtypes get 5 times what computing in fp32 instead changes on
# trained models of 4 to 8 blocks (float16 0.004, bfloat16 0.04), fp32 about 1000 roundings. A misread layer costs far more.
LIMITS = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.2}
# Where activations, or keys and values, are rounded: sums in another order take some to the next step, and more from there
# on. With 4 bits a step is a quarter of a number: 0.3 nats where weights differ in the last digit of bfloat16.
ROUNDED = {4: 0.5, 8: 0.1}
STOCK = Path(__file__).with_name("stock.py")
SHARE = 0.5  # of the available memory, at most, for stock transformers, which holds the whole model
SHORT_OF_MEMORY = ("MemoryError", "Cannot allocate memory")  # Python's words, and the system's, which torch passes on


def check_logits(directory: Path, manifest: Manifest | None, device: torch.device, progress: Progress) -> str:
    """Our reader computes what the run computed before anything was written."""
    record = manifest.probe if manifest is not None else None
    if record is None:
        raise NotCheckedError(f"no {MANIFEST}" if manifest is None else f"no logits were recorded in {MANIFEST}")
    if record.dtype not in DTYPES:
        raise WrongError(f"{directory / MANIFEST}: dtype {record.dtype} of the probe is unknown")
    source = ModelSource(directory, device, DTYPES[record.dtype])
    found = record.difference(streamed_logits(source, torch.tensor([record.tokens]), progress))
    return _judge(found, source, f"{directory}: log-probabilities", "what the run computed")


def check_transformers(directory: Path, source: ModelSource, tokens: Tensor | None, progress: Progress) -> str:
    """Stock transformers, without this package, finds every key and computes what our streaming reader computes in fp32."""
    method = (source.raw_config.get("quantization_config") or {}).get("quant_method")
    if method == OWN:
        raise NotCheckedError(f"it does not know the layout `{OWN}`: that is for compressor.load")
    needed = [package for package in STOCK_NEEDS.get(method or "", ()) if find_spec(package.replace("-", "_")) is None]
    if needed:
        raise NotCheckedError(f"it needs the package {needed[0]}, which is not installed here")
    if (obstacle := per_tensor(source)) is not None:
        raise NotCheckedError(f"it computes something else: {obstacle}")
    trusted = decilm.own_code(directory, source.raw_config)
    if decilm.runs_code(source.raw_config) and not trusted:
        raise NotCheckedError("it would run code from the directory, which is not this package's")
    _check_memory(source)
    tokens_1S = probe_tokens(source) if tokens is None else tokens
    _check_tokens(source, tokens_1S)
    stock = _ask(directory, tokens_1S, trusted=trusted)
    known = {name.rpartition(".")[0] for name in source.names.values()}
    problems = [
        f"{directory}: transformers finds no tensor for {key} and draws it at random" for key in stock["missing_keys"]
    ]
    problems += [f"{directory}: the shape of {key} is not what transformers needs" for key in stock["mismatched_keys"]]
    problems += [
        f"{directory}: transformers does not know what to do with {key}"
        for key in stock["unexpected_keys"]
        if key.rpartition(".")[0] in known and key not in source.unused.names  # else the original, too, has it for nothing
    ]
    refuse(problems)
    try:
        ours_SV = streamed_logits(source, tokens_1S, progress)
    except SourceError as error:
        raise NotCheckedError(f"it finds every key, but its logits have none of ours to be compared with: {error}") from error
    record = Record.of(tokens_1S, source.dtype, ours_SV)
    found = record.difference(stock["logits"])
    return _judge(found, source, f"{directory}: log-probabilities of transformers", "ours", stock_dtype(source))


def streamed_logits(source: ModelSource, tokens_1S: Tensor, progress: Progress) -> Tensor:
    """Logits [S, V] with one block in memory at a time."""
    _check_tokens(source, tokens_1S)
    total, done = len(source.layers), 0

    def step() -> None:
        nonlocal done
        done += 1
        progress(done, total, "logits")

    (logits_1SV,) = source.logits(final_hidden(source, [tokens_1S], step))
    return logits_1SV[0]


def _judge(found: float, source: ModelSource, whose: str, compared: str, dtype: str = "float32") -> str:
    dtype = max(dtype, str(source.dtype).removeprefix("torch."), key=lambda name: LIMITS[name])
    bits = activation_bits(source) or (8 if source.cache is not None else None)
    limit = LIMITS[dtype] if bits is None else max(LIMITS[dtype], ROUNDED[4 if bits <= 4 else 8])
    if not found <= limit:
        raise WrongError(
            f"{whose} differ from {compared} by {found:.3g} nats on average where {limit:g} is allowed in {dtype}"
        )
    return f"log-probabilities differ from {compared} by {found:.2g} nats on average (limit {limit:g} in {dtype})"


def _check_tokens(source: ModelSource, tokens_1S: Tensor) -> None:
    if int(tokens_1S.max()) >= source.vocab_size:
        raise WrongError(
            f"{source.path}: {MANIFEST} has token {int(tokens_1S.max())} where the model knows {source.vocab_size} tokens"
        )


def _check_memory(source: ModelSource) -> None:
    """Whether stock transformers may load the model, which it does on the CPU."""
    files = sum(file.stat().st_size for file in source.checkpoint.files())
    needed, free = parameters(source) * torch.float32.itemsize + files, available_memory(torch.device("cpu"))
    if needed > SHARE * free:
        raise NotCheckedError(
            f"dense in float32 it takes {needed / 1e6:,.1f} MB, more than half of the {free / 1e6:,.1f} MB that are available"
        )


def _ask(directory: Path, tokens_1S: Tensor, *, trusted: bool = False) -> dict[str, Any]:
    """Ask transformers, in a process that cannot import this package, on the CPU. With `trusted` it may run code."""
    with tempfile.TemporaryDirectory() as place:
        answer, modules = Path(place) / "answer.pt", {"HF_MODULES_CACHE": place} if trusted else {}
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1", **modules}
        tokens = map(str, tokens_1S[0].tolist())
        command = [sys.executable, "-P", str(STOCK), str(directory), str(answer), "trusted" if trusted else "data", *tokens]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment, check=False)
        if done.returncode < 0:
            raise NotCheckedError(f"it was ended by signal {-done.returncode}, most likely for lack of memory")
        if done.returncode > 0:
            reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            if any(words in done.stderr for words in SHORT_OF_MEMORY):
                raise NotCheckedError(f"it ran out of memory ({reason})")
            raise WrongError(f"{directory}: stock transformers cannot load it ({reason})")
        found: dict[str, Any] = torch.load(answer, weights_only=True)
        return found
