"""DeepSeek-V3: sigmoid scores, a bias that steers the choice but not the weights, groups ranked by their
best two.
"""

from typing import Any

from moestro.models.families._tables import after_first, decoder, gate_layouts, gated_ffn
from moestro.models.families.deepseek_v2 import LINEAR, NORMS
from moestro.models.spec import FamilySpec, Get, MoESpec, Rule, SharedSpec


def router_config(get: Get) -> dict[str, Any]:
    """Weights are the sigmoids without the bias, renormalised if asked, then always scaled."""
    return {
        "top_k": get("num_experts_per_tok"),
        "renormalise": get("norm_topk_prob", default=True),
        "renorm_eps": 1e-20,
        "scale": get("routed_scaling_factor", default=2.5),
        "num_groups": get("n_group", default=1),
        "groups_kept": get("topk_group", default=1),
    }


BIAS = Rule(target="router.selection_bias", sources=("gate.e_score_correction_bias",), projections=("selection bias",))

SPEC = FamilySpec(
    model_types=("deepseek_v3",),
    stacks=(decoder("DeepseekV3Model", linear=LINEAR, norms=NORMS),),
    ffn=gated_ffn(),
    moe=MoESpec(
        block="DeepseekV3MoE",
        is_moe=after_first,
        num_experts=("n_routed_experts", "num_local_experts"),
        top_k=("num_experts_per_tok",),
        inner=("moe_intermediate_size",),
        router="train.sigmoid_bias",
        router_config=router_config,
        router_keys={
            "top_k": "num_experts_per_tok",
            "renormalise": "norm_topk_prob",
            "scale": "routed_scaling_factor",
            "num_groups": "n_group",
            "groups_kept": "topk_group",
        },
        layouts=gate_layouts(moves=(("shared_experts.", "shared."),), extra=(BIAS,)),
        shared=SharedSpec(module="shared_experts"),
    ),
    attention="mla",
    # The multi-token prediction layer of the published checkpoints, which Transformers leaves out as well.
    ignored=(r"^model\.layers\.61\.", r"(^|\.)rotary_emb\.inv_freq$"),
)
