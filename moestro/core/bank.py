"""Banks: the experts of a layer as one module."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, TypedDict

import torch
from torch import Tensor, nn

from moestro import ops
from moestro.core.cost import Work
from moestro.core.errors import ConfigError
from moestro.core.routing import Routing


Projection = Literal["gate", "up", "down"]


class Bank(nn.Module, ABC):
    """Base of all banks. Forward multiplies each expert's output by the routing weight and sums per token.

    Attributes:
        num_experts: E. takes: ``real`` banks are given assignments that must be computed; ``all`` banks also see nulls
            and assignments that capacity or rank took out, and skip them themselves.
        projections: the names that ``weight`` answers to.
    """

    takes: Literal["real", "all"] = "real"
    projections: tuple[str, ...] = ()

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        if num_experts < 1:
            raise ConfigError(f"num_experts={num_experts}; a bank needs at least 1")
        self.num_experts = num_experts

    @abstractmethod
    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """Weighted sum of expert outputs, [T, O]; exactly 0 for a token without assignments."""

    @abstractmethod
    def weight(self, expert: int, projection: str) -> Tensor:
        """The matrix [out, in] of one projection of one expert; a view where storage allows."""

    def stacked(self, projection: str) -> Tensor | None:
        """All experts' matrices [E, out, in] without a copy, or None where the storage has no such view."""
        return None

    def nbytes(self, expert: int) -> int:
        """Bytes that must be at hand to run one expert."""
        return sum(w.numel() * w.element_size() for w in self._tensors(expert))

    def flops_per_row(self, expert: int) -> int:
        """Floating point operations for one assignment: two for each weight of a matrix."""
        return sum(2 * self.weight(expert, name).numel() for name in self.projections)

    def flops_per_token(self, work: Work) -> float:
        """Operations for one token that runs through every expert: a bank that stands outside a mixture layer."""
        return float(sum(self.flops_per_row(expert) for expert in range(self.num_experts)))

    def _tensors(self, expert: int) -> list[Tensor]:
        return [self.weight(expert, name) for name in self.projections]

    def check(self, name: str, expert: int) -> None:
        """Raise ConfigError unless ``expert`` and the projection ``name`` exist."""
        if name not in self.projections or not 0 <= expert < self.num_experts:
            raise ConfigError(
                f"no weight {name!r} of expert {expert}; this bank has {self.num_experts} experts with "
                f"{', '.join(self.projections)}"
            )


_UNFILLED: ContextVar[bool] = ContextVar("moestro_unfilled_banks", default=False)


@contextmanager
def unfilled_banks() -> Iterator[None]:
    """Inside, new banks leave their matrices as the allocator gave them, for whoever fills them all anyway."""
    token = _UNFILLED.set(True)
    try:
        yield
    finally:
        _UNFILLED.reset(token)


class Form(TypedDict):
    """The form of feed-forward experts, as their banks take it."""

    activation: ops.Activation
    gated: bool
    bias: bool
    out: int


class StackedFFN(Bank):
    """Equal feed-forward experts in 3-D tensors, Transformers' layout.

    Gated: ``gate_up_proj`` [E, 2I, D] (gate rows first), act(x Wg^T) * (x Wu^T), then ``down_proj`` [E, O, I].
    Not gated: ``up_proj`` [E, I, D], act(x Wu^T), then ``down_proj``. With ``bias``: ``gate_up_proj_bias`` [E, 2I] or
    ``up_proj_bias`` [E, I], and ``down_proj_bias`` [E, O].

    Args:
        dim: D. inner: I. out: O, D when None. activation: name in ``ops.ACTIVATIONS``.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        inner: int,
        *,
        activation: ops.Activation = "silu",
        gated: bool = True,
        bias: bool = False,
        out: int | None = None,
    ) -> None:
        super().__init__(num_experts)
        if dim < 1 or inner < 1:
            raise ConfigError(f"an expert of {dim} inputs and {inner} inner units cannot be built; both must be >= 1")
        self.dim, self.inner, self.out = dim, inner, dim if out is None else out
        self.activation: ops.Activation = activation
        self.gated = gated
        self.projections = ("gate", "up", "down") if gated else ("up", "down")
        rows = 2 * inner if gated else inner
        up = nn.Parameter(torch.empty(num_experts, rows, dim))
        up_bias = nn.Parameter(torch.zeros(num_experts, rows)) if bias else None
        self.register_parameter("gate_up_proj" if gated else "up_proj", up)
        self.register_parameter("gate_up_proj_bias" if gated else "up_proj_bias", up_bias)
        self.down_proj = nn.Parameter(torch.empty(num_experts, self.out, inner))
        self.down_proj_bias = nn.Parameter(torch.zeros(num_experts, self.out)) if bias else None
        if up.device.type != "meta" and not _UNFILLED.get():
            nn.init.normal_(up, std=0.02)
            nn.init.normal_(self.down_proj, std=0.02)

    @property
    def form(self) -> Form:
        """What besides its sizes makes another bank of the same kind of experts."""
        return Form(activation=self.activation, gated=self.gated, bias=self.up_bias is not None, out=self.out)

    @property
    def up_weight(self) -> nn.Parameter:
        """``gate_up_proj`` or ``up_proj``, [E, J, D]."""
        return self.get_parameter("gate_up_proj" if self.gated else "up_proj")

    @property
    def up_bias(self) -> Tensor | None:
        """Its bias [E, J], or None."""
        bias: Tensor | None = getattr(self, "gate_up_proj_bias" if self.gated else "up_proj_bias")
        return bias

    def weights(self) -> ops.FFNWeights:
        """The tensors as the ops take them."""
        return ops.FFNWeights(
            up_EJD=self.up_weight,
            down_EOI=self.down_proj,
            gated=self.gated,
            up_bias_EJ=self.up_bias,
            down_bias_EO=self.down_proj_bias,
        )

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """See Bank."""
        return ops.fused_ffn(
            x_TD,
            routing.token_N,
            routing.expert_N,
            routing.weight_N,
            routing.num_tokens,
            self.weights(),
            self.activation,
        )

    def stacked(self, projection: str) -> Tensor | None:
        """See Bank."""
        self.check(projection, 0)
        if projection == "down":
            return self.down_proj
        up = self.up_weight
        if not self.gated:
            return up
        return up[:, : self.inner] if projection == "gate" else up[:, self.inner :]

    def weight(self, expert: int, projection: str) -> Tensor:
        """See Bank."""
        self.check(projection, expert)
        whole = self.stacked(projection)
        assert whole is not None
        return whole[expert]

    def flops_per_row(self, expert: int) -> int:
        """See Bank. All are alike; looking at one expert of a sharded tensor would ask all ranks for it."""
        return 2 * (self.up_weight.numel() + self.down_proj.numel()) // self.num_experts

    def _tensors(self, expert: int) -> list[Tensor]:
        biases = [b[expert] for b in (self.up_bias, self.down_proj_bias) if b is not None]
        return super()._tensors(expert) + biases


class HeterogeneousBank(Bank):
    """Experts of different shapes: several banks side by side, each with its own run of expert ids.

    Experts 0 .. E0-1 live in the first part, the next E1 in the second, and so on. All parts share D and O.
    """

    takes = "real"

    def __init__(self, parts: Sequence[Bank]) -> None:
        super().__init__(sum(part.num_experts for part in parts))
        self.parts = nn.ModuleList(parts)
        names = dict.fromkeys(name for part in parts for name in part.projections)
        self.projections = tuple(names)

    def _locate(self, expert: int) -> tuple[Bank, int]:
        place = expert
        for part in self.parts:
            assert isinstance(part, Bank)
            if 0 <= place < part.num_experts:
                return part, place
            place -= part.num_experts
        raise ConfigError(f"no expert {expert}; this bank has {self.num_experts}")

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """See Bank. Each part sees its own assignments; outputs add up in the order of the parts."""
        first = 0
        total: Tensor | None = None
        for part in self.parts:
            assert isinstance(part, Bank)
            mine_N = (routing.expert_N >= first) & (routing.expert_N < first + part.num_experts)
            local = Routing(
                routing.token_N[mine_N],
                routing.expert_N[mine_N] - first,
                routing.weight_N[mine_N],
                routing.num_tokens,
                part.num_experts,
                causal=routing.causal,
            )
            y_TO = part(x_TD, local)
            total = y_TO if total is None else total + y_TO
            first += part.num_experts
        assert total is not None
        return total

    def weight(self, expert: int, projection: str) -> Tensor:
        """See Bank."""
        part, place = self._locate(expert)
        return part.weight(place, projection)

    def nbytes(self, expert: int) -> int:
        """See Bank."""
        part, place = self._locate(expert)
        return part.nbytes(place)

    def flops_per_row(self, expert: int) -> int:
        """See Bank."""
        part, place = self._locate(expert)
        return part.flops_per_row(place)
