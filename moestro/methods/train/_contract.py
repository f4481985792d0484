"""What a training method is, and what every one of them keeps true.

`KEEPS` names the invariants by entry; `moestro.testing.contracts` checks each of them on every method of the stage the
moment its file exists.
"""

from typing import Any, Final, Protocol

from torch import Tensor, nn

from moestro.core.context import LossTerm
from moestro.core.site import Shared, Site


class Build(Protocol):
    """`build(site, config, shared)`: the module that stands at the site afterwards.

    A `Router` replaces the router of the mixture there, a `RoutingLoss` joins its losses, any other module takes the
    whole site and returns what the stock module did.
    """

    def __call__(self, site: Site, config: Any, shared: Shared) -> nn.Module: ...


class Objective(Protocol):
    """`objective(model, batch, teachers[, config])`: the losses of one batch by name, together with gradient.

    A `LossTerm` is a sum over its unit and exact under accumulation; a plain scalar counts as a mean over rows.
    """

    def __call__(
        self, model: nn.Module, batch: dict[str, Tensor], teachers: dict[str, nn.Module], config: Any
    ) -> dict[str, Tensor | LossTerm]: ...  # fmt: skip


KEEPS: Final[dict[str, dict[str, str]]] = {
    "build": {
        "settings_round_trip": "settings survive JSON, and an unknown key is refused by name",
        "tokens_conserved": "an assignment names a token and a choice that exist; no token has a choice twice",
        "finite": "outputs, weights and gradients are finite, for one token too",
        "gradients_arrive": "every trainable parameter gets a gradient, not all zero; of a hard router none does",
        "repeatable": "the same input, seed and weights give the same bits",
        "padding_is_nothing": "padding changes neither the routing, the output nor the loss of real tokens",
        "rows_are_apart": "a sequence is routed alike alone and in a batch",
        "no_look_ahead": "later tokens do not change earlier ones, unless the card says causal=False",
        "state_is_complete": "a state dict loaded into a fresh module gives the same outputs",
        "logits_are_float32": "raw logits stay float32 when the model is not",
        "replay_is_exact": "activation checkpointing gives the same gradients",
        "after_step_moves_buffers": "after_step leaves trainable parameters alone",
        "costs_are_counted": "operations and bytes are counted as they are when it runs, within 1 %",
        "sums_over_units": "a loss is a sum over its units: two sequences cost what they cost one by one",
    },
    "objective": {
        "settings_round_trip": "settings survive JSON, and an unknown key is refused by name",
        "finite": "losses are finite",
        "gradients_arrive": "every trainable parameter of the model gets a gradient, and some of it is not zero",
        "teachers_stand_still": "a teacher is neither changed nor given gradients",
        "sums_over_rows": "a batch costs what its rows cost one by one",
        "repeatable": "the same batch and weights give the same bits",
    },
}
