"""Cut a dense feed-forward into E experts of equal width: a mixture with the dense model's very weights.

An FFN acts on each inner unit by itself, so for any partition of the I units into sets I_1 .. I_E

    FFN(x) = sum_e FFN_e(x),   FFN_e(x) = down[:, I_e] act(gate[I_e] x, up[I_e] x)

plus the bias of down, once. ``partition`` says who belongs together:

    contiguous    neighbours
    random        a random permutation
    weights       balanced k-means of the rows of gate and up, side by side
    coactivation  balanced k-means of the units' activations on calibration data, from their Gram matrix
                  sum_t a_ti a_tj (a: absolute inner activation, scaled so that each unit has norm 1)

Scale. Where a token's weights sum to 1 (``weights="sum_to_one"``) the down projections carry a factor E, so that all
slices on at 1/E each give the dense output, and K of E give E/K times the sum of the chosen. Where every chosen slice
weighs 1 (``weights="one"``) there is no factor. The bias of down is not multiplied: it stands whole in every expert in
the first case, as 1/K of it in the second. ``shared`` slices go to a branch that every token uses; the factor is then
the number of routed slices, and the branch carries the bias.

With ``top_k`` = E the router starts at zero, so that all weights are equal and the mixture is the dense model.

Sources: MoEfication (2110.01786, section 3.1: balanced k-means, co-activation), LLaMA-MoE (2406.16554, section 3.1:
random cut, scale), FactorLLM (2408.11855).
"""

from typing import Literal

from pydantic import Field, model_validator

from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.errors import ConfigError
from moestro.core.inputs import LayerShape, PlanInputs
from moestro.core.plan import ExpertPlan, ExpertSource, LayerExperts, MethodUse
from moestro.methods.convert._parts.layers import Layers, choose, mixture, router_use
from moestro.methods.convert._parts.slices import READS_MODEL, Partition, slices, statistics_of


class Config(BaseConfig):
    """Settings.

    Attributes:
        layers: which dense layers: all, first:N, last:N, every:N or a list.
        num_experts: E, slices in all. shared: of these, how many every token uses. top_k: routed choices a token.
        partition: which inner units go together: neighbours, drawn at random, or clusters of equal size of the units'
            weights or of their activations on calibration data.
        weights: what the router's weights of a token come to: their sum is 1, or each of them is.
        router: a router method. losses: name -> loss method.
        router_rows: how the router starts; None means zero if all slices are on, else drawn.
    """

    layers: Layers = "all"
    num_experts: int = Field(default=8, ge=1)
    top_k: int = Field(default=2, ge=1)
    shared: int = Field(default=0, ge=0)
    partition: Partition = "random"
    weights: Literal["sum_to_one", "one"] = "sum_to_one"
    router: MethodUse = MethodUse(method="train.softmax_topk", config={"renormalise": True})
    router_rows: Literal["new", "zero"] | None = None
    losses: dict[str, MethodUse] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if self.top_k > self.routed:
            raise ConfigError(
                f"top_k={self.top_k}, but num_experts={self.num_experts} less shared={self.shared} leaves {self.routed}"
            )
        router_use(self.router, self.top_k)
        return self

    @property
    def routed(self) -> int:
        """Slices the router chooses among."""
        return self.num_experts - self.shared


def statistics(config: Config) -> tuple[str, ...]:
    """What must be measured: per layer a matrix [I, I]."""
    return statistics_of(config.partition)


def cut(inputs: PlanInputs, there: LayerShape, config: Config) -> LayerExperts:
    """One dense layer as slices of itself."""
    parts = slices(inputs, there, config.num_experts, config.partition, "split")
    sums = config.weights == "sum_to_one"
    scale_down = float(config.routed) if sums else 1.0
    scale_bias = 0.0 if config.shared else 1.0 if sums else 1.0 / config.top_k
    experts = [
        [ExpertSource(layer=there.layer, rows=rows, scale_down=scale_down, scale_bias=scale_bias)]
        for rows in parts[config.shared :]
    ]
    always = [row for rows in parts[: config.shared] for row in rows]
    width = there.inner // config.num_experts
    router = router_use(config.router, config.top_k)
    rows_rule = config.router_rows or ("zero" if config.top_k == config.routed else "new")
    return LayerExperts(
        layer=there.layer,
        experts=experts,
        router=rows_rule,
        module=mixture(there, config.routed, width, router, config.losses, len(always)),
        shared=[ExpertSource(layer=there.layer, rows=always)] if always else None,
    )


def plan(inputs: PlanInputs, config: Config) -> ExpertPlan:
    """Slices for every chosen layer.

    Raises:
        PlanError: no such layers, a width that E does not divide, a statistic that was not measured.
    """
    layers = choose(inputs.shape, config.layers, dense=True)
    return ExpertPlan(
        method="convert.split",
        config=config.model_dump(mode="json"),
        seed=inputs.seed,
        model_hash=inputs.subject.fingerprint() if config.partition in READS_MODEL else None,
        layers=[cut(inputs, there, config) for there in layers],
        notes={"keeps": "all_on", "all_on_weight": 1.0 / config.routed if config.weights == "sum_to_one" else 1.0},
    )


CARD = MethodCard(
    title="MoEfication: Transformer Feed-forward Layers are Mixtures of Experts",
    year=2021,
    arxiv="2110.01786",
    summary="The dense feed-forward cut into equal slices: random, by weights, or by co-activation.",
    taxonomy="scheme/dense-to-sparse",
    needs=("model",),
    deviations=(
        "gated feed-forwards are cut too; their units are clustered by the rows of gate and up together",
        "co-activation is clustered by balanced k-means instead of graph partitioning",
    ),
)
