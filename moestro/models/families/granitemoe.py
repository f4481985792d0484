"""GraniteMoE: softmax over the chosen logits; residuals, embeddings and logits scaled by constants."""

from typing import Any

from moestro.models.families._tables import BALANCE, decoder, every_layer, gated_ffn, stacked_rules
from moestro.models.spec import FamilySpec, Get, Layout, MoESpec


def router_config(get: Get) -> dict[str, Any]:
    """Top-k first, softmax over what is left."""
    return {"top_k": get("num_experts_per_tok"), "softmax": "chosen"}


DISK = stacked_rules(router="router.layer.weight", gate_up="input_linear.weight", down="output_linear.weight")

SPEC = FamilySpec(
    model_types=("granitemoe",),
    stacks=(decoder("GraniteMoeModel", mlp="block_sparse_moe", dense=False),),
    ffn=gated_ffn(),
    moe=MoESpec(
        block="GraniteMoeMoE",
        is_moe=every_layer,
        num_experts=("num_local_experts", "num_experts"),
        top_k=("num_experts_per_tok",),
        inner=("intermediate_size",),
        router="train.softmax_topk",
        router_config=router_config,
        router_keys={"top_k": "num_experts_per_tok"},
        layouts=(
            Layout(name="linear", rules=DISK),
            Layout(name="stacked", rules=stacked_rules(router="router.weight"), stock=True),
        ),
        losses=(BALANCE,),
    ),
    attention="gqa+residual_scale",
)
