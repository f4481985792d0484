"""The balance loss of mixtures with null experts: the nulls count as one bucket, the experts one by one.

For n experts, m nulls, f_i the share of the tokens that chose i and P_i the mean router probability of i:

    loss = (n + m) * sum_i f~_i P_i,   f~_i = f_i for experts,  f~_i = mean of f over the nulls for every null

so that it does not matter which null a token takes, only how many. With even load the loss is k, and a token then uses
k n / (n + m) experts. ``null_bucket="separate"`` balances the nulls one by one, f~ = f: the control.

Computed as ``train.balance_loss`` with the nulls' probabilities averaged instead of their shares: f enters without
gradient and sum over nulls of mean(f) P_i = sum over nulls of f_i mean(P), so that value and gradient are the same.

Source: AdaMoE (2406.13233: the load-balancing loss with averaged null experts).
"""

from typing import Literal

import torch
from torch import Tensor, nn

from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.context import RoutingContext
from moestro.core.errors import ContextError
from moestro.core.losses import RoutingLoss
from moestro.core.registry import method
from moestro.core.routing import Routing
from moestro.core.site import Shared, Site


class Config(BaseConfig):
    """Settings.

    Attributes:
        null_bucket: nulls count by their mean, or each by itself.
        scope, scaling: of ``train.balance_loss``; "transformers" takes f over tokens as above, "slots" over the k
            choices of each, which makes the loss 1 at even load.
    """

    null_bucket: Literal["mean", "separate"] = "mean"
    scope: Literal["sequence", "batch", "global"] = "batch"
    scaling: Literal["slots", "transformers"] = "transformers"


def share_among_nulls(probability_TC: Tensor, num_experts: int) -> Tensor:
    """Probabilities [T, C] in which every null, column ``num_experts`` and on, has the mean of all nulls."""
    real_TE, null_TM = probability_TC[:, :num_experts], probability_TC[:, num_experts:]
    return torch.cat([real_TE, null_TM.mean(-1, keepdim=True).expand_as(null_TM)], -1)


class NullBalanceLoss(RoutingLoss):
    """The loss.

    Args:
        inner: a balance loss over all choices. null_bucket: see Config.
    """

    def __init__(self, inner: RoutingLoss, null_bucket: Literal["mean", "separate"]) -> None:
        super().__init__()
        self.inner = inner
        self.null_bucket = null_bucket
        self.unit = inner.unit

    def forward(self, site: str, routing: Routing, ctx: RoutingContext) -> Tensor:
        """See RoutingLoss.

        Raises:
            ContextError: the routing carries no scores.
        """
        if routing.scores is None:
            raise ContextError(f"{site}: a balance loss needs scores, this router gave none; take the loss out")
        if self.null_bucket == "mean" and routing.num_null:
            shared_TC = share_among_nulls(routing.scores.probabilities(), routing.num_experts)
            routing = routing.replace(scores=routing.scores.replace(prob_TC=shared_TC))
        total: Tensor = self.inner(site, routing, ctx)
        return total


def build(site: Site, config: Config, shared: Shared) -> nn.Module:
    """The loss, for a mixture's ``losses``."""
    plain = method("train.balance_loss")
    inner = plain.build(site, plain.configure({"scope": config.scope, "scaling": config.scaling}), shared)
    return NullBalanceLoss(inner, config.null_bucket)


CARD = MethodCard(
    title="AdaMoE: Token-Adaptive Routing with Null Experts for Mixture-of-Experts Language Models",
    year=2024,
    arxiv="2406.13233",
    paper="adamoe",
    summary="Balance loss that sees all null experts as one bucket, so that only their number is held.",
    taxonomy="losses/balance",
    deviations=("averages over the nulls as the paper says; its released code for Mixtral leaves the averaging out",),
)
