"""DeepSeek-V2: group-limited softmax routing, shared experts of weight 1, latent attention.

The router follows the authors' formula (arXiv 2405.04434 and the code beside their checkpoints): groups that
are left out cannot be chosen, and ``norm_topk_prob`` renormalises instead of scaling. Transformers ignores
``norm_topk_prob`` and masks with 0; both agree wherever ``norm_topk_prob`` is false, which holds for the
published checkpoints.
"""

from typing import Any

from moestro.models.families._tables import after_first, decoder, gate_layouts, gated_ffn
from moestro.models.spec import AuxLoss, FamilySpec, Get, MoESpec, SharedSpec


def router_config(get: Get) -> dict[str, Any]:
    """Greedy or group-limited; scaled, or renormalised when more than one expert is chosen."""
    top_k = get("num_experts_per_tok")
    renormalise = bool(get("norm_topk_prob", default=False)) and top_k > 1
    grouped = get("topk_method", default="greedy") == "group_limited_greedy"
    return {
        "top_k": top_k,
        "renormalise": renormalise,
        "renorm_eps": 1e-20 if renormalise else 0.0,
        "scale": 1.0 if renormalise else get("routed_scaling_factor", default=1.0),
        "num_groups": get("n_group", default=1) if grouped else 1,
        "groups_kept": get("topk_group", default=1) if grouped else 1,
    }


LINEAR = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
NORMS = ("input_layernorm", "post_attention_layernorm", "self_attn.q_a_layernorm", "self_attn.kv_a_layernorm")

SPEC = FamilySpec(
    model_types=("deepseek_v2",),
    stacks=(decoder("DeepseekV2Model", linear=LINEAR, norms=NORMS),),
    ffn=gated_ffn(),
    moe=MoESpec(
        block="DeepseekV2Moe",
        is_moe=after_first,
        num_experts=("n_routed_experts", "num_experts"),
        top_k=("num_experts_per_tok",),
        inner=("moe_intermediate_size",),
        router="train.softmax_topk",
        router_config=router_config,
        router_keys={
            "top_k": "num_experts_per_tok",
            "renormalise": "norm_topk_prob",
            "num_groups": "n_group",
            "groups_kept": "topk_group",
        },
        layouts=gate_layouts(moves=(("shared_experts.", "shared."),)),
        shared=SharedSpec(module="shared_experts"),
        losses=(
            AuxLoss(
                name="balance",
                method="train.balance_loss",
                coefficient=("aux_loss_alpha",),
                config={"scope": "sequence"},
            ),
        ),
    ),
    attention="mla",
)
