"""gpt-oss: softmax over the chosen logits, biases everywhere, a clamped SwiGLU, attention sinks.

On disk the expert matrices are transposed and gate and up rows alternate; in memory they are as everywhere
else.
"""

from typing import Any

from moestro.core.errors import FamilyError
from moestro.models.families._tables import BALANCE, decoder, every_layer, gated_ffn
from moestro.models.spec import FamilySpec, Get, Layout, MoESpec, Rule
from moestro.models.weights import Interleave, Transpose


def router_config(get: Get) -> dict[str, Any]:
    """Top-k first, softmax over what is left."""
    alpha, limit = get("swiglu_alpha", default=1.702), get("swiglu_limit", default=7.0)
    if (alpha, limit) != (1.702, 7.0):
        raise FamilyError(
            f"gpt_oss experts with swiglu_alpha={alpha}, swiglu_limit={limit}: only 1.702 and 7.0 are known"
        )
    return {"top_k": get("num_experts_per_tok"), "softmax": "chosen", "bias": True}


RULES = (
    Rule(target="router.weight", sources=("router.weight",), projections=("router",)),
    Rule(target="router.bias", sources=("router.bias",), projections=("router bias",)),
    Rule(
        target="bank.gate_up_proj",
        sources=("experts.gate_up_proj",),
        chain=(Transpose(), Interleave(dim=2)),
        projections=("gate_up_proj",),
    ),
    Rule(
        target="bank.gate_up_proj_bias",
        sources=("experts.gate_up_proj_bias",),
        chain=(Interleave(dim=1),),
        projections=("gate_up_proj_bias",),
    ),
    Rule(
        target="bank.down_proj",
        sources=("experts.down_proj",),
        chain=(Transpose(),),
        projections=("down_proj",),
    ),
    Rule(target="bank.down_proj_bias", sources=("experts.down_proj_bias",), projections=("down_proj_bias",)),
)

SPEC = FamilySpec(
    model_types=("gpt_oss",),
    stacks=(decoder("GptOssModel", dense=False),),
    ffn=gated_ffn(),
    moe=MoESpec(
        block="GptOssMLP",
        is_moe=every_layer,
        num_experts=("num_local_experts", "num_experts"),
        top_k=("num_experts_per_tok",),
        inner=("intermediate_size",),
        router="train.softmax_topk",
        router_config=router_config,
        router_keys={"top_k": "num_experts_per_tok"},
        layouts=(Layout(name="stacked", rules=RULES, stock=True),),
        activation="=swiglu_oss",
        bias=True,
        returns_tuple=True,
        losses=(BALANCE,),
    ),
    attention="gqa+sinks",
)
