"""Prompt tuning: learn soft tokens before every text that bring a pruned model's predictions nearer to the original's.

No weight changes. The prompt is stored in `soft_prompt/` next to the weights, in the format of peft, and is loaded with
`peft.PeftModel.from_pretrained(model, "OUT/soft_prompt")`. Without that the model is unaffected. The prompt takes up
positions of every text. The loss is that of `recover` on the text's own tokens. If the model is quantized after this pass,
the prompt is the one trained before quantization.

Source: Xu et al., "Compress, Then Prompt: Improving Accuracy-Efficiency Trade-off of LLM Inference with Transferable Prompt",
2023. Differences: the loss is the divergence from the original's predictions, and the prompt is initialised with tokens of
the calibration text.

Shape suffixes: P tokens of the prompt, B samples, S sequence, N samples, D hidden.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from peft import PromptTuningConfig, TaskType
from torch import Tensor, nn
from transformers import PreTrainedModel

from compressor.errors import RecipeError
from compressor.model.edited import Rewriting
from compressor.model.journal import save, writing
from compressor.model.source import ModelSource
from compressor.passes.prune.shapes import parameters
from compressor.passes.train.distillation import Lesson, Schedule, Training, distil, expected_memory
from compressor.pipeline.prune_stage import Pruned, PruningPass, Sketch, Work, read_tensors
from compressor.recipe.registry import node

FOLDER = "soft_prompt"
FILES = ("adapter_config.json", "adapter_model.safetensors")  # as peft names them
PROMPT, KL = "prompt_embeddings", "kl"  # peft's key; key of the divergences without and with the prompt


@node
class SoftPrompt(PruningPass):
    """Learn a soft prompt. List it after pruning and training passes. It needs the pruned model in memory, in float32.

    Args:
        tokens: Number of tokens of the prompt.
        steps: Number of training steps.
        batch: Number of samples per step.
        lr: Peak learning rate after warm-up, relative to the root mean square of the initial prompt. It decays to zero as a
            cosine.
        judged: Number of tokens, in addition to calibration, on which the model is scored with and without the prompt.
        seed: Seed of the order of samples and of the tokens that initialise the prompt.
    """

    tokens: int = 100
    steps: int = 300
    batch: int = 8
    lr: float = 0.1
    judged: int = 8192
    seed: int = 0
    label: ClassVar[str] = ""
    requires_pruned_model: ClassVar[bool] = True
    must_be_last: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("tokens", "judged"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not a positive number")
        Schedule(self.steps, self.batch, self.lr, self.seed)

    def sketch(self, source: ModelSource) -> Sketch:
        """Predict that no shape changes."""
        return Sketch(None)

    def expected_memory(self, source: ModelSource, tokens: int, batch: int) -> int:
        """Return the peak memory of the training in bytes."""
        return expected_memory(source, tokens, 0)

    def prune(self, work: Work) -> Pruned:
        """Learn the prompt.

        Raises:
            RecipeError: Prompt and text together exceed the model's maximum length, or the loss is not finite. The pruning
                stage raises it if nothing was pruned.
        """
        length, longest = work.calibration.tokens.shape[1], work.source.max_positions
        if self.tokens + length > longest:
            shorter = f", or calibration.seq_len to {longest - self.tokens}" if longest - self.tokens > 1 else ""
            raise RecipeError(
                f"soft_prompt: {self.tokens} tokens before {length} of text are more than the {longest} that the model was "
                f"made for; lower its `tokens`{shorter}"
            )
        found = read_tensors(work.once("prompt", self, partial(self._trained, work)))
        without, with_it = found.pop(KL).tolist()
        if work.ranks.first:
            write_prompt(work.place / FOLDER, found[PROMPT])
        work.ranks.barrier()
        count = parameters(work.source)
        report = {
            "pass": "soft_prompt",
            "parameters": [count, count],
            "tokens": self.tokens,
            "kl": [without, with_it],
        }
        return Pruned(Rewriting({}, files={f"{FOLDER}/{name}": work.place / FOLDER / name for name in FILES}), report)

    def _trained(self, work: Work, unfinished: Path) -> dict[str, Tensor]:
        """Return the prompt [P, D], and the divergences on other text without and with it."""
        source, tokens_NS = work.source, work.calibration.tokens
        other = replace(work.calibration, tokens=work.text(self.judged, "judged"))
        model = ModelSource(source.path, source.device, torch.float32, source.rewritings).whole()
        start_PD = model.get_input_embeddings()(_some(tokens_NS, self.tokens, self.seed).to(source.device))
        prompt_PD = nn.Parameter(start_PD.detach().clone())
        size = float(start_PD.square().mean().sqrt())
        schedule = Schedule(self.steps, self.batch, self.lr, self.seed)
        group = {"params": [prompt_PD], "lr": self.lr * size}
        training = Training(schedule, [group], unfinished if work.ranks.first else None)
        prompted = partial(_prompted, model, prompt_PD)
        distil(work, prompted, training)
        with Lesson.opened(replace(work, calibration=other)) as lesson:
            kl = [lesson.loss(model), lesson.loss(prompted)]
        return {PROMPT: prompt_PD.detach(), KL: torch.tensor(kl)}


def _some(tokens_NS: Tensor, count: int, seed: int) -> Tensor:
    """Draw single tokens of the text [P], with replacement."""
    generator = torch.Generator().manual_seed(seed)
    return tokens_NS.flatten()[torch.randint(tokens_NS.numel(), (count,), generator=generator)]


def _prompted(model: PreTrainedModel, prompt_PD: Tensor, tokens_BS: Tensor, **options: Any) -> SimpleNamespace:
    """Return the model's logits for a text's own tokens, with the prompt before them."""
    embedded_BSD = model.get_input_embeddings()(tokens_BS)
    prompt_BPD = prompt_PD.to(embedded_BSD.dtype).expand(len(tokens_BS), -1, -1)
    logits = model(inputs_embeds=torch.cat([prompt_BPD, embedded_BSD], 1), **options).logits
    return SimpleNamespace(logits=logits[:, len(prompt_PD) :])


def write_prompt(folder: Path, prompt_PD: Tensor) -> None:
    """Write a directory that peft loads."""
    count, width = prompt_PD.shape
    with writing(folder):
        folder.mkdir(exist_ok=True)
        save(folder / FILES[1], {PROMPT: prompt_PD})
        PromptTuningConfig(
            task_type=TaskType.CAUSAL_LM,
            num_virtual_tokens=count,
            token_dim=width,
            num_transformer_submodules=1,
            inference_mode=True,
        ).save_pretrained(str(folder))


EXPORT = SoftPrompt
