"""Expert-diversify: one trained feed-forward becomes E experts that differ from the start.

EvoMoE trains a single expert in every mixture's place, then makes E experts of it and lets a gate tell them apart. Copy
i of a matrix W is, with rate q and draws that depend on the layer, the copy and the plan's seed alone,

    spawn="mask":    W_i = W * M_i,   each entry of M_i is 0 with probability q, else 1; what stays is not rescaled
    spawn="noise":   W_i = W + q std(W) n,   n ~ N(0, 1)
    spawn="neuron":  floor(q I) inner units are cut off: their column of the down projection is 0

Every weight stays trainable, those that start at 0 too; a cut unit keeps its rows of gate and up, or no gradient would
ever reach it again. As the plan of a phase (``on_enter``) each copy takes its parent's moments along, zero where its
weights are; the router starts anew, without moments.

Source: EvoMoE (2112.14397), its section on the expert-diversify phase.
"""

from typing import Literal

from pydantic import Field, model_validator

from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.inputs import LayerShape, PlanInputs
from moestro.core.plan import ExpertPlan, ExpertSource, LayerExperts, MethodUse
from moestro.methods.convert._parts.layers import Layers, choose, mixture, router_use


class Config(BaseConfig):
    """Settings.

    Attributes:
        layers: which dense layers: all, first:N, last:N, every:N or a list.
        num_experts: E, copies in each new mixture.
        spawn: how copies are told apart. rate: q, the share masked or cut, or the noise relative to each matrix's.
        router: a router method. losses: name -> loss method.
        top_k: choices a token, for routers that choose a fixed number.
    """

    layers: Layers = "all"
    num_experts: int = Field(default=8, ge=1)
    spawn: Literal["mask", "noise", "neuron"] = "mask"
    rate: float = Field(default=0.1, ge=0, lt=1)
    router: MethodUse = MethodUse(method="train.evomoe", config={"stage": "hard", "progress": 1.0})
    top_k: int = Field(default=1, ge=1)
    losses: dict[str, MethodUse] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        router_use(self.router, self.top_k)
        return self


def spawned(there: LayerShape, config: Config) -> LayerExperts:
    """One dense layer as E copies of itself, each altered in its own way."""
    q = config.rate
    copy = ExpertSource(
        layer=there.layer,
        mask=q if config.spawn == "mask" else 0.0,
        noise=q if config.spawn == "noise" else 0.0,
        cut=q if config.spawn == "neuron" else 0.0,
    )
    router = router_use(config.router, config.top_k)
    return LayerExperts(
        layer=there.layer,
        experts=[[copy]] * config.num_experts,
        router="new",
        module=mixture(there, config.num_experts, there.inner, router, config.losses, 0),
    )


def plan(inputs: PlanInputs, config: Config) -> ExpertPlan:
    """Altered copies for every chosen layer; needs the model's shape only.

    Raises:
        PlanError: no such layers, or one that is a mixture already.
    """
    return ExpertPlan(
        method="convert.diversify",
        config=config.model_dump(mode="json"),
        seed=inputs.seed,
        layers=[spawned(there, config) for there in choose(inputs.shape, config.layers, dense=True)],
        notes={"keeps": "nothing" if config.rate else "all_on", "all_on_weight": 1.0 / config.num_experts},
    )


CARD = MethodCard(
    title="EvoMoE: An Evolutional Mixture-of-Experts Training Framework via Dense-To-Sparse Gate",
    year=2021,
    arxiv="2112.14397",
    paper="evomoe",
    summary="One trained feed-forward as experts that differ: masked weights, noise, or inner units cut off.",
    taxonomy="scheme/dense-to-sparse",
    needs=("model",),
    deviations=("no code was released for this phase: rate and kinds of difference are ours",),
)
