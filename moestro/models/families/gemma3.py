"""Gemma 3, text: a dense decoder with four norms a layer, local and global attention, scaled embeddings."""

from moestro.models.families._tables import decoder, gated_ffn
from moestro.models.spec import FamilySpec


NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "self_attn.q_norm",
    "self_attn.k_norm",
)

SPEC = FamilySpec(
    model_types=("gemma3_text",),
    stacks=(decoder("Gemma3TextModel", norms=NORMS),),
    ffn=gated_ffn("hidden_activation"),
    attention="gqa+qk_norm",
)
