"""Qwen2: a dense decoder."""

from moestro.models.families._tables import decoder, gated_ffn
from moestro.models.spec import FamilySpec


SPEC = FamilySpec(model_types=("qwen2",), stacks=(decoder("Qwen2Model"),), ffn=gated_ffn())
