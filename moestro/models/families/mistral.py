"""Mistral: a dense decoder."""

from moestro.models.families._tables import decoder, gated_ffn
from moestro.models.spec import FamilySpec


SPEC = FamilySpec(model_types=("mistral",), stacks=(decoder("MistralModel"),), ffn=gated_ffn())
