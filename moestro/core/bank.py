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


class PooledFFN(Bank):
    """Experts as lists of inner units of ONE feed-forward, which is held once: units may belong to several experts.

    Expert e computes ``down[:, R_e] act(gate[R_e] x, up[R_e] x)`` (+ the whole bias of down) with R_e = ``rows_EW[e]``.
    What two experts share is one weight: it takes the gradients of both and stays the same in both.

    Args:
        dim: D. inner: H, units of the pool. width: W, units of each expert. The other arguments are StackedFFN's.

    Attributes:
        pool: a StackedFFN of one expert. rows_EW: int64 [E, W], a saved buffer; until it is set, runs of neighbours
            spread over the pool.
    """

    rows_EW: Tensor

    def __init__(
        self,
        num_experts: int,
        dim: int,
        inner: int,
        width: int,
        *,
        activation: ops.Activation = "silu",
        gated: bool = True,
        bias: bool = False,
        out: int | None = None,
    ) -> None:
        super().__init__(num_experts)
        if not 1 <= width <= inner:
            raise ConfigError(f"experts of {width} units from a pool of {inner}; give 1 to {inner}")
        self.pool = StackedFFN(1, dim, inner, activation=activation, gated=gated, bias=bias, out=out)
        self.inner, self.width = inner, width
        self.projections = self.pool.projections
        first_E = torch.arange(num_experts) * inner // num_experts
        self.register_buffer("rows_EW", (first_E[:, None] + torch.arange(width)) % inner)

    def set_rows(self, rows_EW: Tensor) -> None:
        """Say which units each expert has.

        Raises:
            ConfigError: another shape, a unit that the pool does not have, or one twice in an expert.
        """
        if rows_EW.shape != self.rows_EW.shape:
            raise ConfigError(f"units of shape {list(rows_EW.shape)}, this bank takes {list(self.rows_EW.shape)}")
        ordered_EW = rows_EW.sort(1).values
        if int(ordered_EW.min()) < 0 or int(ordered_EW.max()) >= self.inner:
            raise ConfigError(f"units {int(ordered_EW.min())} to {int(ordered_EW.max())}, the pool has {self.inner}")
        if bool((ordered_EW[:, 1:] == ordered_EW[:, :-1]).any()):
            raise ConfigError("an expert lists a unit twice; each unit counts once")
        self.rows_EW.copy_(rows_EW)

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """See Bank."""
        whole = self.pool.weights()
        total_TO = x_TD.new_zeros(len(x_TD), self.pool.out)
        for expert in range(self.num_experts):
            mine_N = routing.expert_N == expert
            token_M = routing.token_N[mine_N]
            if not len(token_M):
                continue
            row_W = self.rows_EW[expert]
            both_J = torch.cat([row_W, row_W + self.inner]) if whole.gated else row_W
            up_bias = None if whole.up_bias_EJ is None else whole.up_bias_EJ[0, both_J]
            down_bias = None if whole.down_bias_EO is None else whole.down_bias_EO[0]
            hidden_MJ = nn.functional.linear(x_TD[token_M], whole.up_EJD[0, both_J], up_bias)
            inner_MW = ops.apply_activation(hidden_MJ, self.pool.activation, whole.gated)
            y_MO = nn.functional.linear(inner_MW, whole.down_EOI[0][:, row_W], down_bias)
            weighted_MO = y_MO * routing.weight_N[mine_N, None].to(y_MO.dtype)
            total_TO = total_TO.to(y_MO.dtype).index_add(0, token_M, weighted_MO)
        return total_TO

    def weight(self, expert: int, projection: str) -> Tensor:
        """See Bank; a copy."""
        self.check(projection, expert)
        whole, row_W = self.pool.weight(0, projection), self.rows_EW[expert]
        return whole[:, row_W] if projection == "down" else whole[row_W]

    def flops_per_row(self, expert: int) -> int:
        """See Bank."""
        return self.pool.flops_per_row(0) // self.inner * self.width

    def nbytes(self, expert: int) -> int:
        """See Bank; what experts share counts in each of them, see ``unique_bytes``."""
        biases = [b for b in (self.pool.up_bias, self.pool.down_proj_bias) if b is not None]
        bias_bytes = 0
        if len(biases) == 2:
            bias_bytes = biases[0].nbytes // self.inner * self.width + biases[1].nbytes
        return super().nbytes(expert) + bias_bytes

    def unique_bytes(self) -> int:
        """Bytes of the units that at least one expert has, each counted once."""
        used = int(torch.unique(self.rows_EW).numel())
        matrices = sum(self.pool.weight(0, name).nbytes for name in self.projections)
        up, down = self.pool.up_bias, self.pool.down_proj_bias
        bias = (0 if up is None else up.nbytes // self.inner * used) + (0 if down is None else down.nbytes)
        return matrices // self.inner * used + bias
