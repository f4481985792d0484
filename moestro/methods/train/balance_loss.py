"""The load-balancing loss, from raw logits and with padding left out.

For E choices (nulls included), f_i the share of assignments that went to i and P_i the mean router probability of i:

    loss = E * sum_i f_i P_i            1 when the load is uniform, E when top-1 collapses onto one expert

``scope`` says what f and P are means over:

    sequence  each sequence by itself, mean over sequences (DeepSeek's ``seq_aux``)
    batch     all tokens of one forward; depends on how a step is cut into micro-batches
    global    all tokens of the optimiser step: f over all its micro-batches and ranks, which the training loop counts
              beforehand; outside the loop f falls back to this forward's

``scaling="slots"`` takes f over the k * T assignments; ``"transformers"`` takes it over the T tokens, k times as much,
as Transformers' ``load_balancing_loss_func`` does. ``layers="together"`` concatenates the tokens of all layers before
taking means, as there; ``"each"`` gives every layer its own loss. Assignments that capacity dropped count.

Sources: GShard (2006.16668, section 2.2), Switch Transformers (2101.03961, eq. 4 to 6), DeepSeekMoE (2401.06066, eq. 12
to 14), global batch: 2501.11873.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.context import RoutingContext
from moestro.core.errors import ContextError
from moestro.core.layer import mixture_layers
from moestro.core.losses import RoutingLoss, balance, load_per_row
from moestro.core.routing import Routing
from moestro.core.site import Shared, Site


class Config(BaseConfig):
    """Settings; see the top of the file."""

    scope: Literal["sequence", "batch", "global"] = "batch"
    scaling: Literal["slots", "transformers"] = "slots"
    layers: Literal["each", "together"] = "each"


def fractions(load_XC: Tensor) -> Tensor:
    """Shares of the assignments along the last axis; zeros where there are none."""
    load_XC = load_XC.double()
    return load_XC / load_XC.sum(-1, keepdim=True).clamp(min=1)


class BalanceLoss(RoutingLoss):
    """The loss."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        units: dict[str, Literal["token", "sequence", "batch"]] = {
            "sequence": "sequence",
            "batch": "batch",
            "global": "token",
        }
        self.unit = units[config.scope]

    def forward(self, site: str, routing: Routing, ctx: RoutingContext) -> Tensor:
        """See RoutingLoss.

        Raises:
            ContextError: the routing carries no scores.
        """
        tokens, scores = ctx.tokens, routing.scores
        if scores is None or tokens is None:
            raise ContextError(f"{site}: a balance loss needs scores, this router gave none; take the loss out")
        row_T, rows = tokens.row_T, tokens.num_rows
        if self.config.scope != "sequence":
            row_T, rows = torch.zeros_like(row_T), 1
        valid_T = tokens.valid_T
        load_BC = load_per_row(routing, valid_T, row_T, rows)
        probability_TC = scores.probabilities().masked_fill(~valid_T[:, None], 0.0)
        mass_BC = probability_TC.new_zeros(load_BC.shape).index_add(0, row_T, probability_TC)
        count_B = torch.bincount(row_T[valid_T], minlength=rows)
        if self.config.scope == "global" and site in ctx.session.global_load:
            load_BC = ctx.session.global_load[site].to(load_BC).view(1, -1)
        if self.config.layers == "together":
            gathered = self._gather(site, ctx, load_BC, mass_BC, count_B)
            if gathered is None:
                return mass_BC.sum() * 0.0
            load_BC, mass_BC, count_B = gathered
        return self._total(load_BC, mass_BC, count_B, routing)

    def _total(self, load_BC: Tensor, mass_BC: Tensor, count_B: Tensor, routing: Routing) -> Tensor:
        """Sum over units of E * sum f P, from loads, sums of probabilities and numbers of tokens."""
        fraction_BC = fractions(load_BC).to(mass_BC)
        if self.config.scaling == "transformers":
            per_token = routing.top_k or load_BC.sum() / count_B.sum().clamp(min=1)
            fraction_BC = fraction_BC * per_token
        if self.config.scope == "global":
            return balance(fraction_BC, mass_BC).sum()
        mean_BC = mass_BC / count_B.clamp(min=1)[:, None]
        return balance(fraction_BC, mean_BC).sum()

    def _gather(
        self, site: str, ctx: RoutingContext, load_BC: Tensor, mass_BC: Tensor, count_B: Tensor
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Sums over all layers at the last one; None before it."""
        ctx.put(site, "balance_sums", (load_BC, mass_BC, count_B))
        owners = self._owners(ctx)
        if not owners or site != owners[-1]:
            return None if owners else (load_BC, mass_BC, count_B)
        earlier = [ctx.get(s, "balance_sums") for s in owners[:-1]]
        sums = [*(s for s in earlier if s is not None), (load_BC, mass_BC, count_B)]
        if len({s[0].shape for s in sums}) > 1:
            raise ContextError("layers have different numbers of experts; use layers='each' for the balance loss")
        load, mass, count = (torch.stack(parts).sum(0) for parts in zip(*sums, strict=True))
        if self.config.scope == "global":
            mass = mass / len(sums)  # tokens are counted once, whatever the number of layers
        return load, mass, count

    def _owners(self, ctx: RoutingContext) -> tuple[str, ...]:
        """Sites of the stack that carry such a loss over all layers; all sites where the stack is not known."""
        if ctx.module is None:
            return ctx.sites
        return tuple(
            layer.site
            for layer in mixture_layers(ctx.module).values()
            if any(isinstance(loss, BalanceLoss) and loss.config == self.config for loss in layer.losses.values())
        )


def build(site: Site, config: Config, shared: Shared) -> nn.Module:
    """The loss, for a mixture's ``losses``."""
    return BalanceLoss(config)


CARD = MethodCard(
    title="GShard: Scaling Giant Models with Conditional Computation and Automatic Sharding",
    year=2020,
    arxiv="2006.16668",
    summary="E * sum f P from raw logits, per sequence, forward or optimiser step, padding left out.",
    taxonomy="losses/balance",
)
