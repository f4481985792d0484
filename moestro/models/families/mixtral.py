"""Mixtral: softmax over all experts, the chosen weights renormalised; every layer a mixture."""

from typing import Any

from moestro.models.families._tables import (
    BALANCE,
    decoder,
    every_layer,
    gated_ffn,
    split_rules,
    stacked_rules,
)
from moestro.models.spec import FamilySpec, Get, Layout, MoESpec


def router_config(get: Get) -> dict[str, Any]:
    """The renormalisation is not optional in Mixtral."""
    return {
        "top_k": get("num_experts_per_tok"),
        "renormalise": True,
    }


SPEC = FamilySpec(
    model_types=("mixtral",),
    stacks=(decoder("MixtralModel", dense=False),),
    ffn=gated_ffn(),
    moe=MoESpec(
        block="MixtralSparseMoeBlock",
        is_moe=every_layer,
        num_experts=("num_local_experts", "num_experts"),
        top_k=("num_experts_per_tok",),
        inner=("intermediate_size",),
        router="train.softmax_topk",
        router_config=router_config,
        router_keys={"top_k": "num_experts_per_tok"},
        jitter="router_jitter_noise",
        layouts=(
            Layout(name="split", rules=split_rules("w1", "w3", "w2"), block="layers.{layer}.block_sparse_moe"),
            Layout(name="stacked", rules=stacked_rules(), stock=True),
        ),
        losses=(BALANCE,),
    ),
)
