"""Qwen2-MoE: fine-grained experts beside one shared expert under a sigmoid gate."""

from typing import Any

from moestro.models.families._tables import BALANCE, decoder, gate_layouts, gated_ffn, sparse_step
from moestro.models.spec import FamilySpec, Get, MoESpec, SharedSpec


def router_config(get: Get) -> dict[str, Any]:
    """Softmax over all experts; renormalised only if the config says so."""
    return {
        "top_k": get("num_experts_per_tok"),
        "renormalise": get("norm_topk_prob", default=False),
    }


ROUTER_KEYS = {"top_k": "num_experts_per_tok", "renormalise": "norm_topk_prob"}

SPEC = FamilySpec(
    model_types=("qwen2_moe",),
    stacks=(decoder("Qwen2MoeModel"),),
    ffn=gated_ffn(),
    moe=MoESpec(
        block="Qwen2MoeSparseMoeBlock",
        is_moe=sparse_step,
        num_experts=("num_experts", "num_local_experts"),
        top_k=("num_experts_per_tok",),
        inner=("moe_intermediate_size",),
        router="train.softmax_topk",
        router_config=router_config,
        router_keys=ROUTER_KEYS,
        dense_layers="mlp_only_layers",
        layouts=gate_layouts(moves=(("shared_expert.", "shared.expert."), ("shared_expert_gate.", "shared.gate."))),
        shared=SharedSpec(module="shared_expert", gate="shared_expert_gate"),
        losses=(BALANCE,),
    ),
)
