"""Read ahead what a later layer's own gate would choose from the present layer's input.

Residual streams change slowly from layer to layer. With x_l [R, D] the normalised input of the mixture in layer l and
g_m the gate of a later mixture m (weights W_m, biases and groups included), row r is expected to choose in layer m

    S_r = the ceil(factor k) highest of g_m(x_l)_r,   p_r = softmax(g_m(x_l)_r),   p_r,e >= least

and the experts of all rows are wished for in the order of

    p_e = 1 - prod over rows r with e in S_r of (1 - p_r,e)

the chance that any row needs e if rows chose one expert each. The next mixture has priority 1, the one behind it 2 and
so on up to ``ahead``. Nothing is trained and outputs do not change: what was foreseen wrongly costs bytes, what was not
foreseen is read when it is needed. The first mixture of a step is foreseen by nobody.

Source: Eliseev and Mazur 2023, arXiv 2312.17238, section 3.2 ("speculative expert loading").

Deviations: the gate is given the input of the present mixture, normalised as that layer's experts get it; many rows at
once; a threshold. For routers that rank sigmoids with a bias, p is the softmax of what they rank: an order, no
probability.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field

from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.forecast import Floats, Forecast, Ints, Peek, Wish


class Config(BaseConfig):
    """Settings.

    Attributes:
        ahead: mixtures behind the present one that are foreseen, at least 1.
        factor: experts wished for per row, as a multiple of what a row chooses; rounded up.
        least: smallest p_r,e that is worth a read.
    """

    ahead: int = Field(default=1, ge=1, le=64)
    factor: float = Field(default=1.0, gt=0, le=64)
    least: float = Field(default=0.0, ge=0, lt=1)


def likely(ranked: Floats, count: int, least: float) -> list[int]:
    """Ids of the experts that rows will probably need, the most probable first; equal ones by id.

    Args:
        ranked: float32 [R, E], what the gate ranks; minus infinity for closed experts. count: per row.
    """
    experts = ranked.shape[1]
    found: list[int]
    if len(ranked) == 1 and not least:  # decoding, where a few microseconds a layer count
        row = ranked[0]
        found = (-row).argsort(kind="stable")[:count].tolist()
        return found if row[found[-1]] != -np.inf else [expert for expert in found if row[expert] != -np.inf]
    high = ranked.max(axis=1, keepdims=True)
    share = np.exp((ranked - high).astype(np.float64))
    share /= share.sum(axis=1, keepdims=True)
    wished = ranked > -np.inf
    if count < experts:
        wished &= ranked >= np.partition(ranked, experts - count, axis=1)[:, experts - count, None]
    if least:
        wished &= share >= least
    # -log of the chance that no row needs an expert: tells small chances apart, and those near 1.
    with np.errstate(divide="ignore"):
        need = -np.log1p(-share, where=wished, out=np.zeros_like(share)).sum(axis=0)
    any_row = wished.any(axis=0)
    order = np.argsort(np.where(any_row, -need, np.inf), kind="stable")
    found = order[: np.count_nonzero(any_row)].tolist()
    return found


class NextGate(Forecast):
    """See Forecast."""

    name = "serve.next_gate"

    def __init__(self, config: Config) -> None:
        self.config = config
        self._behind: dict[int, tuple[int, ...]] = {}

    def meet(self, experts: Sequence[int]) -> None:
        """See Forecast."""
        mixtures = [layer for layer, count in enumerate(experts) if count]
        self._behind = {
            layer: tuple(mixtures[at + 1 : at + 1 + self.config.ahead]) for at, layer in enumerate(mixtures)
        }

    def routed(self, layer: int, ids: Ints, peek: Peek) -> list[Wish]:
        """See Forecast."""
        count = math.ceil(self.config.factor * ids.shape[1] - 1e-9)
        return [
            Wish(later, tuple(likely(peek(later), count, self.config.least)), priority)
            for priority, later in enumerate(self._behind[layer], start=1)
        ]


def forecast(config: Config, plan: Any = None) -> Forecast:
    """The forecast."""
    return NextGate(config)


CARD = MethodCard(
    title="Fast Inference of Mixture-of-Experts Language Models with Offloading",
    year=2023,
    arxiv="2312.17238",
    paper="survey-inference",
    summary="Reads ahead what the next layer's own gate would choose from this layer's input.",
    taxonomy="inference/system/offloading/prefetching",
    deviations=(
        "The gate is given the normalised input of the present mixture.",
        "Many rows at once, ordered by the chance that any of them needs an expert; a threshold.",
    ),
)
