"""Experts read ahead because they are decided ahead: a pre-gated model's routing of the next blocks, as it is.

While block N runs, the experts that its input decided for block N + d are read. Nothing is guessed: each is needed, so
no byte is wasted, and the first d blocks, which decide for themselves, wait as without a forecast. With enough room
for the experts of d + 1 blocks, block N + d waits only for what reading takes longer than blocks N .. N + d - 1 run:

    on demand    t_n + a S / b + t_e              prefetch all    max(t_n + t_e, E S / b)
    pre-gated    max(t_n + t_e, a S / b)          resident        t_n + t_e

a block, with S bytes an expert, a of E active, a tier of b bytes/s, t_n for what is no expert and t_e for the experts.
For any other model it wishes for nothing.

Source: Pre-gated MoE (2308.12066, section 4; its figures 6 and 9).
"""

import numpy as np

from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.forecast import Forecast, Ints, Peek, Wish


class Config(BaseConfig):
    """No settings: how far ahead is the model's affair."""


class Decided(Forecast):
    """See the top of the file."""

    name = "serve.pre_gated"

    def settled(self, layer: int, ids: Ints) -> list[Wish]:
        """All experts of the rows, those of the most rows first, equal ones by id."""
        experts, rows = np.unique(ids[ids >= 0], return_counts=True)
        order = np.argsort(-rows, kind="stable")
        return [Wish(layer, tuple(int(expert) for expert in experts[order]))] if experts.size else []

    def routed(self, layer: int, ids: Ints, peek: Peek) -> list[Wish]:
        """Nothing that was not settled before."""
        return []


def forecast(config: Config, plan: object = None) -> Forecast:
    """What a pre-gated model has decided for its next blocks."""
    return Decided()


CARD = MethodCard(
    title="Pre-gated MoE: An Algorithm-System Co-Design for Fast and Scalable Mixture-of-Expert Inference",
    year=2023,
    arxiv="2308.12066",
    paper="pre-gated-moe",
    summary="Reads the experts that a pre-gated model has decided on for its next blocks, and no others.",
    taxonomy="inference/system/offloading/prefetching",
)
