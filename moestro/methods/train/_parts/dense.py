"""A dense feed-forward branch in the experts' layout: shared experts, residual branches."""

from torch import Tensor, nn

from moestro import ops
from moestro.core.bank import StackedFFN


class DenseFFN(nn.Module):
    """One feed-forward network every token runs through: a bank of one expert, called without a routing.

    K shared experts of inner width I are one DenseFFN of width K * I: the sums of their outputs are the same.

    Args:
        dim: D. inner: I. activation, gated, bias: as in StackedFFN.
    """

    def __init__(
        self, dim: int, inner: int, *, activation: ops.Activation = "silu", gated: bool = True, bias: bool = False
    ) -> None:
        super().__init__()
        self.bank = StackedFFN(1, dim, inner, activation=activation, gated=gated, bias=bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] to [T, D]."""
        w = self.bank.weights()
        up_bias = None if w.up_bias_EJ is None else w.up_bias_EJ[0]
        down_bias = None if w.down_bias_EO is None else w.down_bias_EO[0]
        hidden_TI = ops.apply_activation(
            nn.functional.linear(x_TD, w.up_EJD[0], up_bias), self.bank.activation, self.bank.gated
        )
        return nn.functional.linear(hidden_TI, w.down_EOI[0], down_bias)
