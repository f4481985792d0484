"""Routers: what scores the choices of every token and picks among them."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from moestro.core.errors import ConfigError, ContextError
from moestro.core.routing import Routing, Scores


if TYPE_CHECKING:
    from moestro.core.bank import Bank
    from moestro.core.context import RoutingContext


class Router(nn.Module, ABC):
    """Base of all routers: ``score`` first, then ``choose``; edits come between and after.

    Attributes:
        num_experts: E. num_null: null experts after them. top_k: K, or None when the count varies by token.
        causal: False when a choice reads later tokens or the whole batch; known before anything runs.
        hard: True when the weights carry no gradient, so that no loss of the model's output reaches the router's
            parameters; the method then has an objective of its own that trains them.
        choice_rows: names of the tensors whose first axis runs over the C choices. Whoever removes, copies or reorders
            experts moves their rows along; ``part.name`` is a tensor of a part. choice_ids: names of the tensors that
            hold choice ids.
    """

    causal: bool = True
    hard: ClassVar[bool] = False
    choice_rows: ClassVar[tuple[str, ...]] = ()
    choice_ids: ClassVar[tuple[str, ...]] = ()

    def __init__(self, num_experts: int, *, top_k: int | None, num_null: int = 0) -> None:
        super().__init__()
        if num_experts < 1:
            raise ConfigError(f"num_experts={num_experts}; a router needs at least 1")
        if top_k is not None and not 1 <= top_k <= num_experts + num_null:
            raise ConfigError(f"top_k={top_k} but the router has {num_experts + num_null} choices")
        self.num_experts = num_experts
        self.num_null = num_null
        self.top_k = top_k

    @property
    def num_choices(self) -> int:
        """C: real and null experts."""
        return self.num_experts + self.num_null

    def tensor(self, name: str) -> Tensor | None:
        """The tensor of this name, as ``choice_rows`` gives it; None where there is none."""
        found: object = self
        for step in name.split("."):
            found = getattr(found, step, None)
        return found if isinstance(found, Tensor) else None

    @abstractmethod
    def score(self, x_TD: Tensor, bank: "Bank", ctx: "RoutingContext") -> Scores:
        """Scores [T, C] of every choice. May read the bank's weights, token ids, tags and earlier layers' slots."""

    @abstractmethod
    def choose(self, scores: Scores, ctx: "RoutingContext") -> Routing:
        """The routing these scores lead to, weights included."""

    def real_per_token(self, length: int) -> float | None:
        """Assignments a token that experts compute, where the settings alone say; None where data decide.

        Args:
            length: tokens of a sequence.
        """
        return None if self.num_null else self.top_k

    def weigh(self, gate_TK: Tensor) -> Tensor:
        """Weights of chosen pairs from their gates, same shape; for ``choose`` and for edits that choose otherwise."""
        return gate_TK

    def after_step(self, load_C: Tensor) -> None:
        """Called once per optimiser step with the step's assignment counts over all micro-batches and ranks."""
        return


class LinearRouter(Router):
    """A router whose logits are x W^T (+ b), computed in float32.

    Parameters: ``weight`` [C, D], and ``bias`` [C] when asked for.

    Args:
        dim: D.
    """

    choice_rows: ClassVar[tuple[str, ...]] = ("weight", "bias")

    def __init__(self, dim: int, num_experts: int, *, top_k: int | None, num_null: int = 0, bias: bool = False) -> None:
        super().__init__(num_experts, top_k=top_k, num_null=num_null)
        self.weight = nn.Parameter(torch.empty(num_experts + num_null, dim))
        self.bias = nn.Parameter(torch.zeros(num_experts + num_null)) if bias else None
        if not self.weight.is_meta:
            nn.init.normal_(self.weight, std=0.02)

    def logits(self, x_TD: Tensor) -> Tensor:
        """Logits [T, C] in float32."""
        return exact_linear(x_TD, self.weight, self.bias)


def exact_linear(x_TD: Tensor, weight_CD: Tensor, bias_C: Tensor | None = None) -> Tensor:
    """x W^T (+ b) in float32, under autocast too: a choice among experts does not survive rounded logits."""
    with torch.autocast(x_TD.device.type, enabled=False):
        bias = None if bias_C is None else bias_C.float()
        return nn.functional.linear(x_TD.float(), weight_CD.float(), bias)


def topk_indices(select_TC: Tensor, k: int) -> Tensor:
    """The k highest choices of each token, best first, int64 [T, k]. Equal scores go to the lower id.

    ``torch.topk`` leaves the order of ties open, and routers whose scores tie by construction (zero weights, tiled
    nulls, copied experts) would depend on it. A stable sort of just the rows with a tie fixes that at little cost.
    """
    more = min(k + 1, select_TC.shape[-1])
    value_TK, index_TK = torch.topk(select_TC, more, dim=-1)
    tied_T = (value_TK[:, 1:] == value_TK[:, :-1]).any(-1)
    if tied_T.any():
        order_TC = torch.sort(select_TC[tied_T], dim=-1, descending=True, stable=True).indices
        index_TK[tied_T] = order_TC[:, :more]
    return index_TK[:, :k]


def choose_topk(select_TC: Tensor, k: int) -> Tensor:
    """``topk_indices`` for a router's choice.

    Raises:
        ContextError: a token has fewer than k choices above -inf, so that a closed one would be taken.
    """
    index_TK = topk_indices(select_TC, k)
    worst_T = select_TC.gather(1, index_TK[:, -1:])
    if torch.isneginf(worst_T).any():
        row = int(torch.isneginf(worst_T).nonzero()[0, 0])
        left = int((select_TC[row] > float("-inf")).sum())
        raise ContextError(f"token {row} may choose among {left} experts but top_k={k}; close fewer of them")
    return index_TK
