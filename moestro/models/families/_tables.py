"""Tables that several families share."""

from collections.abc import Mapping

from moestro.models.spec import AuxLoss, FFNSpec, Get, Kind, Layout, Rule, StackSpec
from moestro.models.weights import Concat, Stack


def decoder(
    cls: str,
    *,
    mlp: str = "mlp",
    linear: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj"),
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm"),
    dense: bool = True,
) -> StackSpec:
    """The stack of a Llama-like decoder.

    Args:
        cls: class name of the stack.
        mlp: name of the feed-forward in a layer.
        linear: projections of the attention.
        norms: norms of a layer.
        dense: some layers have dense gate, up and down projections, which are linear sites.
    """
    layer = "layers.{layer}."
    ffn = tuple(f"{layer}{mlp}.{name}" for name in ("gate_proj", "up_proj", "down_proj")) if dense else ()
    sites: Mapping[Kind, tuple[str, ...]] = {
        "mlp": (layer + mlp,),
        "attention": (layer + "self_attn",),
        "linear": (*(f"{layer}self_attn.{name}" for name in linear), *ffn),
        "norm": (*(layer + name for name in norms), "norm"),
        "embedding": ("embed_tokens",),
        "block": ("layers.{layer}",),
        "stack": ("",),
    }
    return StackSpec(cls=cls, name="decoder", sites=sites)


def gated_ffn(activation: str = "hidden_act") -> FFNSpec:
    """The gated feed-forward of a Llama-like decoder."""
    return FFNSpec(gate="gate_proj", up="up_proj", down="down_proj", activation=activation)


def split_rules(gate: str, up: str, down: str, router: str = "gate.weight") -> tuple[Rule, ...]:
    """One matrix a projection and expert on disk (as the hub has them)."""
    names = (gate, up, down)
    g, u, d = (f"experts.{{expert}}.{name}.weight" for name in names)
    return (
        Rule(target="router.weight", sources=(router,), projections=("router",)),
        Rule(
            target="bank.gate_up_proj",
            sources=(g, u),
            chain=(Concat(2, dim=1), Stack()),
            projections=(gate, up),
        ),
        Rule(target="bank.down_proj", sources=(d,), chain=(Stack(),), projections=(down,)),
    )


def stacked_rules(
    router: str = "gate.weight", gate_up: str = "experts.gate_up_proj", down: str = "experts.down_proj"
) -> tuple[Rule, ...]:
    """The three-dimensional parameters of the Transformers modules."""
    return (
        Rule(target="router.weight", sources=(router,), projections=("router",)),
        Rule(target="bank.gate_up_proj", sources=(gate_up,), projections=("gate_up_proj",)),
        Rule(target="bank.down_proj", sources=(down,), projections=("down_proj",)),
    )


def gate_layouts(moves: tuple[tuple[str, str], ...] = (), extra: tuple[Rule, ...] = ()) -> tuple[Layout, ...]:
    """The two layouts of the families that share Qwen2-MoE's names, with further submodules and rules."""
    split = split_rules("gate_proj", "up_proj", "down_proj") + extra
    return (
        Layout(name="split", rules=split, moves=moves),
        Layout(name="stacked", rules=stacked_rules() + extra, moves=moves, stock=True),
    )


def every_layer(get: Get, layer: int, stack: str) -> bool:
    """All layers are mixtures."""
    return True


def sparse_step(get: Get, layer: int, stack: str) -> bool:
    """Qwen's rule: every ``decoder_sparse_step``-th layer but those of ``mlp_only_layers``."""
    if layer in get("mlp_only_layers", default=()):
        return False
    step = get("decoder_sparse_step", default=1)
    return bool(get("num_experts", "num_local_experts") > 0 and (layer + 1) % step == 0)


def after_first(get: Get, layer: int, stack: str) -> bool:
    """DeepSeek's rule: all layers from ``first_k_dense_replace`` on."""
    return bool(layer >= get("first_k_dense_replace", default=0))


BALANCE = AuxLoss(
    name="balance",
    method="train.balance_loss",
    coefficient=("router_aux_loss_coef",),
    config={"scaling": "transformers", "layers": "together"},
)
"""Transformers' ``load_balancing_loss_func``: E sum_e f_e P_e with f_e counted per token, all layers as one."""
