"""FactorLLM: a dense feed-forward cut into E slices, of which a hard router runs K; no weight is changed.

With the inner units partitioned into sets I_1 .. I_E of H / E units each,

    E_e(x) = down[:, I_e] act(gate[I_e] x, up[I_e] x)        FFN(x) = sum_e E_e(x)
    y      = (E / K) sum over the K chosen of E_e(x)         chosen: the K largest of x W^T + b

The slices keep the bits of the dense rows and columns; the factor E / K stands in the router (a saved buffer), not in
the weights, so that a fitted scale can take its place. A bias of down is no slice's own: each carries 1 / E of it, and
E / K times K of those are the whole, once. With K = E the factor is 1 and the model is the dense model.

A fresh router knows nothing, and no loss of the model's output reaches it, since its gate is 0 or 1.
``train.prior_approximate`` trains it against the dense model, layer by layer (``fit_routers``) or within a run
(``objective``).

Source: FactorLLM (2408.11855) and its released code.
"""

from pydantic import Field, model_validator

from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.errors import ConfigError
from moestro.core.inputs import LayerShape, PlanInputs
from moestro.core.plan import ExpertPlan, ExpertSource, LayerExperts
from moestro.methods.convert._parts.layers import Layers, choose, mixture
from moestro.methods.convert._parts.slices import READS_MODEL, Partition, slices, statistics_of


class Config(BaseConfig):
    """Settings.

    Attributes:
        layers: which dense layers: all, first:N, last:N, every:N or a list.
        num_experts: E, slices of equal width. top_k: K, slices that a token runs through.
        partition: which inner units go together: neighbours (as the released code has it), drawn at random (as the
            paper says), or clusters of equal size of the units' weights or of their activations on calibration data.
    """

    layers: Layers = "all"
    num_experts: int = Field(default=4, ge=1)
    top_k: int = Field(default=2, ge=1)
    partition: Partition = "random"

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if self.top_k > self.num_experts:
            raise ConfigError(f"top_k={self.top_k}, but num_experts={self.num_experts}; a slice runs once a token")
        return self


def statistics(config: Config) -> tuple[str, ...]:
    """What must be measured: per layer a matrix [I, I]."""
    return statistics_of(config.partition)


def cut(inputs: PlanInputs, there: LayerShape, config: Config) -> LayerExperts:
    """One dense layer as slices of itself under a hard router."""
    parts = slices(inputs, there, config.num_experts, config.partition, "factorllm")
    share = 1.0 / config.num_experts
    router = {"method": "train.prior_approximate", "config": {"top_k": config.top_k}}
    return LayerExperts(
        layer=there.layer,
        experts=[[ExpertSource(layer=there.layer, rows=rows, scale_bias=share)] for rows in parts],
        router="new",
        module=mixture(there, config.num_experts, there.inner // config.num_experts, router, {}, 0),
    )


def plan(inputs: PlanInputs, config: Config) -> ExpertPlan:
    """Slices and a hard router for every chosen layer.

    Raises:
        PlanError: no such layers, a width that E does not divide, a statistic that was not measured.
    """
    return ExpertPlan(
        method="convert.factorllm",
        config=config.model_dump(mode="json"),
        seed=inputs.seed,
        model_hash=inputs.subject.fingerprint() if config.partition in READS_MODEL else None,
        layers=[cut(inputs, there, config) for there in choose(inputs.shape, config.layers, dense=True)],
        notes={"keeps": "all_on", "all_on_weight": 1.0},
    )


CARD = MethodCard(
    title="FactorLLM: Factorizing Knowledge via Mixture of Experts for Large Language Models",
    year=2024,
    arxiv="2408.11855",
    paper="factorllm",
    summary="The dense feed-forward in slices with untouched weights; a hard router runs K of E, times E / K.",
    taxonomy="scheme/dense-to-sparse",
    needs=("model",),
    deviations=(
        "the factor is E / K; the released code divides integers, which is wrong where K does not divide E",
        "only the chosen slices are computed; the released code computes all of them and masks",
        "the default partition is random, as the paper says; the released code cuts neighbours",
    ),
)
