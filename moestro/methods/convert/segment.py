"""Fine-grained experts: every expert of a mixture cut into m thinner ones, m times as many chosen.

Expert e becomes m slices of I/m inner units with its router row, so their logits tie and all m are chosen with it. What
a token gets stays what it was once the slices' down projections carry a factor:

    softmax over all, or renormalised weights: a slice weighs w_e / m, so the factor is m
    weights that do not share a sum (sigmoid scores that are not renormalised): a slice weighs w_e, the factor is 1

Training then tells the slices apart: more combinations at equal total and active parameters.

Source: DeepSeekMoE (2401.06066, section 3.1), as a conversion instead of a start from scratch.
"""

from typing import Literal

from pydantic import Field

from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.inputs import PlanInputs
from moestro.core.plan import ExpertPlan
from moestro.methods.convert._parts.layers import Layers, choose
from moestro.surgery.plans import segment


class Config(BaseConfig):
    """Settings.

    Attributes:
        layers: which mixtures: all, first:N, last:N, every:N or a list. segments: m, slices of every expert.
        weights: whether the chosen weights of a token share a sum (softmax, renormalised) or stand each for itself.
    """

    layers: Layers = "all"
    segments: int = Field(default=2, ge=1)
    weights: Literal["shared_sum", "independent"] = "shared_sum"


def plan(inputs: PlanInputs, config: Config) -> ExpertPlan:
    """Slices of every expert of the chosen layers; needs the model's shape only.

    Raises:
        PlanError: no mixtures, a width that m does not divide, a router without a fixed top-k.
    """
    layers = [there.layer for there in choose(inputs.shape, config.layers, dense=False)]
    return segment(
        inputs.shape,
        config.segments,
        layers,
        method="convert.segment",
        scale_down=float(config.segments) if config.weights == "shared_sum" else 1.0,
        config=config.model_dump(mode="json"),
        seed=inputs.seed,
        notes={"keeps": "as_routed"},
    )


CARD = MethodCard(
    title="DeepSeekMoE: Towards Ultimate Expert Specialization in Mixture-of-Experts Language Models",
    year=2024,
    arxiv="2401.06066",
    paper="deepseekmoe",
    summary="Every expert cut into m thinner ones that start out chosen together.",
    taxonomy="experts/hyper-parameters/size",
    needs=("model",),
    deviations=(
        "cuts a trained mixture, where the paper trains fine-grained experts from scratch",
        "limits on groups by the sum of their two best experts see copies, so such a choice of groups may change",
    ),
)
