"""Expert parallelism: every rank holds some of the experts, and rows travel to the rank that holds theirs.

    shard_experts(layer, group)       # rank r of W keeps experts r * E/W .. (r + 1) * E/W - 1; all else is replicated
    shard_experts(layer, links=Links("hierarchical", ranks_per_node=8))     # the same rows by another way

With more ranks than experts, W = n E, an expert is cut by its inner units into n slices: rank r keeps slice r % n of
expert r // n, a row visits all n, and their answers add up where the token is (expert slicing, DeepSpeed-MoE,
2201.05596, section 5).

A layer's mathematics does not change and knows nothing of ranks: only its dispatcher does. Every rank brings its own
tokens, and the gradients of a rank's experts already hold what the tokens of all ranks ask for; the gradients of
replicated parameters are summed over ranks as under data parallelism.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_to_all_single_autograd

from moestro.core.bank import StackedFFN
from moestro.core.dispatch import Dispatcher
from moestro.core.errors import ConfigError, ContextError
from moestro.core.layer import MoELayer
from moestro.core.routing import Routing
from moestro.training.all_to_all import Links, all_to_all


@dataclass
class Traffic:
    """Bytes that this rank sent to *other* ranks since the counter was made or reset.

    Attributes:
        rows_out, rows_back: hidden rows on their way to the experts, and the experts' answers, in the forward pass.
        gradients: the gradients of both in the backward pass.
        orders: which row goes to which expert with which weight, and how many; the weights' gradients too.
    """

    rows_out: int = 0
    rows_back: int = 0
    gradients: int = 0
    orders: int = 0

    @property
    def rows(self) -> int:
        """All that grows with the width of the rows."""
        return self.rows_out + self.rows_back + self.gradients

    def reset(self) -> None:
        """Count from 0."""
        self.rows_out = self.rows_back = self.gradients = self.orders = 0


@dataclass(frozen=True)
class _Journey:
    """How rows went, so that the answers find back: the token of each row sent, rows sent and received by rank."""

    token_R: Tensor
    sent_W: list[int]
    received_W: list[int]
    num_tokens: int


class _Waited(torch.autograd.Function):
    """What a collective gives, once it is there, as a plain tensor: others would take slower ways."""

    @staticmethod
    def forward(ctx: Any, pending: Tensor) -> Tensor:
        return pending.trigger_wait() if isinstance(pending, AsyncCollectiveTensor) else pending.view_as(pending)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _OnBackward(torch.autograd.Function):
    """The same tensor; ``tell`` is called when its gradient arrives."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, tell: Callable[[], None]) -> Tensor:
        ctx.tell = tell
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.tell()
        return gradient, None


class AllToAll(Dispatcher):
    """Rows go to the rank of their expert and the answers come back, by two collectives a layer.

    Args:
        num_experts: E over all ranks; a multiple of the number of ranks W, or a divisor: W / E slices of each then.
        group: the process group, the default one when None.
        one_copy: a token visits a rank once, whatever the number of its experts there, and their weighted answers are
            added before they travel back. False sends one copy for every assignment, as plain implementations do; the
            numbers are the same but for the order of the sum.
        links: the way rows travel, over its group; None: one exchange among all. With the coordinated algorithm all
            ranks of a slicing group must bring the same tokens, and there is no gradient.

    Raises:
        ConfigError: E is neither a multiple nor a divisor of the number of ranks, or group and links disagree.
    """

    def __init__(
        self,
        num_experts: int,
        group: dist.ProcessGroup | None = None,
        *,
        one_copy: bool = True,
        links: Links | None = None,
    ) -> None:
        super().__init__()
        if links is not None and group not in (None, links.group):
            raise ConfigError("group and links name different ranks; give the links alone")
        self.group = group if links is None else links.group
        self.links = links
        self.rank, self.world = dist.get_rank(self.group), dist.get_world_size(self.group)
        if num_experts % self.world and self.world % num_experts:
            raise ConfigError(f"{num_experts} experts cannot be shared equally by {self.world} ranks")
        self.num_experts = num_experts
        self.slices = max(1, self.world // num_experts)
        self.experts_here = num_experts * self.slices // self.world
        self.one_copy = one_copy
        self.traffic = Traffic()

    def dispatch(self, x_TI: Tensor, routing: Routing) -> tuple[Tensor, Routing, _Journey]:
        """Rows this rank computes [R, I], their routing over this rank's experts, and the way back.

        Raises:
            ContextError: the routing holds nulls or is about another number of experts.
        """
        if routing.num_experts != self.num_experts or routing.num_null:
            raise ContextError(
                f"the dispatcher holds {self.num_experts} experts; the routing has {routing.num_experts} and "
                f"{routing.num_null} nulls"
            )
        routing = over_slices(routing, self.slices)
        owner_N = routing.expert_N // self.experts_here
        order_N = torch.argsort(owner_N, stable=True)
        owner_N, token_N = owner_N[order_N], routing.token_N[order_N]
        if self.one_copy:
            pair_R, row_N = torch.unique(owner_N * routing.num_tokens + token_N, return_inverse=True)
            owner_R, token_R = pair_R // routing.num_tokens, pair_R % routing.num_tokens
        else:
            row_N = torch.arange(len(owner_N), device=owner_N.device)
            owner_R, token_R = owner_N, token_N
        sent_rows, sent_orders = self._count(owner_R), self._count(owner_N)
        received = self._exchange(torch.stack([sent_rows, sent_orders], 1), [1] * self.world, [1] * self.world)
        rows_in, orders_in = received.unbind(1)
        journey = _Journey(token_R, sent_rows.tolist(), rows_in.tolist(), routing.num_tokens)
        splits = sent_orders.tolist(), orders_in.tolist()

        first_W = sent_rows.cumsum(0) - sent_rows  # rows are numbered anew for each rank
        place_N = row_N - first_W[owner_N]
        orders = torch.stack([place_N, routing.expert_N[order_N] % self.experts_here], 1)
        orders = self._exchange(orders, *splits)
        weight_N = self._exchange(routing.weight_N[order_N], *splits)
        rows = self._exchange(x_TI[token_R], journey.sent_W, journey.received_W, "rows_out")
        first_in_W = rows_in.cumsum(0) - rows_in
        local = Routing(
            orders[:, 0] + first_in_W.repeat_interleave(orders_in),
            orders[:, 1].contiguous(),
            weight_N,
            rows.shape[0],
            self.experts_here,
            causal=routing.causal,
        )
        return rows, local, journey

    def combine(self, y_RO: Tensor, handle: Any) -> Tensor:
        """Answers back at their tokens [T, O], added up in the order of ranks; half precisions in float32."""
        back = self._exchange(y_RO, handle.received_W, handle.sent_W, "rows_back", back=True)
        exact = back.float() if back.element_size() < 4 else back
        return exact.new_zeros(handle.num_tokens, back.shape[1]).index_add(0, handle.token_R, exact).to(back.dtype)

    def _count(self, owner: Tensor) -> Tensor:
        return torch.bincount(owner, minlength=self.world)

    def _exchange(
        self,
        data: Tensor,
        sent_W: Sequence[int],
        received_W: Sequence[int],
        kind: str = "orders",
        *,
        back: bool = False,
    ) -> Tensor:
        """The collective, with gradient; counts what leaves this rank."""
        data = data.contiguous()
        if self.links is not None:
            return all_to_all(data, sent_W, self.links, back=back, tell=partial(self._told, kind))[0]
        splits = list(received_W), list(sent_W)
        if data.is_floating_point():
            got: Tensor = _Waited.apply(all_to_all_single_autograd(data, *splits, self.group or dist.group.WORLD))
        else:
            got = data.new_empty(sum(received_W), *data.shape[1:])
            dist.all_to_all_single(got, data, *splits, group=self.group)
        nbytes = prod(data.shape[1:]) * data.element_size()
        self._add(kind, nbytes * self._leaving(sent_W))
        if got.requires_grad:
            later = "orders" if kind == "orders" else "gradients"
            got = _OnBackward.apply(got, partial(self._add, later, nbytes * self._leaving(received_W)))
        return got

    def _told(self, kind: str, nbytes: int, gradient: bool) -> None:
        self._add("gradients" if gradient and kind != "orders" else kind, nbytes)

    def _leaving(self, split_W: Sequence[int]) -> int:
        return sum(count for rank, count in enumerate(split_W) if rank != self.rank)

    def _add(self, kind: str, nbytes: int) -> None:
        setattr(self.traffic, kind, getattr(self.traffic, kind) + nbytes)


def over_slices(routing: Routing, slices: int) -> Routing:
    """The routing over n slices of each expert, slice s of expert e being e n + s: every assignment, n times."""
    if slices == 1:
        return routing
    token_N, expert_N, weight_N = (
        values.repeat_interleave(slices) for values in (routing.token_N, routing.expert_N, routing.weight_N)
    )
    slice_N = torch.arange(slices, device=expert_N.device).repeat(len(routing.expert_N))
    experts = routing.num_experts * slices
    return Routing(token_N, expert_N * slices + slice_N, weight_N, routing.num_tokens, experts, causal=routing.causal)


def slice_experts(bank: StackedFFN, slices: int) -> dict[str, Tensor]:
    """The bank's parameters, every expert cut into ``slices`` by its inner units: their answers sum to the expert's.

    The bias of the down-projection stays with the first slice; the others have zeros for it, which must not be trained.

    Raises:
        ConfigError: the inner units cannot be shared equally.
    """
    if bank.inner % slices:
        raise ConfigError(f"experts of {bank.inner} inner units cannot be cut into {slices} equal slices")
    found = {}
    for name, parameter in bank.named_parameters():
        whole = parameter.detach()
        if name == "down_proj":
            found[name] = torch.cat([part[:, None] for part in whole.chunk(slices, -1)], 1).flatten(0, 1)
        elif name == "down_proj_bias":
            found[name] = torch.stack([whole] + [torch.zeros_like(whole)] * (slices - 1), 1).flatten(0, 1)
        else:  # gate rows before up rows, in every slice
            halves = whole.unflatten(1, (2 if bank.gated else 1, slices, -1))
            found[name] = halves.transpose(1, 2).flatten(2, 3).flatten(0, 1)
    return found


def shard_experts(
    layer: MoELayer,
    group: dist.ProcessGroup | None = None,
    *,
    one_copy: bool = True,
    links: Links | None = None,
) -> AllToAll:
    """Keep this rank's experts of a layer and send rows where their experts are; in place.

    Every rank must hold the same weights before. ``pre`` and ``post`` stay where the tokens are: only what stands
    between them travels. The other arguments are those of ``AllToAll``.

    Returns:
        The layer's dispatcher, with the byte counter.

    Raises:
        ConfigError: the bank is not stacked, is shared out already, or its experts cannot be shared equally.
    """
    bank = layer.bank
    if isinstance(layer.dispatcher, AllToAll):
        raise ConfigError(
            f"{layer.site or 'layer'}: its experts are shared out already, over {layer.dispatcher.world} ranks"
        )
    if not isinstance(bank, StackedFFN):
        raise ConfigError(
            f"{layer.site or 'layer'}: experts in a {type(bank).__name__} cannot be shared out; stacked ones can"
        )
    dispatcher = AllToAll(bank.num_experts, group, one_copy=one_copy, links=links)
    here = dispatcher.experts_here
    mine = slice(dispatcher.rank * here, (dispatcher.rank + 1) * here)
    later = dispatcher.rank % dispatcher.slices > 0  # a slice other than its expert's first
    for name, whole in slice_experts(bank, dispatcher.slices).items():
        # Every slice's bias would get the whole gradient, and their sum would move once for each.
        trains = bank.get_parameter(name).requires_grad and not (later and name == "down_proj_bias")
        bank.register_parameter(name, torch.nn.Parameter(whole[mine].clone(), requires_grad=trains))
    bank.num_experts, bank.inner = here, bank.inner // dispatcher.slices
    layer.dispatcher = dispatcher
    return dispatcher
