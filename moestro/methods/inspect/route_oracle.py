"""What the best choice of experts would gain: every pattern of choices over the layers is tried on every token.

A pattern gives each routed layer one of C choices (a set of experts, or nulls). For token t with next token y

    oracle(B) = mean_t min over patterns with exactly B layers at choice 0 of -log p(y_t)

The minimum is taken with the label in hand over K = |patterns| noisy candidates, so part of the gain is luck that
grows with K. The *null* measures that part: the best fixed pattern of the budget, run K times with assignments dropped
at random (at the rate whose spread of a token's loss is closest to the patterns'), and the same minimum. An oracle is
never an achievable quality.

Two readings. *Uniform*: the whole sequence runs once per pattern and each token takes its minimum; contexts disagree,
so it is a bound that no run attains. *Sequential*: from left to right, the best pattern of a token is kept before the
next one branches; realisable, but greedy. Ties go to fewer layers at choice 0, then to the lexicographically first.

Source: Duo-LLM (2410.10846, sections 3.2 and 4; token difficulty 4.3). The null, the label-free column and the
sequential reading are ours.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.context import RoutingContext
from moestro.core.errors import ConfigError
from moestro.core.inputs import MeterInputs
from moestro.core.layer import mixture_layers
from moestro.core.report import Report, Table
from moestro.core.router import Router
from moestro.core.routing import Routing
from moestro.core.session import Edit, session


DROPS = (0.02, 0.05, 0.1, 0.2, 0.4)  # rates among which the null's is found
PROBES = 8  # draws by which it is found


class Config(BaseConfig):
    """Settings.

    Attributes:
        choices: the sets of choice ids that a layer may take; the first is the expensive one that budgets count. None:
            every choice of the router by itself. layers: which routed layers vary, by place; None for all, the others
            keep their router's choice.
        null: also run the perturbed patterns. sequential: tokens of the sequential reading, 0 for none.
        max_patterns: refuse more than that.
    """

    choices: list[list[int]] | None = None
    layers: list[int] | None = None
    null: bool = True
    sequential: int = Field(default=0, ge=0)
    max_patterns: int = Field(default=4096, ge=1)


class Force(Edit):
    """Tokens take the choices of ``pattern`` ([L] for all, or [T, L]; a site a column), weighed by the router.

    choices: ids of each. drop, generator: rate at which assignments are dropped, the rest weighing 1 / (1 - drop).
    """

    def __init__(
        self,
        pattern: Tensor,
        sites: Sequence[str],
        choices: Sequence[Sequence[int]],
        drop: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        self.pattern, self.drop, self.generator = pattern, drop, generator
        self.column = {site: place for place, site in enumerate(sites)}
        self.choices = choices

    def on_routing(self, site: str, routing: Routing, router: Router, ctx: RoutingContext) -> Routing:
        """See Edit."""
        if site not in self.column:
            return routing
        choice_T = self.pattern[..., self.column[site]].expand(routing.num_tokens)
        token, expert, weight = [], [], []
        gate_TC = (
            torch.ones(routing.num_tokens, router.num_choices) if routing.scores is None else routing.scores.gate_TC
        )
        for number, ids in enumerate(self.choices):
            at_T = (choice_T == number).nonzero()[:, 0]
            ids_K = torch.tensor(ids, dtype=torch.int64)
            token.append(at_T.repeat_interleave(len(ids)))
            expert.append(ids_K.repeat(len(at_T)))
            weight.append(router.weigh(gate_TC[at_T][:, ids_K]).flatten())
        weight_N = torch.cat(weight)
        if self.drop:
            kept_N = torch.rand(weight_N.shape, generator=self.generator) >= self.drop
            weight_N = weight_N * kept_N / (1 - self.drop)
        return Routing(
            torch.cat(token), torch.cat(expert), weight_N, routing.num_tokens, routing.num_experts, routing.num_null,
            scores=routing.scores,
        )  # fmt: skip


def patterns(num_layers: int, num_choices: int) -> Tensor:
    """All patterns, int64 [C^L, L], by layers at choice 0, then lexicographically."""
    every = sorted(itertools.product(range(num_choices), repeat=num_layers), key=lambda p: (p.count(0), p))
    return torch.tensor(every, dtype=torch.int64).view(len(every), num_layers)


def first_minimum(loss_PN: Tensor) -> tuple[Tensor, Tensor]:
    """Least loss of each token and the first pattern that has it, [N] each."""
    best_N = loss_PN.amin(0)
    rank_P1 = torch.arange(len(loss_PN))[:, None]
    place_N = torch.where(loss_PN == best_N, rank_P1, len(loss_PN)).amin(0)
    return best_N, place_N


def next_token(model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Loss of every next token that is there and the entropy of its prediction, float32 [N] each."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    log_p = model(**batch).logits[:, :-1].float().log_softmax(-1)
    there = torch.ones_like(ids[:, 1:], dtype=torch.bool) if mask is None else (mask[:, 1:] * mask[:, :-1]).bool()
    loss = -log_p.gather(-1, ids[:, 1:, None])[..., 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    return loss[there], entropy[there]


@dataclass(frozen=True)
class Subject:
    """A model with the layers that vary and their choices."""

    model: Any
    batches: Sequence[Mapping[str, Any]]
    sites: tuple[str, ...]
    choices: tuple[tuple[int, ...], ...]

    def losses(self, pattern: Tensor | None, **noise: Any) -> tuple[Tensor, Tensor]:
        """Losses and entropies [N] of all tokens under one pattern (None: the router's own choices)."""
        edits = [] if pattern is None else [Force(pattern, self.sites, self.choices, **noise)]
        with torch.no_grad(), session(edits=edits):
            parts = [next_token(self.model, batch) for batch in self.batches]
        return torch.cat([loss for loss, _ in parts]), torch.cat([entropy for _, entropy in parts])


def subject_of(inputs: MeterInputs, config: Config) -> Subject:
    """The model's routed layers as the settings want them, or a ConfigError that says what cannot be tried."""
    batches = list(inputs.batches)
    if not batches:
        raise ConfigError("route_oracle compares losses; give texts to predict")
    layers = list(mixture_layers(inputs.model).values())
    wanted = list(range(len(layers))) if config.layers is None else config.layers
    if not wanted or not set(wanted) <= set(range(len(layers))) or len(set(wanted)) < len(wanted):
        raise ConfigError(f"layers={config.layers}; the model has {len(layers)} routed layers, from 0, each once")
    counts = {layers[place].router.num_choices for place in wanted}
    if config.choices is None and len(counts) > 1:
        raise ConfigError(f"layers have {sorted(counts)} choices; name the ones to try in choices")
    choices = [[i] for i in range(min(counts))] if config.choices is None else config.choices
    if not choices or any(not ids or set(ids) - set(range(min(counts))) or len(set(ids)) < len(ids) for ids in choices):
        raise ConfigError(f"choices={choices}; every one is a set of ids from 0 to {min(counts) - 1}")
    total = len(choices) ** len(wanted)
    if total > config.max_patterns:
        raise ConfigError(
            f"{len(choices)} choices in {len(wanted)} layers make {total} patterns, over max_patterns="
            f"{config.max_patterns}; let fewer layers or choices vary"
        )
    sites = tuple(layers[place].site for place in wanted)
    return Subject(inputs.model, batches, sites, tuple(tuple(ids) for ids in choices))


def matching_drop(subject: Subject, base: Tensor, spread: float, draw: torch.Generator) -> float:
    """The rate of ``DROPS`` at which a token's loss spreads most like over the patterns."""

    def distance(drop: float) -> float:
        probes = [subject.losses(base, drop=drop, generator=draw)[0] for _ in range(PROBES)]
        return abs(float(torch.stack(probes).std(0).mean()) - spread)

    return min(DROPS, key=distance)


def budget_rows(
    every: Tensor, loss_PN: Tensor, entropy_PN: Tensor, null: Callable[[Tensor, int, float], Tensor] | None
) -> list[list[Any]]:
    """One row a budget; the best fixed pattern is chosen on the even tokens for the odd ones and vice versa."""
    rows = []
    count_P = (every == 0).sum(1)
    for budget in torch.unique(count_P).tolist():
        at_P = count_P == budget
        loss, entropy = loss_PN[at_P], entropy_PN[at_P]
        even, odd = loss[:, ::2], loss[:, 1::2]
        chosen_on_odd = even[odd.mean(1).argmin()] if odd.shape[1] else even[0]
        fixed = torch.cat([chosen_on_odd, odd[even.mean(1).argmin()]]).mean()
        by_entropy = loss.gather(0, entropy.argmin(0, keepdim=True)).mean()
        base = every[at_P][loss.mean(1).argmin()]
        spread = float(loss.std(0).mean()) if len(loss) > 1 else 0.0
        luck = None if null is None else float(null(base, len(loss), spread).mean())
        numbers = [float(first_minimum(loss)[0].mean()), luck, float(by_entropy), float(fixed), float(loss.mean())]
        rows.append([budget, len(loss), *numbers, spread])
    return rows


def sequential(subject: Subject, every: Tensor, limit: int) -> tuple[float, float, int]:
    """Mean loss of the greedy oracle from left to right, of the router on the same tokens, and their number."""
    total = own = 0.0
    done = 0
    for batch in subject.batches:
        mask = batch.get("attention_mask")
        for row, sequence in enumerate(batch["input_ids"]):
            ids = sequence if mask is None else sequence[mask[row].bool()]
            kept = every.new_zeros(0, every.shape[1])
            steps = min(len(ids) - 1, limit - done)
            for t in range(steps):
                loss_P = _branch(subject, ids[: t + 2], kept, every)
                best, place = first_minimum(loss_P[:, None])
                kept = torch.cat([kept, every[place]])
                total += float(best)
            if steps > 0:
                with torch.no_grad():
                    own += float(next_token(subject.model, {"input_ids": ids[None, : steps + 1]})[0].sum())
            done += max(steps, 0)
            if done >= limit:
                return total / done, own / done, done
    return total / max(done, 1), own / max(done, 1), done


def _branch(subject: Subject, ids: Tensor, kept: Tensor, every: Tensor, rows: int = 64) -> Tensor:
    """Loss [P] of the last id: earlier tokens took the patterns ``kept``, the one before it takes each of all."""
    losses = []
    for part in torch.split(every, rows):
        table = torch.cat([kept.expand(len(part), *kept.shape), part[:, None]], 1)
        edit = Force(table.flatten(0, 1), subject.sites, subject.choices)
        with torch.no_grad(), session(edits=[edit]):
            logits = subject.model(input_ids=ids[:-1].expand(len(part), -1)).logits[:, -1].float()
        losses.append(-logits.log_softmax(-1)[:, ids[-1]])
    return torch.cat(losses)


def measure(subject: MeterInputs, config: Config) -> Report:
    """Run the model once for every pattern (and null draw) and report; ConfigError: see ``subject_of``."""
    given = subject_of(subject, config)
    every = patterns(len(given.sites), len(given.choices))
    runs = [given.losses(pattern) for pattern in every]
    loss_PN, entropy_PN = (torch.stack(part) for part in zip(*runs, strict=True))
    draw = torch.Generator().manual_seed(subject.seed)

    def null(base: Tensor, count: int, spread: float) -> Tensor:
        if count == 1:
            return given.losses(base)[0]
        drop = matching_drop(given, base, spread, draw)
        return torch.stack([given.losses(base, drop=drop, generator=draw)[0] for _ in range(count)]).amin(0)

    rows = budget_rows(every, loss_PN, entropy_PN, null if config.null else None)
    best_N, place_N = first_minimum(loss_PN)
    last_N = loss_PN[(every == len(given.choices) - 1).all(1)][0]  # every layer at its last choice
    gain_N = last_N - best_N
    hard_N = last_N >= last_N.quantile(0.75)
    numbers = {
        "router loss": float(given.losses(None)[0].mean()),
        "first choice everywhere": float(loss_PN[(every == 0).all(1)][0].mean()),
        "last choice everywhere": float(last_N.mean()),
        "oracle": float(best_N.mean()),
        "best budget of the oracle": float(min(rows, key=lambda row: row[2])[0]),
        "share of hard tokens that gain little": float((gain_N[hard_N] < gain_N.median()).float().mean()),
        "patterns": float(len(every)),
        "tokens": float(loss_PN.shape[1]),
    }
    if config.null:
        numbers["best budget of the null"] = float(min(rows, key=lambda row: row[3])[0])
    if config.sequential:
        greedy, own, count = sequential(given, every, config.sequential)
        numbers |= {"sequential oracle": greedy, "sequential router": own, "sequential tokens": float(count)}
    columns = ["budget", "patterns", "oracle", "null", "by entropy", "best fixed", "mean of all", "spread"]
    usage = [
        [place, site, float((every[place_N, place] == 0).float().mean())] for place, site in enumerate(given.sites)
    ]
    return Report(
        method="inspect.route_oracle",
        config=config.model_dump(mode="json"),
        subject=subject.name,
        numbers=numbers,
        tables={
            "budgets": Table(columns=columns, rows=rows),
            "usage": Table(columns=["place", "site", "share at the first choice"], rows=usage),
        },
        notes={"reading": "uniform: the minimum over whole runs, with the label in hand; not an achievable quality"},
    )


CARD = MethodCard(
    title="Duo-LLM: A Framework for Studying Adaptive Computation in Large Language Models",
    year=2024,
    arxiv="2410.10846",
    paper="duo-llm",
    summary="The best pattern of experts for every token with the answer known, and how much of it is luck.",
    taxonomy="inspection/measurement",
    needs=("model", "data"),
    deviations=("a null of perturbed runs, a label-free choice and a sequential reading stand beside the oracle",),
)
