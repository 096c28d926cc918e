"""Whether the files of a directory are whole, and hold the bytes that the run computed."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch

from compressor.access import check_readable
from compressor.errors import SourceError
from compressor.evaluation.verify.check import NotCheckedError, Progress, WrongError, refuse
from compressor.model.checkpoint import SINGLE, Checkpoint, find_shards
from compressor.model.header import Span, spans
from compressor.model.source import ModelSource
from compressor.pipeline.manifest import MANIFEST, Manifest

CHUNK_BYTES = 2**24


def check_files(directory: Path) -> str:
    """All shards are whole, and hold what the index says: each tensor once, in the shard that it names."""
    for shard in _shards(directory):
        size = shard.stat().st_size
        cut = sorted((span.end, name) for name, span in spans(shard).items() if span.end > size)
        refuse([f"{shard}: ends at byte {size:,} where {name} needs {end:,}" for end, name in cut])
    refuse(_misplaced(directory))
    checkpoint = Checkpoint(directory)
    return f"{len(checkpoint.headers)} tensors, whole; files: {len(checkpoint.files())}"


def check_hashes(directory: Path, manifest: Manifest | None, progress: Progress) -> str:
    """Every tensor has the dtype, shape and bytes that the run computed, and there is no other."""
    if manifest is None:
        raise NotCheckedError(f"no {MANIFEST}: nothing says what the tensors should be")
    known, kinds, contents = manifest.tensors, [], []
    found = [(name, shard, span) for shard in _shards(directory) for name, span in spans(shard).items()]
    total, done = sum(span.end - span.begin for _, _, span in found), 0
    for name, shard, span in found:
        progress(done, total, f"hash of {name}")
        done += span.end - span.begin
        expected = known.get(name)
        if expected is None:
            kinds.append(f"{shard}: {name} was not written by the run")
        elif (span.dtype, list(span.shape)) != (expected["dtype"], expected["shape"]):
            computed = f"{expected['dtype']} {expected['shape']}"
            kinds.append(f"{shard}: {name} is {span.dtype} {list(span.shape)} where the run computed {computed}")
        elif _sha256(shard, span) != expected["sha256"]:
            contents.append(f"{shard}: {name} holds other bytes than the run computed")
    lost = [f"{directory}: {name} of {MANIFEST} is missing" for name in sorted(known.keys() - {name for name, _, _ in found})]
    refuse([*lost, *kinds, *contents])
    return f"{len(known)} tensors, {total:,} bytes, as the run computed them"


def check_config(directory: Path, manifest: Manifest | None) -> str:
    """config.json is the run's, and the model opens with it."""
    file, changed = directory / "config.json", ""
    if manifest is not None and hashlib.sha256(file.read_bytes()).hexdigest() != manifest.config_sha256:
        changed = f"{file}: is not what the run wrote"
    try:
        source = ModelSource(directory, torch.device("cpu"))
        packed = source.packed()
        if changed:
            for layer in packed:
                source.read_packed(layer)
    except SourceError as error:
        reason = str(error).removeprefix(f"{directory}: ")
        raise WrongError(f"{changed}, and with it {reason}" if changed else str(error)) from error
    if changed:
        raise WrongError(f"{changed}, though all packed layers have the shapes it needs")
    same = "as the run wrote it" if manifest is not None else f"no {MANIFEST} to compare it with, but the model opens"
    warned = "".join(f"; warning: {sentence}" for sentence in source.unused.warnings)
    return f"{same}: {source.model.config.model_type}, packed layers: {len(packed)}{warned}"


def check_copies(directory: Path, manifest: Manifest | None) -> str:
    """The tokenizer and what else was copied from the original is as it was, and so is what was learned to go
    beside the weights: with another tokenizer a model writes nonsense."""
    if manifest is None:
        raise NotCheckedError(f"no {MANIFEST}: nothing says what the other files should be")
    problems = []
    for name, known in manifest.files.items():
        file = directory / name
        check_readable([file], SourceError)
        if not file.is_file():
            problems.append(f"{file}: is missing")
        elif hashlib.sha256(file.read_bytes()).hexdigest() != known:
            problems.append(f"{file}: is not what the run copied there")
    refuse(problems)
    return f"{len(manifest.files)} files, as the run copied them"


def _shards(directory: Path) -> list[Path]:
    """The files with weights, whole or not."""
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    return [directory / shard for shard in sorted(set(find_shards(directory).values()))]


def _misplaced(directory: Path) -> list[str]:
    """Tensors that stand in two shards, of which loaders would take either, or in another than the index names."""
    index, places = find_shards(directory), defaultdict[str, list[str]](list)
    for shard in _shards(directory):
        for name in spans(shard):
            places[name].append(shard.name)
    return [
        f"{directory}: {name} is in {' and '.join(shards)} where the index has it in {index.get(name, 'none')}"
        for name, shards in places.items()
        if shards != [index.get(name)]
    ]


def _sha256(shard: Path, span: Span) -> str:
    digest = hashlib.sha256()
    for chunk in _chunks(shard, span):
        digest.update(chunk)
    return digest.hexdigest()


def _chunks(shard: Path, span: Span) -> Iterator[bytes]:
    with shard.open("rb") as file:
        file.seek(span.begin)
        left = span.end - span.begin
        while left > 0 and (chunk := file.read(min(left, CHUNK_BYTES))):
            left -= len(chunk)
            yield chunk
