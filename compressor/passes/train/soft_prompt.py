"""Learn soft tokens that stand before every text and bring the predictions of a pruned model nearer to the original's.

No weight changes. The prompt lies in `soft_prompt/` beside the weights, as peft writes prompts, and is used by
`peft.PeftModel.from_pretrained(model, "OUT/soft_prompt")`; without that the model is as it would be. It takes its number of
positions from every text. The loss is that of `recover` on the text's own tokens. What is quantized behind this pass gets the
prompt of the model before that.

Source: Xu et al., "Compress, Then Prompt: Improving Accuracy-Efficiency Trade-off of LLM Inference with Transferable Prompt",
2023. What differs: the loss is the divergence from the original's predictions, and tokens of the calibration text are where
the prompt starts.

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
PROMPT, KL = "prompt_embeddings", "kl"  # peft's name; and the divergence without the prompt and with it


@node
class SoftPrompt(PruningPass):
    """Put it behind what prunes and trains. It needs the pruned model in memory, in float32.

    Args:
        tokens: Number of tokens of the prompt.
        steps: Number of training steps.
        batch: Samples in a step.
        lr: Highest learning rate, in parts of the size of an embedding's entries; it rises to that and falls to zero with a
            cosine.
        judged: Tokens, besides those of calibration, that the model is judged on with the prompt and without.
        seed: Seed of the order of samples.
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
        """Nothing changes."""
        return Sketch(None)

    def expected_memory(self, source: ModelSource, tokens: int, batch: int) -> int:
        """Peak of the training."""
        return expected_memory(source, tokens, 0)

    def prune(self, work: Work) -> Pruned:
        """Learn the prompt.

        Raises:
            RecipeError: nothing has been pruned, or the prompt does not fit before the text.
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
        """The prompt [P, D], and the divergence on other text without it and with it."""
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
    """Tokens of the text, drawn one by one [P]."""
    generator = torch.Generator().manual_seed(seed)
    return tokens_NS.flatten()[torch.randint(tokens_NS.numel(), (count,), generator=generator)]


def _prompted(model: PreTrainedModel, prompt_PD: Tensor, tokens_BS: Tensor, **options: Any) -> SimpleNamespace:
    """The model's logits of a text's own tokens, behind the prompt."""
    embedded_BSD = model.get_input_embeddings()(tokens_BS)
    prompt_BPD = prompt_PD.to(embedded_BSD.dtype).expand(len(tokens_BS), -1, -1)
    logits = model(inputs_embeds=torch.cat([prompt_BPD, embedded_BSD], 1), **options).logits
    return SimpleNamespace(logits=logits[:, len(prompt_PD) :])


def write_prompt(folder: Path, prompt_PD: Tensor) -> None:
    """A directory that peft loads."""
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
