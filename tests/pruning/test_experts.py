"""What has to be known before experts are taken away: an expert that no token is sent to still has a share of the router's
softmax, which matters unless the shares of those that are chosen are made to add up to one."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}
TOKENS = torch.arange(1, 7)[None]
EXPERTS = 6


def built(family: str, experts: int, *, normed: bool) -> PreTrainedModel:
    torch.manual_seed(0)
    if family == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**COMMON, num_local_experts=experts)).eval()  # type: ignore[no-untyped-call]
    some: dict[str, Any] = {"num_experts": experts, "norm_topk_prob": normed, "decoder_sparse_step": 1, "head_dim": 8}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**COMMON, **some)).eval()  # type: ignore[no-untyped-call]


def computed(model: PreTrainedModel) -> tuple[Tensor, set[int]]:
    """Logits, and the experts that tokens were sent to."""
    chosen: set[int] = set()
    router: nn.Module = next(module for name, module in model.named_modules() if name.endswith("mlp.gate"))
    scored = router.register_forward_hook(
        lambda module, args, out: chosen.update((args[0].flatten(0, -2) @ module.weight.T).topk(2).indices.flatten().tolist())
    )
    with torch.no_grad():
        logits: Tensor = model(TOKENS, use_cache=False).logits
    scored.remove()
    return logits, chosen


@pytest.mark.parametrize(("family", "normed"), [("mixtral", True), ("qwen3_moe", True), ("qwen3_moe", False)])
def test_an_expert_that_is_never_chosen_can_go_if_the_shares_of_others_add_up_to_one(family: str, normed: bool) -> None:
    whole = built(family, EXPERTS, normed=normed)
    before, chosen = computed(whole)
    idle = next(expert for expert in range(EXPERTS) if expert not in chosen)
    kept = [expert for expert in range(EXPERTS) if expert != idle]
    fewer = built(family, EXPERTS - 1, normed=normed)
    by_expert = {name for name, tensor in whole.state_dict().items() if len(tensor) == EXPERTS and ".mlp." in name}
    fewer.load_state_dict({name: t[kept] if name in by_expert else t for name, t in whole.state_dict().items()})
    after, _ = computed(fewer)
    off = float((after - before).abs().max())
    assert off < 1e-6 if normed else off > 1e-5
