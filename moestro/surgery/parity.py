"""How far a changed model is from what it was: logits on calibration tokens before and after."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moestro.core.context import RoutingContext
from moestro.core.errors import DataError
from moestro.core.router import Router
from moestro.core.routing import Routing
from moestro.core.session import Edit, Recorder, session


class AllOn(Edit):
    """Every token goes to all experts with one weight, whatever the router says: under it a cut expert is whole.

    Args:
        sites: mixture layers meant. weight: of every expert.
    """

    def __init__(self, sites: Iterable[str], weight: float) -> None:
        self.sites = frozenset(sites)
        self.weight = weight

    def on_routing(self, site: str, routing: Routing, router: Router, ctx: RoutingContext) -> Routing:
        """See Edit."""
        if site not in self.sites:
            return routing
        expert_TK = torch.arange(routing.num_experts, device=routing.token_N.device).repeat(routing.num_tokens, 1)
        weight_TK = routing.weight_N.new_full(expert_TK.shape, self.weight)
        return Routing.from_topk(
            expert_TK,
            weight_TK,
            num_experts=routing.num_experts,
            num_null=routing.num_null,
            scores=routing.scores,
        )


class Choices:
    """Recorder: which choices the valid tokens made, by site, as [T, C] booleans of one forward after the other."""

    def __init__(self) -> None:
        self.chosen: dict[str, list[Tensor]] = {}

    def record(self, site: str, routing: Routing, ctx: RoutingContext) -> None:
        """See Recorder."""
        table_TC = torch.zeros(routing.num_tokens, routing.num_choices, dtype=torch.bool)
        table_TC[routing.token_N.cpu(), routing.expert_N.cpu()] = True
        if ctx.tokens is not None:
            table_TC = table_TC[ctx.tokens.valid_T.cpu()]
        self.chosen.setdefault(site, []).append(table_TC)

    def changed(self, after: "Choices") -> dict[str, float]:
        """Share of the choices that are others ``after``, by site."""
        found = {}
        for site, tables in self.chosen.items():
            kept = sum(int((one & two).sum()) for one, two in zip(tables, after.chosen[site], strict=True))
            found[site] = 1 - kept / max(1, sum(int(table.sum()) for table in tables))
        return found


def answers(
    model: nn.Module, batches: Iterable[Mapping[str, Any] | Tensor], recorder: Recorder | None = None
) -> list[Tensor]:
    """Logits (hidden states of a model without a head) of each batch's valid tokens, [T, V].

    The model runs in evaluation mode, without gradient.

    Args:
        batches: arguments of the model's forward, or token ids [B, S]. They are kept with their logits: a few hundred
            tokens tell enough.
        recorder: sees every routing.

    Raises:
        DataError: no batches.
    """
    training = model.training
    device = next(model.parameters()).device
    found = []
    model.eval()
    try:
        with torch.no_grad(), session(collect=False, recorder=recorder):
            for batch in batches:
                call = call_of(batch, device)
                found.append(_output(model(**call), call))
    finally:
        model.train(training)
    if not found:
        raise DataError("calib holds no batch; give at least one, or leave it out")
    return found


def call_of(batch: Mapping[str, Any] | Tensor, device: torch.device) -> dict[str, Any]:
    """A batch as arguments of the model's forward."""
    call = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    return {name: v.to(device) if isinstance(v, Tensor) else v for name, v in call.items()}


def _output(result: Any, call: Mapping[str, Any]) -> Tensor:
    values: Tensor = result.logits if getattr(result, "logits", None) is not None else result.last_hidden_state
    mask = call.get("decoder_attention_mask" if "decoder_input_ids" in call else "attention_mask")
    if isinstance(mask, Tensor) and values.dim() == 3 and mask.shape == values.shape[:2]:
        return values[mask.bool()]
    return values.reshape(-1, values.shape[-1])


def difference(before: list[Tensor], after: list[Tensor]) -> dict[str, float | int]:
    """Figures for a receipt.

    ``rows`` compared, ``max_abs_diff`` and ``mean_abs_diff``, ``max_abs_before``: the largest value before, and
    ``max_rel_diff``: the largest difference as a part of it, which is what float32 can promise for large logits.
    """
    pairs = [(b.float(), a.float()) for b, a in zip(before, after, strict=True)]
    gaps = [(b - a).abs() for b, a in pairs]
    largest, scale = max(float(gap.max()) for gap in gaps), max(float(b.abs().max()) for b, _ in pairs)
    return {
        "rows": sum(len(gap) for gap in gaps),
        "max_abs_diff": largest,
        "mean_abs_diff": float(sum(gap.double().sum() for gap in gaps) / sum(gap.numel() for gap in gaps)),
        "max_abs_before": scale,
        "max_rel_diff": largest / scale if scale else 0.0,
    }
