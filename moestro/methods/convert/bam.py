"""Branch-Attend-Mix: a seed model and its specialists become one model with the feed-forwards *and* attentions of all.

With u the input of a block's two branches, N models and FFN_i, MHA_i those of model i:

    attn = sum_j softmax(u W_a^T)_j MHA_j(u)       all j          (train.mixture_of_attention)
    ffn  = sum_{i in top-k} p_i FFN_i(u),          p = softmax(u W_f^T)
    y    = x + attn + ffn                          [T, D]

Model i gives expert i of both bit for bit. Embeddings, norms, the head, and with ``kv="shared"`` the key and value
projections are the mean over the models; both routers are new. With ``attention="mean"`` the attention is averaged as
well, which is Branch-Train-Mix.

The first gate is p of the softmax over all N, so the feed-forward branch starts scaled down to about k / N;
``ffn_gate_norm="topk_softmax"`` divides by the sum of the chosen, which for k = 1 leaves the router without gradient
from the language model.

Source: BAM (2408.08274, sections 2 and 3). It is for blocks whose two branches read one input (``cohere``). Others are
taken as they are, attention first, and the plan's notes say so.
"""

from typing import Any, Literal

from pydantic import Field, model_validator

from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.errors import ConfigError, MoestroError, PlanError
from moestro.core.inputs import LayerShape, PlanInputs, Subject
from moestro.core.plan import ExpertPlan, ExpertSource, LayerExperts, MethodUse, SiteParts, TensorSource
from moestro.methods.convert._parts.layers import choose, mixture
from moestro.methods.convert._parts.origin import related
from moestro.models.attention import attention_parts
from moestro.models.families import family


LOSSES = {"balance": MethodUse(method="train.balance_loss"), "z": MethodUse(method="train.z_loss")}
"""Of the feed-forward router; the paper weighs them without saying how, recipes take 1e-2 and 1e-3."""


class Config(BaseConfig):
    """Settings.

    Attributes:
        attention: ``experts``, or the ``mean`` of all (Branch-Train-Mix). kv: keys and values of each attention expert,
            or their mean for all. attn_top_k: attention gates that stay, None for all (soft routing).
        ffn_top_k: feed-forward experts a token uses. ffn_gate_norm: their gates are those of the softmax over all, or
            divided by the sum of the chosen. extra_experts: further copies of the first model's feed-forward.
        losses: name -> loss of the feed-forward router. router_std: of the attention router's first weights.
        check_origin: refuse models that did not grow out of one.
    """

    attention: Literal["experts", "mean"] = "experts"
    kv: Literal["expert", "shared"] = "expert"
    attn_top_k: int | None = Field(default=None, ge=1)
    ffn_top_k: int = Field(default=1, ge=1)
    ffn_gate_norm: Literal["full_softmax", "topk_softmax"] = "full_softmax"
    extra_experts: int = Field(default=0, ge=0)
    losses: dict[str, MethodUse] = Field(default_factory=lambda: dict(LOSSES))
    router_std: float = Field(default=0.02, ge=0)
    check_origin: bool = True

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if self.attention == "mean" and (self.kv != "expert" or self.attn_top_k is not None):
            raise ConfigError("attention='mean' has no attention experts; leave kv and attn_top_k out")
        return self


def _check(models: dict[str, Subject], layers: list[int], origin: bool) -> None:
    """Raise PlanError unless all models have the first one's dense layers and, with ``origin``, descend from it."""
    first = models["self"].shape
    for name, model in list(models.items())[1:]:
        for layer in layers:
            mine, theirs = first.layer(layer), model.shape.layer(layer)
            for what in ("num_experts", "dim", "out", "inner", "gated", "bias", "activation"):
                have, want = getattr(theirs, what), getattr(mine, what)
                if have != want:
                    raise PlanError(f"{name} layer {layer}: {what} is {have}, the first model has {want}")
            if origin and not related(models["self"].tensor(layer, None, "up"), model.tensor(layer, None, "up")):
                raise PlanError(
                    f"{name} layer {layer}: its up projection is unrelated to the first model's; means need models of "
                    "one seed (check_origin=false joins them all the same)"
                )


def _experts(there: LayerShape, models: dict[str, Subject], config: Config) -> LayerExperts:
    """The feed-forwards of all models, and further copies of the first."""
    names = [*models, *["self"] * config.extra_experts]
    softmax: dict[str, Any] = {"renormalise": config.ffn_gate_norm == "topk_softmax", "top_k": config.ffn_top_k}
    router = {"method": "train.softmax_topk", "config": softmax}
    return LayerExperts(
        layer=there.layer,
        experts=[[ExpertSource(donor=name, layer=there.layer)] for name in names],
        router="new",
        module=mixture(there, len(names), there.inner, router, config.losses, 0),
    )


def _attention(layer: int, models: dict[str, Subject], config: Config) -> SiteParts:
    """The attentions of all models; with shared keys and values the mean of theirs."""
    found: dict[str, list[list[TensorSource]]] = {}
    for name, path in attention_parts(models["self"].site(layer, "attention")).tensors().items():
        own = config.kv == "expert" or name.startswith(("query", "output"))
        weight = 1.0 if own else 1.0 / len(models)
        sources = [TensorSource(donor=donor, layer=layer, name=path, weight=weight) for donor in models]
        target = name if name.endswith("_bias") else f"{name}_proj"
        found[target] = [[source] for source in sources] if own else [sources]
    module = {"num_experts": len(models), "kv": config.kv, "top_k": config.attn_top_k, "router_std": config.router_std}
    return SiteParts(layer=layer, module=MethodUse(method="train.mixture_of_attention", config=module), tensors=found)


def plan(inputs: PlanInputs, config: Config) -> ExpertPlan:
    """What each layer is made of. One model alone stays as it is: the plan is then empty.

    Raises:
        PlanError: models of other shapes, mixtures, models of another seed, other attention parts, or more choices
            than experts.
    """
    models: dict[str, Subject] = {"self": inputs.subject, **inputs.donors}
    common: dict[str, Any] = {
        "method": "convert.bam",
        "config": config.model_dump(mode="json"),
        "seed": inputs.seed,
    }
    notes: dict[str, Any] = {"keeps": "nothing", "models": list(models)}
    if len(models) == 1:
        return ExpertPlan(layers=[], notes={**notes, "one_model": "nothing to mix"}, **common)
    chosen = choose(inputs.shape, "all", dense=True)
    layers = [there.layer for there in chosen]
    count = len(models) + config.extra_experts
    if config.ffn_top_k > count or (config.attn_top_k or 1) > len(models):
        raise PlanError(
            f"ffn_top_k={config.ffn_top_k} of {count} experts and attn_top_k={config.attn_top_k} of {len(models)}; "
            "choose at most as many"
        )
    _check(models, layers, config.check_origin)
    sites: list[SiteParts] = []
    if config.attention == "experts":
        try:
            sites = [_attention(layer, models, config) for layer in layers]
        except PlanError:
            raise
        except MoestroError as error:
            raise PlanError(str(error)) from None
    there = inputs.subject.site(layers[0], "attention")
    parallel = there.family is not None and family(there.family).parallel
    notes |= {"parallel_block": parallel, "kv_caches": len(models) if sites and config.kv == "expert" else 1}
    if not parallel:
        notes["deviation"] = f"{there.family} runs its feed-forward after its attention, the paper beside it"
    entries = [_experts(there, models, config) for there in chosen]
    return ExpertPlan(layers=entries, sites=sites, rest="mean", notes=notes, **common)


CARD = MethodCard(
    title="BAM! Just Like That: Simple and Efficient Parameter Upcycling for Mixture of Experts",
    year=2024,
    arxiv="2408.08274",
    paper="bam",
    summary="A seed and its specialists become experts, feed-forwards and attentions alike; or BTX without the latter.",
    taxonomy="scheme/expert-model-merging",
    needs=("models",),
    deviations=(
        "sequential blocks are taken as they are; the paper's are parallel",
        "both routers read the block's input after its norm, with first weights of deviation 0.02",
    ),
)
