"""Sparse upcycling: a dense model becomes a mixture whose experts are copies of its feed-forward.

Each chosen layer's FFN is copied E times under a new router. With weights that sum to 1 for each token the model
answers as before: sum_i w_i FFN(x) = FFN(x), whatever the router says. Copies can be made to differ:

    noise:   W_i = W + noise * std(W) * n,  n ~ N(0, 1), for each expert and matrix
    redraw:  drop-upcycling. For each expert a set S of floor(r I) inner units is drawn; the rows S of gate and up and
             the columns S of down are drawn anew from N(mean, std) of the entries they replace, matrix by matrix.

With ``shared`` = a > 0 one more copy serves every token: y = a FFN(x) + sum_i w_i (1 - a) FFN_i(x).

Sources: sparse upcycling (2212.05055); drop-upcycling (2502.19261, section 3).
"""

from pydantic import Field, model_validator

from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.errors import ConfigError
from moestro.core.inputs import LayerShape, PlanInputs
from moestro.core.plan import ExpertPlan, ExpertSource, LayerExperts, MethodUse
from moestro.methods.convert._parts.layers import Layers, choose, mixture, router_use


class Config(BaseConfig):
    """Settings.

    Attributes:
        layers: which dense layers: all, first:N, last:N, every:N or a list.
        num_experts: E, copies in each new mixture. top_k: choices a token.
        router: a router method. losses: name -> loss method.
        noise: standard deviation of the noise, relative to each matrix's. redraw: r, share of inner units drawn anew.
        shared: a, the part of the output that a copy for every token carries; 0 makes no such copy.
    """

    layers: Layers = "all"
    num_experts: int = Field(default=8, ge=1)
    top_k: int = Field(default=2, ge=1)
    router: MethodUse = MethodUse(method="train.softmax_topk", config={"renormalise": True})
    losses: dict[str, MethodUse] = Field(default_factory=dict)
    noise: float = Field(default=0.0, ge=0)
    redraw: float = Field(default=0.0, ge=0, le=1)
    shared: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if self.top_k > self.num_experts:
            raise ConfigError(f"top_k={self.top_k} but num_experts={self.num_experts}")
        router_use(self.router, self.top_k)
        return self


def copies(there: LayerShape, config: Config) -> LayerExperts:
    """One dense layer as E copies of itself."""
    part = 1.0 - config.shared
    copy = ExpertSource(layer=there.layer, noise=config.noise, redraw=config.redraw, scale_down=part, scale_bias=part)
    always = ExpertSource(layer=there.layer, scale_down=config.shared, scale_bias=config.shared)
    width = there.inner if config.shared else 0
    router = router_use(config.router, config.top_k)
    return LayerExperts(
        layer=there.layer,
        experts=[[copy]] * config.num_experts,
        router="new",
        module=mixture(there, config.num_experts, there.inner, router, config.losses, width),
        shared=[always] if config.shared else None,
    )


def plan(inputs: PlanInputs, config: Config) -> ExpertPlan:
    """Copies for every chosen layer; needs the model's shape only.

    Raises:
        PlanError: no such layers, or one that is a mixture already.
    """
    return ExpertPlan(
        method="convert.upcycle",
        config=config.model_dump(mode="json"),
        seed=inputs.seed,
        layers=[copies(there, config) for there in choose(inputs.shape, config.layers, dense=True)],
        notes={
            "keeps": "nothing" if config.noise or config.redraw else "all_on",
            "all_on_weight": 1.0 / config.num_experts,
        },
    )


CARD = MethodCard(
    title="Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints",
    year=2022,
    arxiv="2212.05055",
    summary="Copies of the dense feed-forward under a new router; noise or drop-upcycling to tell them apart.",
    taxonomy="scheme/dense-to-sparse",
    needs=("model",),
)
