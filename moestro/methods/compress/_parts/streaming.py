"""Second moments of the experts' inputs without holding those of all experts: from a flat buffer of a layer's tokens.

One layer at a time: every batch runs through the block once, and the mixture's input rows are kept as one buffer [T, D]
in main memory with the choices of all tokens, sorted by expert. When a group of experts is about to be rounded, and not
before, the rows of each are gathered and

    H_e = sum over its rows of  v x x^T,    v = 1, or the square of the routing weight,

is computed for the matrix that is wanted: x is the layer's input for gate and up, and for down what the expert's first
matrices, not packed yet, make of it. An expert that many tokens chose is measured on some of them, at even distances in
the order of the data. Padding is never in the buffer; nor are positions that ``Streaming`` is told to skip.

Source: QMoE (2310.16795, section 3.1: list buffer, lazy weights, groups of experts; section 3.3: special tokens).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moestro.core.bank import StackedFFN
from moestro.core.context import RoutingContext
from moestro.core.errors import PlanError
from moestro.core.layer import MoELayer, mixture_layers
from moestro.core.routing import Routing
from moestro.core.session import session
from moestro.core.tokens import Tokens
from moestro.methods.compress._parts.gptq import GPTQ
from moestro.observe import calibrate, coverage, layerwise
from moestro.observe.statistics import hidden_rows
from moestro.surgery.rounding import Batches, Seen, Visit


UNLABELLED = -100


@dataclass
class TokenBuffer:
    """The tokens of one layer. x_TD: its input rows, in main memory. token_N, weight_N: assignments by expert, those of
    expert e from ``start_E[e]`` to ``start_E[e + 1]``."""

    x_TD: Tensor
    token_N: Tensor
    weight_N: Tensor
    start_E: list[int]

    @property
    def count_E(self) -> Tensor:
        """Assignments of each expert, int64 [E]."""
        start_E = torch.tensor(self.start_E)
        return start_E[1:] - start_E[:-1]

    def rows(self, expert: int, most: int) -> tuple[Tensor, Tensor]:
        """At most so many rows [n, D] of an expert, at even distances, and their routing weights [n]."""
        token_N = self.token_N[self.start_E[expert] : self.start_E[expert + 1]]
        weight_N = self.weight_N[self.start_E[expert] : self.start_E[expert + 1]]
        if len(token_N) > most:
            some = torch.arange(most) * len(token_N) // most
            token_N, weight_N = token_N[some], weight_N[some]
        return self.x_TD[token_N], weight_N


def skipped(tokens: Tokens, special: Sequence[int], where: Literal["at", "before", "both"]) -> Tensor:
    """Positions [T] that hold a special token, or that stand right before one in their row."""
    if tokens.ids_T is None:
        raise PlanError("skip_tokens are token ids, but the model was called with embeddings; calibrate on ids")
    at_T = torch.isin(tokens.ids_T, torch.tensor(list(special), device=tokens.ids_T.device))
    before_T = torch.zeros_like(at_T)
    before_T[:-1] = at_T[1:] & (tokens.row_T[1:] == tokens.row_T[:-1])
    return {"at": at_T, "before": before_T, "both": at_T | before_T}[where]


class _Filler:
    """Recorder: a layer's input rows and choices, forward after forward."""

    def __init__(self, layer: MoELayer, run: "Streaming", batches: Batches) -> None:
        self.layer, self.run, self.batches = layer, run, batches
        self.rows: list[Tensor] = []
        self.chosen: list[tuple[Tensor, Tensor, Tensor]] = []
        self.reached = 0
        self.forwards = 0

    def record(self, site: str, routing: Routing, ctx: RoutingContext) -> None:
        """See Recorder. The layer kept its input for the session before it routed."""
        if site != self.layer.site or ctx.tokens is None:
            return
        keep_T = ctx.tokens.valid_T.clone()
        if self.run.skip_tokens:
            keep_T &= ~skipped(ctx.tokens, self.run.skip_tokens, self.run.skip)
        if self.run.skip_unlabelled:
            keep_T &= self.batches[self.forwards]["labels"].to(keep_T.device).flatten() != UNLABELLED
        self.forwards += 1
        x_TD = ctx.kept[site, "input"].detach()
        x_TD = x_TD if self.layer.pre is None else self.layer.pre(x_TD)
        real = routing.real()
        live_N = keep_T[real.token_N]
        place_T = keep_T.cumsum(0) - 1 + self.reached
        self.rows.append(x_TD[keep_T].cpu())
        self.reached += len(self.rows[-1])
        chosen = (real.expert_N[live_N], place_T[real.token_N[live_N]], real.weight_N[live_N])
        self.chosen.append((chosen[0].cpu(), chosen[1].cpu(), chosen[2].cpu()))

    def buffer(self) -> TokenBuffer:
        """All forwards as one."""
        expert_N, token_N, weight_N = (torch.cat(part) for part in zip(*self.chosen, strict=True))
        order_N = expert_N.argsort(stable=True)
        count_E = torch.bincount(expert_N, minlength=self.layer.bank.num_experts)
        start_E = [0, *count_E.cumsum(0).tolist()]
        return TokenBuffer(torch.cat(self.rows), token_N[order_N], weight_N[order_N].float(), start_E)


@dataclass
class Streaming(GPTQ):
    """A ``Rounding`` by batched GPTQ that computes second moments when they are wanted.

    Attributes:
        percdamp, blocksize, batch: see GPTQ. max_tokens_mul: an expert is measured on at most so many times the tokens
            that each of E experts would get under an even load. gate_weighted: weigh rows by the square of their
            routing weight. skip_tokens: ids that are left out ``at`` their own position, ``before`` it, or both.
            skip_unlabelled: leave out positions whose label is -100, as chat templates mark prompts.
        least: tokens below which an expert is starved. allow_starved: go on with half or more of a layer's experts
            starved. Of an open model all layers are counted before the first is packed; from a disk, which is read
            once, each layer when its turn comes.
    """

    percdamp: float = 0.1
    max_tokens_mul: float = 4.0
    gate_weighted: bool = False
    skip_tokens: tuple[int, ...] = ()
    skip: Literal["at", "before", "both"] = "at"
    skip_unlabelled: bool = False
    least: int = 1
    allow_starved: bool = True

    def walk(
        self, model: nn.Module, batches: Batches, layers: Mapping[int, str], enter: Visit | None, leave: Visit | None
    ) -> Iterator[tuple[int, Seen]]:
        """See Rounding.

        Raises:
            PlanError: positions cannot be told apart as the settings ask, or half of a layer's experts are starved.
        """
        if self.skip_unlabelled:
            _check_labels(model, batches)
        if enter is None and not self.allow_starved:
            found = calibrate(model, batches, least=self.least, allow_starved=True)
            for row in found.coverage():
                if row.poor:
                    raise row.refusal(found.stats.num_tokens, "as routed")
        by_site = {site: layer for layer, site in layers.items()}
        for step in layerwise(model, batches, enter=enter, leave=leave):
            inside = {site: layer for site, layer in mixture_layers(step.block).items() if site in by_site}
            for site, layer in inside.items():
                filler = _Filler(layer, self, batches)
                with session(recorder=filler, keeps=["input"]):
                    step.run(keep=False)
                buffer = filler.buffer()
                (row,) = coverage({site: buffer.count_E}, self.least)
                if enter is not None and row.poor and not self.allow_starved:
                    raise row.refusal(len(buffer.x_TD), "as routed")
                yield by_site[site], self.seen(layer, buffer)

    def seen(self, layer: MoELayer, buffer: TokenBuffer) -> Seen:
        """What surgery asks for while it packs the layer; the layer's own experts are still floats then."""
        bank = layer.bank
        assert isinstance(bank, StackedFFN)
        most = max(1, round(self.max_tokens_mul * len(buffer.token_N) / bank.num_experts))

        def gram(expert: int, projection: str) -> Tensor:
            rows_ND, weight_N = buffer.rows(expert, most)
            rows_ND, weight_N = rows_ND.to(bank.down_proj.device), weight_N.to(bank.down_proj.device)
            with torch.no_grad():
                if projection == "down":
                    rows_ND = hidden_rows(bank, expert, rows_ND)
            rows_ND = rows_ND.float()
            if self.gate_weighted:
                rows_ND = rows_ND * weight_N[:, None]
            return rows_ND.T @ rows_ND

        return Seen(buffer.count_E, gram)


def _check_labels(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> None:
    if getattr(model.config, "is_encoder_decoder", False):
        raise PlanError(
            "skip_unlabelled needs labels of the input, which encoder-decoder models have of the output only"
        )
    for number, batch in enumerate(batches):
        labels, ids = batch.get("labels"), batch.get("input_ids")
        if labels is None or ids is None or labels.shape != ids.shape:
            raise PlanError(f"skip_unlabelled needs labels [B, S] like input_ids; calibration batch {number} has none")
