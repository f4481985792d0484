"""Rows to experts and back by index, as layers here do it, and by the one-hot products of GShard, as a reference."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moestro import ops
from moestro.core.bank import StackedFFN
from moestro.core.routing import Routing
from moestro.methods.train._parts.capacity import fair_share, within_capacity


@dataclass(frozen=True)
class Choice:
    """What a top-1 gate says: expert [S], weight [S], and the places C that each of E experts has."""

    expert_S: Tensor
    weight_S: Tensor
    experts: int
    capacity: int


def choose(x_SM: Tensor, experts: int, draw: torch.Generator) -> Choice:
    """Top-1 of a random linear gate with capacity factor 1: some experts overflow."""
    weight_EM = torch.randn(experts, x_SM.shape[1], generator=draw) / x_SM.shape[1] ** 0.5
    top_S = F.linear(x_SM, weight_EM).softmax(-1).max(-1)
    return Choice(top_S.indices, top_S.values, experts, fair_share(len(x_SM), experts, 1.0))


def index_tables(choice: Choice) -> Routing:
    """The kept assignments; first come, first served."""
    first_S = torch.zeros_like(choice.expert_S)
    kept_S = within_capacity(choice.expert_S, first_S, 1, choice.experts, choice.capacity)
    return Routing.from_topk(
        choice.expert_S[:, None], choice.weight_S[:, None], num_experts=choice.experts, kept_TK=kept_S[:, None]
    ).real()


def index_rows(x_SM: Tensor, routing: Routing) -> Tensor:
    """Rows to experts and back, the experts left out: two gathers."""
    order_N = ops.sort_rows(routing.expert_N, routing.num_experts).order_N
    token_N = routing.token_N[order_N]
    return ops.scatter_rows(x_SM[token_N], token_N, routing.weight_N[order_N], routing.num_tokens)


def one_hot_tables(choice: Choice) -> tuple[Tensor, Tensor]:
    """GShard's tables: dispatch and combine, both [S, E, C]."""
    mask_SE = F.one_hot(choice.expert_S, choice.experts)
    place_S = (mask_SE.cumsum(0) * mask_SE).sum(1) - 1
    kept_S = place_S < choice.capacity
    place_SC = F.one_hot(place_S.clamp(max=choice.capacity - 1), choice.capacity) * kept_S[:, None]
    dispatch_SEC = (mask_SE[:, :, None] * place_SC[:, None, :]).float()
    return dispatch_SEC, dispatch_SEC * choice.weight_S[:, None, None]


def einsum_rows(
    x_SM: Tensor, tables: tuple[Tensor, Tensor], experts: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Rows to experts and back by products with the tables; ``experts`` maps [E, C, M] to [E, C, O]."""
    dispatch_SEC, combine_SEC = tables
    rows_ECM = torch.einsum("sec,sm->ecm", dispatch_SEC, x_SM)
    return torch.einsum("sec,ecm->sm", combine_SEC, rows_ECM if experts is None else experts(rows_ECM))


def batched(bank: StackedFFN) -> Callable[[Tensor], Tensor]:
    """The bank's experts over equally many rows of each."""
    up, down = bank.up_weight, bank.down_proj

    def run_experts(rows_ECM: Tensor) -> Tensor:
        pre_ECJ = torch.bmm(rows_ECM, up.transpose(1, 2))
        return torch.bmm(ops.apply_activation(pre_ECJ, bank.activation, bank.gated), down.transpose(1, 2))

    return run_experts


def seconds_of(calls: Mapping[str, Callable[[], Any]], times: int) -> dict[str, list[float]]:
    """Processor seconds of each call, by turns; the first turn is thrown away."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(times + 1):
        for name, call in calls.items():
            started = time.process_time()
            call()
            if turn:
                found[name].append(time.process_time() - started)
    return found


def ratio(seconds: Mapping[str, list[float]], first: str, second: str) -> float:
    """Median of the ratios of turns."""
    return statistics.median(a / max(b, 1e-9) for a, b in zip(seconds[first], seconds[second], strict=True))


@torch.no_grad()
def dispatch(seed: int, *, tokens: int, experts: int, width: int, times: int) -> dict[str, float]:
    """Both ways on one choice: seconds and the largest difference."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=draw)
    choice = choose(x, experts, draw)
    bank = StackedFFN(experts, width, 4 * width, activation="gelu", gated=False)
    whole = batched(bank)
    routing, tables = index_tables(choice), one_hot_tables(choice)
    dropped = torch.ones(tokens, dtype=torch.bool)
    dropped[routing.token_N] = False
    ours, theirs = index_rows(x, routing), einsum_rows(x, tables)
    layers = bank(x, routing), einsum_rows(x, tables, whole)
    calls = {
        "index": lambda: index_rows(x, index_tables(choice)),
        "einsum": lambda: einsum_rows(x, one_hot_tables(choice)),
        "index_moves": lambda: index_rows(x, routing),
        "einsum_moves": lambda: einsum_rows(x, tables),
        "index_layer": lambda: bank(x, index_tables(choice)),
        "einsum_layer": lambda: einsum_rows(x, one_hot_tables(choice), whole),
    }
    seconds = seconds_of(calls, times)
    return {
        "difference": float(max((ours - theirs).abs().max(), (layers[0] - layers[1]).abs().max())),
        "dropped": float(dropped.float().mean()),
        "dropped_output": float(max(ours[dropped].abs().sum(), layers[0][dropped].abs().sum())),
        "speedup": ratio(seconds, "einsum", "index"),
        "speedup_of_moves": ratio(seconds, "einsum_moves", "index_moves"),
        "speedup_of_layer": ratio(seconds, "einsum_layer", "index_layer"),
        **{f"ms_{name}": 1000 * statistics.median(values) for name, values in seconds.items()},
    }
