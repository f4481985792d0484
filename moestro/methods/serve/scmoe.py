"""Self-contrast: the experts that routing leaves idle help as a negative example, without training.

The model runs twice over the same text: with its own routing (strong, logits z_s [V]) and with a worse one (weak, z_w
[V]), by default only the expert ranked second in every layer. With alpha in (0, 1] and beta >= 0

    V_valid = { i : z_s[i] >= log(alpha) + max_j z_s[j] }
    z[i] = (1 + beta) z_s[i] - beta z_w[i]   for i in V_valid, else -inf

and the next token is chosen from z: by its maximum, or by softmax(z). Logits are contrasted, not log-probabilities: the
two differ by a constant a step, which changes neither the maximum nor the softmax. Each pass has keys and values of its
own, so memory for them doubles; a token costs k + 1 experts instead of k where the weak routing takes one. Ranks count
from 1. Shared experts stay on in both passes. The end of a text may be chosen like any other token.

Source: Shi et al. 2024, arXiv 2405.14507, section 2.2, equations 3 to 5.

Deviations: a chosen expert's weight follows the model's own rule (``weak_weight="model"``), where the paper's equation
says 1; models that renormalise agree. Temperature, top-p and top-k of a request act on z afterwards.
"""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import field_validator

from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.decoding import Decoder, Route


Floats = npt.NDArray[np.float32]


class Config(BaseConfig):
    """Settings.

    Attributes:
        weak: the weak routing: ``rank:2``, ``topk:1``, ``threshold:0.4`` or ``random``.
        strong: the strong one, in the same words; None is the model's own.
        beta: how hard to push away, 0 to 10; above 1 rare tokens of V_valid come up.
        alpha: tokens less likely than this share of the likeliest are closed.
        weak_weight: what a weak expert weighs: by the model's rule, or 1.
        strong_temperature, weak_temperature: divide z_s and z_w first.
        stats: sum up KL(strong || weak) as well, which costs a pass over the vocabulary.
    """

    weak: str = "rank:2"
    strong: str | None = None
    beta: float = 0.5
    alpha: float = 0.1
    weak_weight: Literal["model", "one"] = "model"
    strong_temperature: float = 1.0
    weak_temperature: float = 1.0
    stats: bool = False

    @field_validator("beta")
    @classmethod
    def _beta(cls, value: float) -> float:
        if not 0 <= value <= 10:
            raise ValueError("beta is from 0 (the strong pass alone) to 10")
        return value

    @field_validator("alpha")
    @classmethod
    def _alpha(cls, value: float) -> float:
        if not 0 < value <= 1:
            raise ValueError("alpha is above 0 and at most 1")
        return value

    @field_validator("strong_temperature", "weak_temperature")
    @classmethod
    def _temperature(cls, value: float) -> float:
        if not 0.01 <= value <= 100:
            raise ValueError("a temperature is from 0.01 to 100")
        return value

    @field_validator("weak", "strong")
    @classmethod
    def _route(cls, value: str | None) -> str | None:
        if value is not None:
            Route.parse(value)
        return value


def contrast(strong: Floats, weak: Floats, alpha: float, beta: float) -> Floats:
    """z from z_s and z_w, float32 [..., V] each.

    Computed as z_s + beta (z_s - z_w) over tokens in V_valid, so that equal passes give z_s exactly. A token at minus
    infinity in either pass keeps the strong value (it is closed there already, or the weak pass knows nothing of it).
    """
    valid = strong >= strong.max(axis=-1, keepdims=True) + np.float32(np.log(alpha))
    with np.errstate(invalid="ignore"):
        gap = strong - weak
    moved = strong + np.float32(beta) * np.where(np.isfinite(gap), gap, np.float32(0))
    found: Floats = np.where(valid, moved, np.float32(-np.inf)).astype(np.float32)
    return found


def divergence(strong: Floats, weak: Floats) -> npt.NDArray[np.float64]:
    """KL(softmax z_s || softmax z_w) in nats, [...]: large where the passes disagree. What z_s closes adds nothing."""
    log_s, log_w = _log_softmax(strong), _log_softmax(weak)
    share = np.exp(log_s)
    with np.errstate(invalid="ignore"):
        found: npt.NDArray[np.float64] = np.where(share > 0, share * (log_s - log_w), 0.0).sum(axis=-1)
    return found


def _log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    found: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return found


class SelfContrast:
    """See Decoder; also counts what the contrast did.

    Attributes:
        steps: positions joined. changed: of them, where the likeliest token became another.
        valid: sizes of V_valid, summed. kl: KL(strong || weak) in nats, summed.
    """

    name = "serve.scmoe"
    exact = False

    def __init__(self, config: Config) -> None:
        self.config = config
        strong = None if config.strong is None else Route.parse(config.strong)
        self.routes: tuple[Route | None, ...] = (strong, Route.parse(config.weak, config.weak_weight))
        self.steps = self.changed = self.valid = 0
        self.kl = 0.0

    def combine(self, logits: Any) -> Floats:
        """See Decoder."""
        strong = logits[0] / np.float32(self.config.strong_temperature)
        weak = logits[1] / np.float32(self.config.weak_temperature)
        found = contrast(strong, weak, self.config.alpha, self.config.beta)
        self.steps += 1
        self.changed += int(found.argmax() != strong.argmax())
        self.valid += int(np.isfinite(found).sum())
        if self.config.stats:
            self.kl += float(divergence(strong, weak))
        return found


def policy(config: Config, plan: Any = None) -> Decoder:
    """The decoder."""
    return SelfContrast(config)


CARD = MethodCard(
    title="Unchosen Experts Can Contribute Too: Unleashing MoE Models' Power by Self-Contrast",
    year=2024,
    arxiv="2405.14507",
    paper="scmoe",
    summary="Push the next token away from what a weaker routing of the same model would say.",
    taxonomy="gating/sparse/token-choice/self-contrast",
    deviations=(
        "A weak expert weighs what the model's own rule makes of it; weak_weight=one gives the paper's equation.",
    ),
)
