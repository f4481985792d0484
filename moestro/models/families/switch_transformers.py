"""Switch Transformers: an encoder-decoder with one expert a token and a capacity per sequence.

Transformers counts a sequence's tokens in order, padding included, and drops those that come after an
expert's ``expert_capacity``-th; the count starts anew with every forward, so a decoding step never drops.
"""

from typing import Any

from moestro.models.spec import AuxLoss, FamilySpec, FFNSpec, Get, Kind, Layout, MoESpec, Rule, StackSpec
from moestro.models.weights import Stack


def sites(ff: int, attentions: tuple[str, ...]) -> dict[Kind, tuple[str, ...]]:
    """The sites of one stack whose blocks keep the feed-forward at index ``ff``."""
    layer = "block.{layer}.layer."
    return {
        "mlp": (f"{layer}{ff}.mlp",),
        "attention": tuple(f"{layer}{i}.{name}" for i, name in enumerate(attentions)),
        "linear": (
            *(f"{layer}{i}.{name}.{p}" for i, name in enumerate(attentions) for p in "qkvo"),
            f"{layer}{ff}.mlp.wi",
            f"{layer}{ff}.mlp.wo",
        ),
        "norm": (*(f"{layer}{i}.layer_norm" for i in range(ff + 1)), "final_layer_norm"),
        "embedding": ("embed_tokens",),
        "block": ("block.{layer}",),
        "stack": ("",),
    }


def is_moe(get: Get, layer: int, stack: str) -> bool:
    """One layer in ``encoder_sparse_step`` or ``decoder_sparse_step``, the second of each group."""
    count = get("num_layers") if stack == "encoder" else get("num_decoder_layers", "num_layers")
    sparse = get(f"num_sparse_{stack}_layers", default=3)
    step = get(f"{stack}_sparse_step", default=count // sparse if sparse > 0 else count)
    return bool(step == 1 or (step > 0 and layer % step == 1))


def router_config(get: Get) -> dict[str, Any]:
    """One expert, its probability as weight."""
    return {
        "capacity": get("expert_capacity", default=64),
        "bias": get("router_bias", default=False),
    }


RULES = (
    Rule(target="router.weight", sources=("router.classifier.weight",), projections=("router",)),
    Rule(target="router.bias", sources=("router.classifier.bias",), projections=("router bias",)),
    Rule(
        target="bank.up_proj",
        sources=("experts.expert_{expert}.wi.weight",),
        chain=(Stack(),),
        projections=("wi",),
    ),
    Rule(
        target="bank.down_proj",
        sources=("experts.expert_{expert}.wo.weight",),
        chain=(Stack(),),
        projections=("wo",),
    ),
)

SPEC = FamilySpec(
    model_types=("switch_transformers",),
    stacks=(
        StackSpec(
            cls="SwitchTransformersStack",
            name="encoder",
            attribute="encoder",
            num_layers=("num_layers",),
            sites=sites(1, ("SelfAttention",)),
        ),
        StackSpec(
            cls="SwitchTransformersStack",
            name="decoder",
            attribute="decoder",
            num_layers=("num_decoder_layers", "num_layers"),
            sites=sites(2, ("SelfAttention", "EncDecAttention")),
        ),
    ),
    ffn=FFNSpec(gate=None, up="wi", down="wo", activation="dense_act_fn"),
    moe=MoESpec(
        block="SwitchTransformersSparseMLP",
        is_moe=is_moe,
        num_experts=("num_experts",),
        top_k=1,
        inner=("d_ff",),
        router="train.switch",
        router_config=router_config,
        router_keys={"capacity": "expert_capacity", "bias": "router_bias"},
        jitter="router_jitter_noise",
        layouts=(Layout(name="split", rules=RULES, stock=True),),
        activation="dense_act_fn",
        gated=False,
        losses=(
            AuxLoss(
                name="balance",
                method="train.balance_loss",
                coefficient=("router_aux_loss_coef",),
                config={"scope": "sequence", "layers": "together"},
            ),
            AuxLoss(name="z", method="train.z_loss", coefficient=("router_z_loss_coef",)),
        ),
    ),
    heads=("lm_head",),
    prefix="",
    attention="t5",
)
