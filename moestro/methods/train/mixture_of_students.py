"""Mixture-of-Students: a shallower mixture learns from a trained one, and from the text alone towards the end.

For a target token with the teacher's distribution p and the student's q, both softened by a temperature T:

    L = CE(q) + beta(step) T^2 KL(p_T || q_T),   p_T = softmax(teacher logits / T),   q_T = softmax(logits / T)

Both terms are means over target tokens; router losses are the model's own. Distillation is *staged*: a student of
little depth starts to underfit when it has to do justice to two targets, so beta becomes 0 after a part of the run
(about 0.7 of it in the paper). beta is a value of the phase, named ``distillation``; for a run of 400 steps:

    phases:
      - {name: distil, steps: 280, values: {distillation: 1.0}}
      - {name: alone, values: {distillation: 0.0}}

A run without such phases distils to its end. While beta is 0 the teacher does not run at all, so the gradient is that
of plain training and the step costs as much. The student keeps the teacher's widths and expert lists and has fewer
blocks (7/8 of them in the paper); it starts from scratch.

Source: DeepSpeed-MoE (2201.05596, section 4.2). Its script keeps distilling to the end (no staging), and gives the
stop as a step (400K) that is 0.7 of one of its runs and beyond the end of another: set the stage's steps by the length
of the run.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.context import LossTerm
from moestro.core.errors import ConfigError
from moestro.core.forward import logits_of
from moestro.core.session import current_session
from moestro.data.packing import IGNORE
from moestro.methods.train._parts.teachers import only


VALUE = "distillation"
"""Name of the value that scales distillation while a phase lasts."""


class Config(BaseConfig):
    """Settings.

    Attributes:
        temperature: T > 0. weight: beta where no phase sets the value ``distillation``.
    """

    temperature: float = Field(default=1.0, gt=0)
    weight: float = Field(default=1.0, ge=0)


def divergence(student_NV: Tensor, teacher_NV: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) at temperature T, summed over N tokens, in nats (float32).

    Args:
        student_NV, teacher_NV: logits [N, V].
    """
    log_q_NV = F.log_softmax(student_NV.float() / temperature, dim=-1)
    log_p_NV = F.log_softmax(teacher_NV.float() / temperature, dim=-1)
    return F.kl_div(log_q_NV, log_p_NV, reduction="sum", log_target=True) * temperature**2


def objective(
    model: nn.Module, batch: dict[str, Tensor], teachers: Mapping[str, nn.Module], config: Config
) -> dict[str, LossTerm]:
    """{causal, distillation}: sums over target tokens; distillation carries beta already.

    Args:
        model: the student. batch: of the objective ``causal``, labels [B, S] among them.
        teachers: exactly one, frozen; same vocabulary.

    Raises:
        ConfigError: no teacher or several, a negative beta, or logits of another width than the student's.
    """
    teacher = only(teachers)
    beta = float(current_session().values.get(VALUE, config.weight))
    if beta < 0:
        raise ConfigError(f"{VALUE}={beta:g}; the weight of the teacher must be >= 0")
    logits_BSV = logits_of(model, batch)
    labels_BS = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)
    live_BS = labels_BS != IGNORE
    student_NV = logits_BSV[live_BS]
    causal = F.cross_entropy(student_NV.float(), labels_BS[live_BS], reduction="sum")
    distillation = causal.new_zeros(())
    if beta > 0:
        with torch.no_grad():
            teacher_NV = logits_of(teacher, batch)[live_BS]
        if teacher_NV.shape != student_NV.shape:
            raise ConfigError(
                f"the teacher has {teacher_NV.shape[-1]} logits and the student {student_NV.shape[-1]}; a student "
                "learns from a teacher with its own vocabulary"
            )
        distillation = beta * divergence(student_NV, teacher_NV, config.temperature)
    return {"causal": LossTerm(causal, "token"), "distillation": LossTerm(distillation, "token")}


CARD = MethodCard(
    title="DeepSpeed-MoE: Advancing Mixture-of-Experts Inference and Training to Power Next-Generation AI Scale",
    year=2022,
    arxiv="2201.05596",
    paper="deepspeed-moe",
    summary="A shallower mixture distilled from a trained one, until a stage of the run is over.",
    taxonomy="inference/model/compression/distillation",
    deviations=("distillation stops where the recipe's phases say so; without phases it goes on to the end",),
)
