"""Experts that compute for some of a token's choices and scale what those see for the others.

See ``compress.compressed_experts`` for the formula; here are the bank and what it costs.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moestro import ops
from moestro.core.bank import StackedFFN
from moestro.core.errors import ContextError
from moestro.core.routing import Routing


EPS = 1e-30  # of the sum of a token's auxiliary weights; below it nothing is said about their vectors
Inject = Literal["all", "input"]


def width(dim: int, inner: int, gated: bool, inject: Inject) -> int:
    """V, numbers in the vector of an expert."""
    return dim if inject == "input" else (2 if gated else 1) * dim + inner


def shares(weight_TA: Tensor) -> Tensor:
    """a [T, A] in float32: weights over their sum, 0 where it is no more than EPS."""
    weight_TA = weight_TA.float()
    total_T1 = weight_TA.sum(-1, keepdim=True)
    dead_T1 = ~(total_T1 > EPS)
    return (weight_TA / total_T1.masked_fill(dead_T1, 1.0)).masked_fill(dead_T1, 0.0)


class CompressedFFN(StackedFFN):
    """Equal experts with a vector each. ``deltas`` [E, V]: t1, t2 and, for gated experts, t3, less 1."""

    takes = "all"

    def __init__(self, like: StackedFFN, n_main: int, inject: Inject) -> None:
        super().__init__(like.num_experts, like.dim, like.inner, **like.form)
        self.n_main, self.inject = n_main, inject
        numbers = width(like.dim, like.inner, like.gated, inject)
        self.deltas = nn.Parameter(torch.zeros(like.num_experts, numbers))

    def theta(self, expert_TA: Tensor, weight_TA: Tensor) -> Tensor:
        """1 + weighted mean of the auxiliary experts' deltas, float32 [T, V]."""
        mean_TV = F.embedding_bag(
            expert_TA, self.deltas.float(), per_sample_weights=shares(weight_TA), mode="sum"
        )  # sums as it gathers: nothing of size T x A x V
        return 1.0 + mean_TV

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """See Bank. The first ``n_main`` choices of a token compute, the others scale.

        Raises:
            ContextError: a routing without ranks.
        """
        top_k, main = routing.top_k, self.n_main
        if top_k is None or top_k < main or routing.num_experts != self.num_experts:
            raise ContextError(
                f"compressed experts compute the first {main} of the ranked choices among {self.num_experts} experts; "
                f"got {'a ragged routing' if top_k is None else f'{top_k} choices'} among {routing.num_experts}"
            )
        live_TM = torch.ones_like(routing.expert_TK[:, :main], dtype=torch.bool)
        if routing.kept_N is not None:
            live_TM = routing.kept_N.view(-1, top_k)[:, :main]
        token_TM = routing.token_N.view(-1, top_k)[:, :main]
        expert_TM, weight_TM = routing.expert_TK[:, :main], routing.weight_TK[:, :main]
        real = Routing(token_TM[live_TM], expert_TM[live_TM], weight_TM[live_TM], routing.num_tokens, self.num_experts)
        learns = torch.is_grad_enabled() and self.deltas.requires_grad
        if top_k == main or not (learns or bool(self.deltas.any())):
            return super().forward(x_TD, real)
        return self.scaled(x_TD, real, self.theta(routing.expert_TK[:, main:], routing.weight_TK[:, main:]))

    def scaled(self, x_TD: Tensor, routing: Routing, theta_TV: Tensor) -> Tensor:
        """Weighted sum over the assignments of E_i(x; theta), [T, O]; rows are scaled, never weights."""
        weights = self.weights()
        kind, dim, inner = weights.up_EJD.dtype, self.dim, self.inner
        segments = ops.sort_rows(routing.expert_N, self.num_experts)
        token_N = routing.token_N[segments.order_N]

        def linear(first: int, up_EID: Tensor, bias_EI: Tensor | None) -> Tensor:
            x = (x_TD * theta_TV[:, first : first + dim]).to(kind)
            return ops.grouped_linear(x[token_N], up_EID, segments, bias_EI)

        if self.inject == "input" or not self.gated:
            pre_NJ = linear(0, weights.up_EJD, weights.up_bias_EJ)
        else:
            biases = (None, None) if weights.up_bias_EJ is None else torch.split(weights.up_bias_EJ, inner, -1)
            gate_EID, up_EID = torch.split(weights.up_EJD, inner, 1)
            pre_NJ = torch.cat([linear(0, gate_EID, biases[0]), linear(dim + inner, up_EID, biases[1])], -1)
        hidden_NI = ops.apply_activation(pre_NJ, self.activation, self.gated)
        if self.inject == "all":
            hidden_NI = hidden_NI * theta_TV[:, dim : dim + inner].to(kind)[token_N]
        rows_NO = ops.grouped_linear(hidden_NI, weights.down_EOI, segments, weights.down_bias_EO)
        y_TO = ops.scatter_rows(rows_NO, token_N, routing.weight_N[segments.order_N], routing.num_tokens)
        return y_TO.to(x_TD.dtype)

    def _tensors(self, expert: int) -> list[Tensor]:
        return [*super()._tensors(expert), self.deltas[expert]]


def operations(
    dim: int, inner: int, out: int, *, gated: bool, top_k: int, n_main: int, inject: Inject
) -> dict[str, int]:
    """Operations of the experts for one token: ``main`` of those that compute, ``auxiliary`` of those that need not any
    more, and ``vectors``: the weighted mean of the auxiliary ones' vectors, and the products with what it scales.
    """
    each = 2 * inner * ((2 if gated else 1) * dim + out)
    numbers, auxiliary = width(dim, inner, gated, inject), top_k - n_main
    scaled = numbers if inject == "input" else numbers - inner + n_main * inner
    return {
        "main": n_main * each,
        "auxiliary": auxiliary * each,
        "vectors": (2 * auxiliary * numbers + scaled) if auxiliary else 0,
    }
