"""Every reader of files with the file it reads: whole ones, made by the product, which the campaign damages."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tiny_models
import torch
from hostile.mutations import Mutate, bytes_changed, header_changed, json_changed, lines_changed, yaml_changed

from compressor import api
from compressor.evaluation.tasks import files as task_files
from compressor.evaluation.verify.files import check_config, check_copies, check_files, check_hashes
from compressor.model.checkpoint import INDEX, SINGLE, Checkpoint, read_config
from compressor.model.hf_config.decilm import changes
from compressor.model.journal import Journal, read_journal
from compressor.model.source import ModelSource
from compressor.model.tokenizer import load_tokenizer
from compressor.pipeline.calibration.data import documents
from compressor.pipeline.manifest import MANIFEST, read_manifest
from compressor.pipeline.plan_file import read_plan
from compressor.recipe.schema import load_recipe, make_recipe
from compressor.report.files import read_report
from compressor.report.inspect import inspect_model

CPU = torch.device("cpu")
AUTO_ROUND = {
    **{"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "data_type": "int", "bits": 4},
    **{"group_size": 64, "sym": True, "extra_config": {"lm_head": {"bits": 16}, r"model\.layers\.0\..*": {"bits": 4}}},
}
ENTRIES = {"hadamard": {"model.layers.0.mlp.down_proj": 64}, "absent": [], "widths": {"model.layers.0.mlp": 256}}
TASKS = [{"question": f"{n} + 1?", "choices": ["1", "2", str(n + 1)], "label": 2} for n in range(3)]
ROWS = [{"text": "3 sheep"}, {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
FINGERPRINT = {"recipe": "a", "model": "b"}


@dataclass(frozen=True)
class Reader:
    """One reader of one file.

    Args:
        name: Of the reader.
        model: Key of the directory in `seeds` that holds the file.
        file: Damaged file, by name.
        read: Function that a verb calls, on the directory.
        mutate: How the file is damaged.
        share: Of all mutations, in parts of 1,000: less where reading takes longer.
    """

    name: str
    model: str
    file: str
    read: Callable[[Path], object]
    mutate: Mutate
    share: int


def open_model(path: Path) -> None:
    """Open a model as every verb does, and read what is packed."""
    source = ModelSource(path, CPU)
    for layer in source.packed():
        source.read_packed(layer, meta=True)


def read_weights(path: Path) -> None:
    """Read every tensor, as compression and verification do."""
    checkpoint = Checkpoint(path)
    for name in checkpoint:
        checkpoint.read(name)
    check_files(path)


def tokenize(path: Path) -> None:
    """Load the tokenizer and use it as calibration and generation do."""
    tokenizer = load_tokenizer(path)
    tokenizer("3 sheep jump")


def verify_files(path: Path) -> None:
    """Do the checks of `compress verify` that read files."""
    read_config(path)
    manifest = read_manifest(path)
    check_copies(path, manifest)
    check_hashes(path, manifest, lambda done, total, what: None)


def verify_config(path: Path) -> None:
    """Compare the config with the manifest."""
    check_config(path, read_manifest(path))


def resume(path: Path) -> None:
    """Go on from a journal."""
    read_journal(path / "journal.jsonl")
    Journal(path, FINGERPRINT).resume(path, "give --overwrite")


READERS = (
    Reader("config", "dense", "config.json", open_model, json_changed(), 50),
    Reader("inspect", "packed", "config.json", inspect_model, json_changed(), 10),
    Reader("blocks", "blocks", "config.json", open_model, json_changed(), 20),
    Reader("generation", "dense", "generation_config.json", open_model, json_changed(), 10),
    Reader("compressed-tensors", "packed", "config.json", open_model, json_changed("quantization_config"), 30),
    Reader("compressed-tensors-floats", "floats", "config.json", open_model, json_changed("quantization_config"), 15),
    Reader("gptq", "gptq", "config.json", open_model, json_changed("quantization_config"), 20),
    Reader("auto-round", "auto-round", "config.json", open_model, json_changed("quantization_config"), 20),
    Reader("own", "own", "config.json", open_model, json_changed("quantization_config"), 25),
    Reader("index", "sharded", INDEX, read_weights, json_changed(), 125),
    Reader("header", "dense", SINGLE, read_weights, header_changed, 250),
    Reader("header-open", "packed", SINGLE, open_model, header_changed, 40),
    Reader("tokenizer", "dense", "tokenizer.json", tokenize, json_changed(), 70),
    Reader("tokenizer-config", "dense", "tokenizer_config.json", tokenize, json_changed(), 70),
    Reader("chat-template", "dense", "chat_template.jinja", tokenize, bytes_changed, 15),
    Reader("manifest", "packed", MANIFEST, verify_files, json_changed(), 80),
    Reader("manifest-config", "packed", MANIFEST, verify_config, json_changed(), 15),
    Reader("report", "packed", "report.json", read_report, json_changed(), 55),
    Reader("plan", "packed", "plan.yaml", lambda path: read_plan(path / "plan.yaml"), yaml_changed, 30),
    Reader("recipe", "packed", "recipe.yaml", lambda path: load_recipe(path / "recipe.yaml"), yaml_changed, 30),
    Reader("journal", "journal", "journal.jsonl", resume, lines_changed, 50),
    Reader("tasks", "rows", "tasks.jsonl", lambda path: task_files.read(path / "tasks.jsonl"), lines_changed, 60),
    Reader("rows", "rows", "rows.jsonl", lambda path: list(documents(str(path / "rows.jsonl"), 0, "all")), lines_changed, 25),
)


def seeds(place: Path) -> dict[str, Path]:
    """Make the directories with whole files, by name."""
    dense = tiny_models.build(place / "dense", "llama")
    shutil.copytree(dense, place / "outside")  # what a path that leads out would find
    found = {"dense": dense, "sharded": tiny_models.build(place / "sharded", "llama", shard_bytes="100KB")}
    for name, fmt in {
        "packed": {"format": "int_group", "bits": 4, "group_size": 64},
        "floats": {"format": "mxfp4"},
        "gptq": {"format": "gptq_int", "bits": 4, "group_size": 64},
        "own": {"format": "int_group", "bits": 3, "group_size": 64},
    }.items():
        recipe = make_recipe({"passes": [{"pass": "rtn", "options": [fmt]}], "evaluation": None})
        api.run(recipe, dense, place / name, device="cpu", dtype="float32", verify=False)
        found[name] = place / name
    found["auto-round"] = Path(shutil.copytree(place / "gptq", place / "auto-round"))
    tiny_models.change_config(found["auto-round"], quantization_config=AUTO_ROUND)
    own = json.loads((place / "own" / "config.json").read_text())["quantization_config"]
    tiny_models.change_config(place / "own", quantization_config={**own, **ENTRIES})
    found["blocks"] = Path(shutil.copytree(dense, place / "blocks"))
    tiny_models.change_config(found["blocks"], **changes(json.loads((dense / "config.json").read_text()), [256, 256]))
    found["journal"], found["rows"] = place / "journal", place / "rows"
    for name in ("journal", "rows"):
        found[name].mkdir()
    journal = Journal(found["journal"], FINGERPRINT)
    journal.start()
    journal.add("block-0", {"a": torch.zeros(2)}, seconds=1.0, rows=[{"layer": "a", "error": 0.1}])
    journal.add("block-1", {"a": torch.zeros(2)}, seconds=1.0, rows=[])
    for name, rows in {"tasks.jsonl": TASKS, "rows.jsonl": ROWS}.items():
        (found["rows"] / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found
