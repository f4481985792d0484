"""Llama: a dense decoder with grouped-query attention and a gated feed-forward (SmolLM2 is one too)."""

from moestro.models.families._tables import decoder, gated_ffn
from moestro.models.spec import FamilySpec


SPEC = FamilySpec(model_types=("llama",), stacks=(decoder("LlamaModel"),), ffn=gated_ffn())
