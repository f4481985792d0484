"""Cohere: a dense decoder whose attention and feed-forward read the same normalised input and are added."""

from moestro.models.families._tables import decoder, gated_ffn
from moestro.models.spec import FamilySpec


SPEC = FamilySpec(
    model_types=("cohere",),
    stacks=(decoder("CohereModel", norms=("input_layernorm",)),),
    ffn=gated_ffn(),
    parallel=True,
)
