"""A dense block as experts: equal slices of its own weights, which stay where they are.

A feed-forward of inner width H is cut into n slices of H / n hidden units, an attention into groups of query heads with
the key and value heads they read. Rows of the first matrices and columns of the last one are views, so nothing is
copied, and all slices together are the dense block:

    FFN(x) = b_down + sum_i a(x W_up,i^T + b_up,i) W_down,i^T         attention(x) = b_out + sum_i heads_i(x) W_out,i^T
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from moestro import ops
from moestro.core.bank import Bank
from moestro.core.cost import over_experts
from moestro.core.errors import ConfigError
from moestro.core.routing import Routing
from moestro.core.site import Borrowed


def cut_rows(weight_ID: Tensor, count: int) -> Tensor:
    """Slices [E, I / E, ...] of rows (or of a bias [I]), a view."""
    return weight_ID.view(count, -1, *weight_ID.shape[1:])


def cut_columns(weight_OI: Tensor, count: int) -> Tensor:
    """Slices [E, O, I / E] of columns, a view."""
    return weight_OI.view(len(weight_OI), count, -1).transpose(0, 1)


class SlicedBank(Bank):
    """Experts that are slices of linear layers which live, and are saved, elsewhere. The output bias is not theirs.

    Args:
        linears: the dense layers by projection; the last is cut by columns, the others by rows.
        fewer: number of slices of a projection that experts share.
    """

    def __init__(self, num_experts: int, linears: Mapping[str, nn.Linear], fewer: Mapping[str, int]) -> None:
        super().__init__(num_experts)
        self.projections = tuple(linears)
        self.linears = dict(linears)
        self.counts = {name: fewer.get(name, num_experts) for name in linears}

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """What the experts are made of, so that sizes count it as theirs."""
        for name, linear in self.linears.items():
            yield linear.get_parameter("weight")
            if self.cut_bias(name) is not None:
                yield linear.get_parameter("bias")

    def cut(self, projection: str) -> Tensor:
        """All slices of a projection [E, out, in], fewer where experts share them; a view."""
        cut = cut_columns if projection == self.projections[-1] else cut_rows
        return cut(self.linears[projection].weight, self.counts[projection])

    def cut_bias(self, projection: str) -> Tensor | None:
        """Its bias [E, out], or None; the last one belongs to the block."""
        bias = self.linears[projection].bias
        return None if bias is None or projection == self.projections[-1] else cut_rows(bias, self.counts[projection])

    def weight(self, expert: int, projection: str) -> Tensor:
        """See Bank; always a view."""
        self.check(projection, expert)
        return self.cut(projection)[expert * self.counts[projection] // self.num_experts]

    def _tensors(self, expert: int) -> list[Tensor]:
        biases = [bias for name in self.projections if (bias := self.cut_bias(name)) is not None]
        return super()._tensors(expert) + [bias[expert * len(bias) // self.num_experts] for bias in biases]

    def with_bias(self, y_TO: Tensor) -> Tensor:
        """A sum of slices and the block's own output bias."""
        bias: Tensor | None = self.linears[self.projections[-1]].bias
        return y_TO if bias is None else y_TO + bias

    def flops(self, rows_E: Sequence[float], length: int) -> float:
        """Operations a token, of ``length`` in a sequence, when expert e computes ``rows_E[e]`` rows a token."""
        return over_experts(rows_E, [self.flops_per_row(expert) for expert in range(self.num_experts)])

    def project(self, projection: str, rows_ND: Tensor, segments: ops.Segments) -> Tensor:
        """Rows sorted by expert through their slices, [N, out]."""
        return ops.grouped_linear(rows_ND, self.cut(projection), segments, self.cut_bias(projection))


class UnitBank(SlicedBank):
    """E runs of hidden units of one feed-forward.

    Args:
        linears: (gate,) up, down. dropout: on the hidden units.

    Raises:
        ConfigError: E does not divide its inner width.
    """

    def __init__(
        self, num_experts: int, linears: Mapping[str, nn.Linear], activation: ops.Activation, dropout: Any = None
    ) -> None:
        if linears["up"].out_features % num_experts:
            width = linears["up"].out_features
            raise ConfigError(f"num_slices={num_experts} does not divide the {width} hidden units; give a divisor")
        super().__init__(num_experts, linears, {})
        self.activation = activation
        self.dropout = Borrowed(nn.Identity() if dropout is None else dropout)

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """See Bank."""
        segments = ops.sort_rows(routing.expert_N, self.num_experts)
        token_N = routing.token_N[segments.order_N]
        rows_ND = x_TD[token_N]
        hidden_NI = ops.apply_activation(self.project(self.projections[0], rows_ND, segments), self.activation, False)
        if len(self.projections) == 3:
            hidden_NI = hidden_NI * self.project("up", rows_ND, segments)
        out_NO = self.project("down", self.dropout(hidden_NI), segments)
        return ops.scatter_rows(out_NO, token_N, routing.weight_N[segments.order_N], routing.num_tokens)
