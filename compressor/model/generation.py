"""Set a model's `generate` to plain greedy decoding or plain sampling."""

from transformers import GenerationConfig, PreTrainedModel


def generate_plainly(model: PreTrainedModel, *, sample: bool = False) -> None:
    """Have a model take the likeliest token each time, or draw from its own distribution; its end tokens stay.

    Replaces the checkpoint's settings (repetition_penalty, temperature, …): transformers fills in from them whatever a
    call leaves out, even one that gives a configuration of its own.
    """
    drawing = {"top_k": 0, "top_p": 1.0, "temperature": 1.0} if sample else {}
    model.generation_config = GenerationConfig(do_sample=sample, eos_token_id=model.generation_config.eos_token_id, **drawing)
