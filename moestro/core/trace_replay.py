"""Replaying a trace: every token goes to the experts it went to when it was recorded."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moestro.core.context import RoutingContext
from moestro.core.errors import TraceError
from moestro.core.routing import Routing
from moestro.core.session import Edit
from moestro.core.trace_format import NO_EXPERT, LayerInfo
from moestro.core.trace_sequences import PADDING, SequenceBook


if TYPE_CHECKING:
    from moestro.core.router import Router

Array = NDArray[Any]
Rows = Callable[[Sequence[int]], Mapping[str, Array]]


class Replay(Edit):
    """Force the recorded experts; the weights come from the router as it is now, through ``Router.weigh``.

    The n-th sequence this edit meets replays the n-th sequence of the trace (see ``trace_sequences``), so the data must
    come in the recorded order; batch sizes may differ. Padding keeps the router's own choice. Token ids are compared
    where both sides know them. The forced assignments keep the recorded order and dropped marks; gradient flows to the
    router through the weights.

    Use a new one for every run through the data.
    """

    def __init__(self, layers: Sequence[LayerInfo], rows: Rows) -> None:
        self._infos = {info.site: info for info in layers}
        self._rows = rows
        self._book = SequenceBook()
        self._loaded: tuple[tuple[int, ...], Mapping[str, Array]] | None = None

    def on_routing(self, site: str, routing: Routing, router: "Router", ctx: RoutingContext) -> Routing:
        """The recorded routing of this layer and these tokens.

        Raises:
            TraceError: the trace does not hold the site or the tokens, or holds other tokens there.
        """
        info = self._info(site, routing, ctx)
        sequence_T = self._book.sequences(ctx)
        tokens = ctx.tokens
        assert tokens is not None
        position_T = tokens.position_T.cpu().numpy()
        ids_T = None if tokens.ids_T is None else tokens.ids_T.cpu().numpy()
        known = self._recorded(site, info, sequence_T)
        token_M, row_M = _match(site, known, sequence_T, position_T, ids_T)
        real_M = known["rank"][row_M] != NO_EXPERT
        own_N = torch.from_numpy(sequence_T == PADDING).to(routing.token_N.device)[routing.token_N]
        return self._force(routing, router, own_N, token_M[real_M], {n: v[row_M[real_M]] for n, v in known.items()})

    def _info(self, site: str, routing: Routing, ctx: RoutingContext) -> LayerInfo:
        call = 0 if ctx.replaying else self._book.call(ctx, site)
        if ctx.replaying and self._book.forward(ctx).calls.get(site, 0) > 1:
            raise TraceError(f"{site} runs several times a forward; replay it without activation checkpointing")
        info = self._infos.get(site if call == 0 else f"{site}#{call + 1}")
        if info is None:
            raise TraceError(f"the trace holds no run {call + 1} of layer {site!r}; it cannot be replayed")
        if (routing.num_experts, routing.num_null) != (info.num_experts, info.num_null):
            raise TraceError(
                f"{site} has {routing.num_experts} experts and {routing.num_null} nulls; the trace was recorded with "
                f"{info.num_experts} and {info.num_null}"
            )
        return info

    def _recorded(self, site: str, info: LayerInfo, sequence_T: Array) -> dict[str, Array]:
        """The layer's rows of this forward's sequences, sorted by (sequence, position, rank)."""
        ids = tuple(int(item) for item in np.unique(sequence_T) if item != PADDING)
        if self._loaded is None or self._loaded[0] != ids:
            self._loaded = (ids, self._rows(ids))
        rows = self._loaded[1]
        mine = np.flatnonzero(rows["layer"] == info.layer)
        order = mine[np.lexsort((rows["rank"][mine], rows["position"][mine], rows["sequence"][mine]))]
        known = {name: column[order] for name, column in rows.items()}
        same = (np.diff(known["sequence"]) == 0) & (np.diff(known["position"]) == 0) & (np.diff(known["forward"]) != 0)
        if same.any():
            at = int(np.flatnonzero(same)[0])
            raise TraceError(
                f"{site}: the trace holds position {known['position'][at]} of sequence {known['sequence'][at]} from "
                "two forwards (as speculative decoding leaves it); it cannot be replayed"
            )
        return known

    def _force(
        self, routing: Routing, router: "Router", own_N: Tensor, token_M: Array, known: Mapping[str, Array]
    ) -> Routing:
        device = routing.token_N.device
        token = torch.cat([routing.token_N[own_N], torch.from_numpy(token_M).to(device)])
        recorded = torch.from_numpy(known["expert"].astype(np.int64)).to(device)
        expert = torch.cat([routing.expert_N[own_N], recorded])
        weight = torch.cat([routing.weight_N[own_N], _weigh(routing, router, token_M, recorded)])
        own_kept = torch.ones_like(own_N) if routing.kept_N is None else routing.kept_N
        kept = torch.cat([own_kept[own_N], torch.from_numpy(known["kept"]).to(device)])
        order = torch.sort(token, stable=True).indices
        count_T = torch.bincount(token, minlength=routing.num_tokens)
        top_k = int(count_T[0]) if routing.num_tokens else None
        regular = top_k is not None and top_k > 0 and bool((count_T == top_k).all())
        return routing.replace(
            token_N=token[order],
            expert_N=expert[order],
            weight_N=weight[order],
            kept_N=None if bool(kept.all()) else kept[order],
            top_k=top_k if regular else None,
        )


def _match(
    site: str, known: Mapping[str, Array], sequence_T: Array, position_T: Array, ids_T: Array | None
) -> tuple[Array, Array]:
    """For every valid token its recorded rows: (token_M, row_M), token by token in rank order."""
    key_N = (known["sequence"].astype(np.int64) << 32) | known["position"].astype(np.int64)
    valid_T = np.flatnonzero(sequence_T != PADDING)
    key_V = (sequence_T[valid_T] << 32) | position_T[valid_T]
    first_V = np.searchsorted(key_N, key_V)
    count_V = np.searchsorted(key_N, key_V, side="right") - first_V
    if (count_V == 0).any():
        at = valid_T[np.flatnonzero(count_V == 0)[0]]
        raise TraceError(
            f"{site}: the trace does not hold position {position_T[at]} of sequence {sequence_T[at]}; replay the data "
            "in the recorded order, each sequence once"
        )
    if ids_T is not None:
        then_V = known["token_id"][first_V]
        other = np.flatnonzero((then_V >= 0) & (then_V != ids_T[valid_T]))
        if other.size:
            at = valid_T[other[0]]
            raise TraceError(
                f"{site}: sequence {sequence_T[at]} has token {ids_T[at]} at position {position_T[at]}, the trace has "
                f"{then_V[other[0]]}; replay the data in the recorded order"
            )
    token_M = np.repeat(valid_T, count_V)
    offset_M = np.arange(token_M.size) - np.repeat(np.cumsum(count_V) - count_V, count_V)
    return token_M, np.repeat(first_V, count_V) + offset_M


def _weigh(routing: Routing, router: "Router", token_M: Array, expert_M: Tensor) -> Tensor:
    """Weights of forced pairs: the router's own rule on their gates, tokens with equally many pairs together."""
    if routing.scores is None:
        raise TraceError(
            f"{type(router).__name__} gives no scores, so weights of recorded experts cannot be recomputed"
        )
    token = torch.from_numpy(token_M).to(expert_M.device)
    gate_M = routing.scores.gate_TC[token, expert_M]
    weight_M = torch.zeros_like(gate_M, dtype=routing.weight_N.dtype)
    count_M = torch.bincount(token, minlength=routing.num_tokens)[token]
    for k in torch.unique(count_M).tolist():
        place = (count_M == k).nonzero().squeeze(1)
        weigh_TK = router.weigh(gate_M[place].view(-1, k)).to(weight_M.dtype)
        weight_M = weight_M.index_copy(0, place, weigh_TK.reshape(-1))
    return weight_M
