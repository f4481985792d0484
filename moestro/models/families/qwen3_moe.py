"""Qwen3-MoE: fine-grained experts, none shared; queries and keys normalised per head."""

from moestro.models.families._tables import BALANCE, decoder, gate_layouts, gated_ffn, sparse_step
from moestro.models.families.qwen2_moe import ROUTER_KEYS, router_config
from moestro.models.spec import FamilySpec, MoESpec


NORMS = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")

SPEC = FamilySpec(
    model_types=("qwen3_moe",),
    stacks=(decoder("Qwen3MoeModel", norms=NORMS),),
    ffn=gated_ffn(),
    moe=MoESpec(
        block="Qwen3MoeSparseMoeBlock",
        is_moe=sparse_step,
        num_experts=("num_experts", "num_local_experts"),
        top_k=("num_experts_per_tok",),
        inner=("moe_intermediate_size",),
        router="train.softmax_topk",
        router_config=router_config,
        router_keys=ROUTER_KEYS,
        dense_layers="mlp_only_layers",
        layouts=gate_layouts(),
        losses=(BALANCE,),
    ),
    attention="gqa+qk_norm",
)
