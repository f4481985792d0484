"""Qwen3: a dense decoder that normalises queries and keys per head."""

from moestro.models.families._tables import decoder, gated_ffn
from moestro.models.spec import FamilySpec


NORMS = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")

SPEC = FamilySpec(
    model_types=("qwen3",),
    stacks=(decoder("Qwen3Model", norms=NORMS),),
    ffn=gated_ffn(),
    attention="gqa+qk_norm",
)
