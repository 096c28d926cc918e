"""Train what pruning has left towards the predictions of the original, by low-rank changes that are merged at the end.

The original goes by once, block by block, and leaves what enters its head; the pruned model stays in memory, with a LoRA
beside every linear layer of its blocks, whose norms are trained too. The loss is the divergence of its predictions from the
original's, KL(original || pruned), and nothing else. Shapes, and so the architecture, stay.

Sources: Hu et al., "LoRA", ICLR 2022 (by peft); forward KL alone as in Muralidharan et al., "Compact Language Models via
Pruning and Knowledge Distillation", NeurIPS 2024, section 3.

Gradients of a step are summed over ranks, so what comes out does not depend on their number but for rounding.

Shape suffixes: N samples, B some of them, S sequence, D hidden, V vocabulary.
"""

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from compressor.errors import RecipeError
from compressor.model.journal import save, sync, writing
from compressor.model.rewritten import Pruned, Rewriting
from compressor.model.source import ModelSource
from compressor.pipeline import Event
from compressor.pruning.shapes import parameters
from compressor.pruning.stage import PruningPass, Work
from compressor.registry import node

WARM = 0.05  # of the steps, in which the learning rate rises
OFTEN = 20  # steps after which a training is put down, so that one that is broken off goes on from there
TOGETHER = 2048  # tokens that go through the model together
LOSSES = "losses"  # of all steps, beside the tensors


@node
class Recover(PruningPass):
    """Put it behind what prunes. It needs the pruned model in memory, in float32.

    Args:
        steps: Of training.
        batch: Samples in a step.
        lr: Highest learning rate; it rises to that and falls to zero with a cosine.
        rank: Of the changes to linear layers.
        norms: Train the weights of norms too.
        seed: Of the order of samples, and of where the changes start.
    """

    steps: int = 300
    batch: int = 8
    lr: float = 1e-3
    rank: int = 32
    norms: bool = True
    seed: int = 0
    label: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not a positive number")
        if not 0 < self.lr <= 1:
            raise ValueError(f"lr: {self.lr} is not above 0 and at most 1")

    def sketch(self, source: ModelSource) -> tuple[Rewriting | None, bool]:
        """No shape changes."""
        return None, True

    def prune(self, work: Work) -> Pruned:
        """Train what is left.

        Raises:
            RecipeError: nothing has been pruned.
        """
        if not work.source.rewritings:
            raise RecipeError(
                "recover: nothing was pruned, so nothing was lost; put `prune_width` or `prune_depth` before it"
            )
        known = hashlib.sha256(repr((sorted(work.known.items()), self)).encode()).hexdigest()[:12]
        file = work.place / f"recovered-{known}.safetensors"
        if work.ranks.first:
            work.place.mkdir(parents=True, exist_ok=True)
        if not work.ranks.agree(file.exists()):
            trained = self._trained(work, file.with_suffix(".training"))
            if work.ranks.first:
                save(file, trained)
        work.ranks.barrier()
        with safe_open(file, framework="pt") as opened:
            names = set(opened.keys()) - {LOSSES}
            losses = [float(loss) for loss in opened.get_tensor(LOSSES)]
        count, tenth = parameters(work.source), max(1, self.steps // 10)
        first, last = (sum(some) / len(some) for some in (losses[:tenth], losses[-tenth:]))
        report = {"pass": "recover", "parameters": [count, count], "loss": [first, last]}
        return Pruned(Rewriting({name: partial(_stored, file, name) for name in names}), report)

    def _trained(self, work: Work, unfinished: Path) -> dict[str, Tensor]:
        """The new tensors by name on disk, and the losses."""
        ranks, source, tokens_NS = work.ranks, work.source, work.calibration.tokens
        mine = range(ranks.rank, len(tokens_NS), ranks.world)
        original = ModelSource(source.path, source.device, source.dtype)
        targets = dict(zip(mine, _finished(original, [tokens_NS[i : i + 1] for i in mine]), strict=True))
        torch.manual_seed(self.seed)
        model = self._student(source)
        trained = [p for p in model.parameters() if p.requires_grad]
        training = _Training(self, trained, unfinished if ranks.first else None)
        training.resume(ranks.agree(training.kept()))
        with original.head() as head:
            for step in range(training.done, self.steps):
                chosen = random.Random(f"{self.seed}-{step}").sample(range(len(tokens_NS)), min(self.batch, len(tokens_NS)))
                loss = torch.zeros((), dtype=torch.float64, device=source.device)
                for some in _pieces([i for i in chosen if i in targets], tokens_NS.shape[1]):
                    with _precision(source):
                        found_BSV = model(tokens_NS[some].to(source.device), use_cache=False).logits
                    with torch.no_grad():
                        wanted_BSV = head(torch.cat([targets[i] for i in some]).to(source.device)).float().log_softmax(-1)
                    lost = (wanted_BSV.exp() * (wanted_BSV - found_BSV.float().log_softmax(-1))).sum()
                    lost = lost / (len(chosen) * tokens_NS.shape[1])
                    lost.backward()
                    loss += lost.detach()
                for parameter in trained:
                    parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                ranks.sum_([loss, *(p.grad for p in trained if p.grad is not None)])
                if not torch.isfinite(loss):
                    raise RecipeError(
                        f"recover: the loss of step {step + 1} is {float(loss)}; lower lr, which is {self.lr:g}"
                    )
                training.step(float(loss))
                work.tell(Event("recover", step + 1, self.steps, error=float(loss)))
        merged = model.merge_and_unload().state_dict()
        inside = {name: at for name, at in source.names.items() if name.startswith(f"{source.prefix}.") and name in merged}
        new = {at: merged[name].to(source.checkpoint.headers[at].dtype) for name, at in inside.items()}
        return {**new, LOSSES: torch.tensor(training.losses)}

    def _student(self, source: ModelSource) -> Any:
        """The pruned model in float32, with what is trained; the rest is frozen."""
        student = ModelSource(source.path, source.device, torch.float32, source.rewritings)
        layers = [
            f"{b.prefix}.{name}"
            for b in map(partial(student.block, load=False), range(len(student.layers)))
            for name in b.layers
        ]
        settings = LoraConfig(r=self.rank, lora_alpha=2 * self.rank, lora_dropout=0.0, target_modules=layers, bias="none")
        model: Any = get_peft_model(student.whole(), settings)
        if self.norms:
            for name, module in model.named_modules():
                if f"{student.prefix}." in name and "norm" in type(module).__name__.lower():
                    module.requires_grad_(True)
        return model


class _Training:
    """Steps of AdamW, put down now and then.

    Args:
        settings: How many, how fast.
        trained: What changes.
        file: Where it is put down; None does not.
    """

    def __init__(self, settings: Recover, trained: Sequence[nn.Parameter], file: Path | None) -> None:
        self.settings, self.trained, self.file = settings, trained, file
        self.optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=0.0)
        self.losses: list[float] = []

    @property
    def done(self) -> int:
        """Steps."""
        return len(self.losses)

    def kept(self) -> dict[str, Any]:
        """What an interrupted training has left; nothing at the start."""
        if self.file is None or not self.file.exists():
            return {}
        try:
            found: dict[str, Any] = torch.load(self.file, map_location="cpu", weights_only=True)
        except Exception:  # whatever torch's reader makes of it: the machine went down before all of it was on the disk
            return {}
        return found

    def resume(self, kept: Mapping[str, Any]) -> None:
        """Go on from there, with the learning rate as it was to become."""
        if kept:
            self.losses = list(kept["losses"])
            self.optimizer.load_state_dict(kept["optimizer"])
            with torch.no_grad():
                for parameter, value in zip(self.trained, kept["trained"], strict=True):
                    parameter.copy_(value)
        warm = max(1, round(WARM * self.settings.steps))
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, warm, self.settings.steps, last_epoch=self.done - 1)

    def step(self, loss: float) -> None:
        """Follow the gradients, which are all there."""
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.losses.append(loss)
        if self.file is not None and self.done % OFTEN == 0 and self.done < self.settings.steps:
            state = {
                "losses": self.losses,
                "optimizer": self.optimizer.state_dict(),
                "trained": [p.detach() for p in self.trained],
            }
            new = self.file.with_suffix(".new")
            with writing(new):
                torch.save(state, new)
                sync(new)
                new.rename(self.file)


@torch.no_grad()
def _finished(source: ModelSource, batches: Sequence[Tensor]) -> list[Tensor]:
    """What leaves the last block, on the CPU."""
    states = source.first_inputs(batches)
    for block in source.blocks():
        states = [block.forward(x.to(source.device)).cpu() for x in states]
    return states


def _pieces(samples: Sequence[int], length: int) -> Iterator[list[int]]:
    size = max(1, TOGETHER // length)
    for first in range(0, len(samples), size):
        yield list(samples[first : first + size])


def _precision(source: ModelSource) -> AbstractContextManager[Any]:
    """Products in bfloat16 unless the run computes in float32: gradients may be too small for float16. Weights stay."""
    return torch.autocast(source.device.type, torch.bfloat16, enabled=source.dtype != torch.float32)


def _stored(file: Path, name: str, old: Tensor) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        new: Tensor = opened.get_tensor(name)
    return new.to(old)


EXPORT = Recover
