"""BERT: a dense encoder whose feed-forward is split over two modules (all-MiniLM is one too).

``intermediate`` holds the first matrix and the activation, ``output`` the second matrix, dropout, residual
and norm. A replacement stands at ``intermediate`` and the second matrix becomes an identity.
"""

from moestro.models.spec import FamilySpec, FFNSpec, StackSpec


LAYER = "encoder.layer.{layer}."

SPEC = FamilySpec(
    model_types=("bert",),
    stacks=(
        StackSpec(
            cls="BertModel",
            name="encoder",
            sites={
                "mlp": (LAYER + "intermediate",),
                "attention": (LAYER + "attention",),
                "linear": (
                    *(f"{LAYER}attention.self.{name}" for name in ("query", "key", "value")),
                    LAYER + "attention.output.dense",
                    LAYER + "intermediate.dense",
                    LAYER + "output.dense",
                ),
                "norm": (
                    "embeddings.LayerNorm",
                    LAYER + "attention.output.LayerNorm",
                    LAYER + "output.LayerNorm",
                ),
                "embedding": ("embeddings",),
                "block": ("encoder.layer.{layer}",),
                "stack": ("",),
            },
        ),
    ),
    ffn=FFNSpec(gate=None, up="dense", down="output.dense", split=True),
    heads=("cls", "classifier", "qa_outputs"),
    prefix="bert",
    attention="bert",
    renames=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
    ignored=(r"(^|\.)embeddings\.(position_ids|token_type_ids)$",),
)
