"""OLMoE: softmax over all experts, weights renormalised only if the config says so; queries and keys
normalised.
"""

from moestro.models.families._tables import BALANCE, decoder, every_layer, gate_layouts, gated_ffn
from moestro.models.families.qwen2_moe import ROUTER_KEYS, router_config
from moestro.models.spec import FamilySpec, MoESpec


NORMS = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")

SPEC = FamilySpec(
    model_types=("olmoe",),
    stacks=(decoder("OlmoeModel", norms=NORMS, dense=False),),
    ffn=gated_ffn(),
    moe=MoESpec(
        block="OlmoeSparseMoeBlock",
        is_moe=every_layer,
        num_experts=("num_experts", "num_local_experts"),
        top_k=("num_experts_per_tok",),
        inner=("intermediate_size",),
        router="train.softmax_topk",
        router_config=router_config,
        router_keys=ROUTER_KEYS,
        layouts=gate_layouts(),
        losses=(BALANCE,),
    ),
    attention="gqa+qk_norm",
)
