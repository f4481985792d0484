"""Every training method that builds a router or a layer, against top-k with as many real assignments.

A ragged router has no equal among fixed k, so its peer is a top-k model whose choice is replaced by the one the method
made on the same tokens: as many assignments, on experts as many and of as many operations each. What a method costs
beyond its experts (its scores, its choice, shared branches, projections, losses) is then the difference. What stands
elsewhere than at a feed-forward (an attention, a block) is compared with the plain top-k model it is added to.

Methods are found by walking the tree. Settings with the names ``num_experts``, ``top_k`` and ``expert_size`` get the
sizes of the benchmark where the method takes them and stays near plain top-k in operations; everything else is as the
method has it. Where even that is many times as much, both arms take fewer rows. Both take the whole step: forward with
routing losses, backward, fused AdamW at rate 0, so that every round routes the same tokens alike.
"""

import ctypes
import logging
import math
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import combinations
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moestro.core.context import RoutingContext
from moestro.core.cost import RowCounter, Work, cost
from moestro.core.errors import ConfigError, MoestroError
from moestro.core.layer import MoELayer
from moestro.core.losses import RoutingLoss
from moestro.core.memory import peak_bytes, restart_peak
from moestro.core.registry import infos, method
from moestro.core.router import Router
from moestro.core.routing import Routing
from moestro.core.session import Edit, session
from moestro.core.site import Shared, SiteKind
from moestro.models.load import adopt
from moestro.models.sites import sites
from moestro.models.swap import swap
from moestro.testing.bench._feed_forwards import DENSE, Layers, cases, spread
from moestro.testing.bench.harness import Row, interleave, time_rows
from moestro.testing.contracts import example_values
from moestro.training.size import size_of


KINDS: tuple[SiteKind, ...] = ("mlp", "attention", "block", "linear", "embedding", "head", "stack")
REPLAYED, EQUAL, ALONE = "top-k, replayed", "top-k of equal operations", "top-k alone"
NEAR = 4
M_MMAP_THRESHOLD = -3  # of malloc.h
PHASES = {"stage soft, cold": {"stage": "soft", "progress": 1.0}, "stage hard": {"stage": "hard", "progress": 1.0}}
Assignments = tuple[NDArray[np.int64], NDArray[np.int64]]


@dataclass(frozen=True)
class Shape:
    """A decoder and its batch; ``experts`` of width ``inner``, ``top_k`` a token, where a method leaves it open."""

    layers: int = 4
    hidden: int = 256
    experts: int = 32
    inner: int = 128
    top_k: int = 4
    heads: int = 4
    vocabulary: int = 512
    rows: int = 8
    length: int = 128

    @property
    def tokens(self) -> int:
        """Of a batch."""
        return self.rows * self.length

    @property
    def mixture(self) -> dict[str, Any]:
        """Settings of ``train.moe`` for plain top-k of these sizes."""
        router = {"method": "train.softmax_topk", "config": {"top_k": self.top_k}}
        return {"num_experts": self.experts, "expert_size": self.inner, "router": router}


@dataclass(frozen=True)
class Case:
    """Where and with which settings a method stands in the benchmark, and how many rows its batch has if fewer."""

    id: str
    kind: SiteKind
    config: Mapping[str, Any]
    routes: bool
    rows_of_batch: int | None = None
    note: str = ""

    def step(self, shape: Shape) -> "Step":
        """What is timed."""
        return Step(self.model(shape), shape)

    def model(self, shape: Shape) -> Any:
        """The decoder with the method in every layer."""
        model = decoder(shape)
        if self.routes and "num_experts" in method(self.id).config_type.model_fields:
            # The layer fills the number in and builds the router where a dense layer stands: nothing to take over.
            count = method(self.id).configure(dict(self.config)).num_experts  # type: ignore[attr-defined]
            rest = {name: value for name, value in self.config.items() if name != "num_experts"}
            router = {"method": self.id, "config": rest}
            swap(model, "train.moe", {**shape.mixture, "num_experts": count, "router": router})
        else:
            if self.routes or self.kind != "mlp":
                swap(model, "train.moe", shape.mixture)
            swap(model, self.id, self.config, kind=self.kind)
        return spread(model)


@dataclass
class Seen:
    """Recorder: the real assignments of each site in one forward."""

    experts: dict[str, int] = field(default_factory=dict)
    assignments: dict[str, Assignments] = field(default_factory=dict)

    def record(self, site: str, routing: Routing, ctx: RoutingContext) -> None:
        """Take one layer's routing."""
        real = routing.real()
        self.experts[site] = routing.num_experts
        self.assignments[site] = (real.token_N.numpy(), real.expert_N.numpy())


@dataclass(frozen=True)
class Peer:
    """The top-k model that stands against a method: settings of ``train.moe`` by layer, and what it must choose."""

    mixture: Mapping[str, Any]
    assignments: Mapping[str, Assignments] = field(default_factory=dict)

    def step(self, shape: Shape) -> "Step":
        """What is timed."""
        return Step(self.model(shape), shape, (Replayed(self.assignments),))

    def model(self, shape: Shape) -> Any:
        """The decoder with a mixture in every layer."""
        model = decoder(shape)
        swap(model, "train.moe", self.mixture)
        return spread(model)


Part = Case | Peer | Layers


class Replayed(Edit):
    """Forces assignments; the weights are the router's own gates of these pairs, summing to 1 for each token."""

    def __init__(self, assignments: Mapping[str, Assignments]) -> None:
        self.assignments = {
            site: (torch.from_numpy(token_N), torch.from_numpy(expert_N))
            for site, (token_N, expert_N) in assignments.items()
        }

    def on_routing(self, site: str, routing: Routing, router: Router, ctx: RoutingContext) -> Routing:
        """See Edit."""
        if site not in self.assignments:
            return routing
        token_N, expert_N = self.assignments[site]
        assert routing.scores is not None
        gate_N = routing.scores.gate_TC[token_N, expert_N]
        total_T = gate_N.new_zeros(routing.num_tokens).index_add(0, token_N, gate_N)
        weight_N = gate_N / total_T[token_N]
        return routing.replace(token_N=token_N, expert_N=expert_N, weight_N=weight_N, top_k=None)


class Step:
    """One training step of a model on one batch; every call draws the same random numbers."""

    def __init__(self, model: Any, shape: Shape, edits: tuple[Edit, ...] = ()) -> None:
        self.model, self.edits = model.train(), edits
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
        self.ids = batch(shape)

    def __call__(self) -> None:
        self.loss().backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def loss(self) -> Tensor:
        """The model's loss and, lightly, those of its routers."""
        torch.manual_seed(1)
        with session(edits=self.edits, collect=True) as opened:
            loss: Tensor = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
            for ctx in opened.take():
                for term in ctx.losses.values():
                    loss = loss + 0.01 / self.ids.numel() * term.total
        return loss

    @torch.no_grad()
    def look(self) -> tuple[Seen, RowCounter]:
        """Which assignments a step makes."""
        seen, rows = Seen(), RowCounter()
        with session(recorder=seen), session(recorder=rows):
            self.loss()
        return seen, rows


def batch(shape: Shape) -> Tensor:
    """Token ids [B, S]."""
    return torch.randint(shape.vocabulary, (shape.rows, shape.length), generator=torch.Generator().manual_seed(0))


def decoder(shape: Shape) -> Any:
    """A dense decoder whose feed-forwards make room for mixtures."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner * shape.top_k,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        head_dim=shape.hidden // shape.heads,
        tie_word_embeddings=True,
    )
    return adopt(Qwen3ForCausalLM(config))


def find(method_id: str, shape: Shape) -> Case | None:
    """The first kind of site that a method takes, with the most of the benchmark's sizes; None for a loss.

    Sizes that make a model of over NEAR times the operations of plain top-k, or under a NEARth, are the last resort.

    Raises:
        ConfigError: no site takes it; says what was wrong with the last try.
    """
    subject, last = method(method_id), "there is no kind of site to try"
    one = replace(shape, rows=1)
    plain = flops_of(Peer(shape.mixture).model(one), one)
    far: list[tuple[float, Case]] = []
    for kind in KINDS:
        for values in sizes(method_id, shape):
            try:
                built = subject.build(sites(decoder(one), kind)[0], subject.configure(values), Shared())
                if isinstance(built, RoutingLoss):
                    return None
                case = Case(method_id, kind, values, isinstance(built, Router))
                times = flops_of(case.model(one), one) / plain
            except MoestroError as error:
                last = str(error)
                continue
            if 1 / NEAR <= times <= NEAR:
                return case
            far.append((times, replace(case, rows_of_batch=max(1, int(shape.rows * min(1, NEAR / times))))))
        if far:
            return min(far, key=lambda found: abs(math.log(found[0])))[1]
    raise ConfigError(f"{method_id}: cannot stand in the benchmark: {last}")


def flops_of(model: Any, shape: Shape) -> float:
    """Operations of a forward for one token, with the assignments of one batch."""
    rows = Step(model, shape).look()[1]
    return size_of(model, shape.length, rows=rows.per_token()).forward_flops


def sizes(method_id: str, shape: Shape) -> Iterator[dict[str, Any]]:
    """Settings to try: the benchmark's sizes, then fewer of them."""
    subject = method(method_id)
    wanted = {"num_experts": shape.experts, "top_k": shape.top_k, "expert_size": shape.inner}
    names = [name for name in wanted if name in subject.config_type.model_fields]
    for count in range(len(names), -1, -1):
        for chosen in combinations(names, count):
            yield example_values(subject) | {name: wanted[name] for name in chosen}


def peer_of(case: Case, model: Any, seen: Seen, rows: RowCounter, shape: Shape) -> Peer:
    """The top-k model with the assignments of a method, on experts of as many operations.

    A layer that makes no assignments, or none under its own name (product keys route each axis apart), gets ``top_k``
    experts of the operations it has in all, chosen freely among as many as its parameters suffice for.
    """
    if case.kind != "mlp":
        return Peer(shape.mixture)
    work = Work(shape.length, rows=rows.per_token())
    found: dict[str, list[Any]] = {"num_experts": [], "expert_size": [], "router": []}
    assignments = {}
    for place in sites(model, "mlp"):
        each, flops, made = float(shape.top_k), cost(place.module, work), seen.assignments.get(place.path)
        held = sum(parameter.numel() for parameter in place.module.parameters())
        if isinstance(place.module, MoELayer):
            bank = place.module.bank
            flops = sum(n * bank.flops_per_row(e) for e, n in enumerate(work.rows_of(place.path, place.module.router)))
        if made is not None and len(made[0]):
            each, assignments[place.path] = len(made[0]) / shape.tokens, made
        size = max(1, round(flops / each / (6 * shape.hidden)))
        experts = max(shape.top_k, min(shape.experts, round(held / (3 * shape.hidden * size))))
        experts = seen.experts[place.path] if place.path in assignments else experts
        top_k = min(max(1, round(each)), experts)  # the router's own choice, which is made and then replaced
        found["num_experts"].append(experts)
        found["expert_size"].append(size)
        config = {"top_k": top_k, "renormalise": top_k > 1}
        found["router"].append({"method": "train.softmax_topk", "config": config})
    return Peer({name: {"per_layer": values} for name, values in found.items()}, assignments)


def compare(method_id: str, shape: Shape, rounds: int) -> list[Row]:
    """Time and memory of one method; no rows for a loss."""
    case = find(method_id, shape)
    return [] if case is None else measure(case, shape, rounds)


def measure(case: Case, shape: Shape, rounds: int) -> list[Row]:
    """Time and memory of a case."""
    shape = replace(shape, rows=case.rows_of_batch or shape.rows)
    ours = case.step(shape)
    seen, rows = ours.look()
    peer = peer_of(case, ours.model, seen, rows, shape)
    theirs = peer.step(shape)
    replayed, peer_rows = theirs.look()
    for site, (token_N, _) in peer.assignments.items():
        count = len(replayed.assignments[site][0])
        assert count == len(token_N), f"{case.id}: {site} replays {count} assignments of {len(token_N)}"
    text = words(case, ours.model, theirs.model, rows, peer_rows, shape)
    name = REPLAYED if peer.assignments else EQUAL if case.kind == "mlp" else ALONE
    found = time_rows(text, "training step", interleave({"ours": ours, name: theirs}, rounds))
    return found + memory_rows(text, "peak memory of training", case, peer, name, shape)


def measure_layers(layers: Layers, shape: Shape, rounds: int) -> list[Row]:
    """Time and memory of layers alone, against dense ones."""
    found = layers.time(rounds)
    return found + memory_rows(found[0].case, "peak memory of a step", layers, layers.twin(), DENSE, shape)


def memory_rows(text: str, metric: str, ours: Part, theirs: Part, name: str, shape: Shape) -> list[Row]:
    """Peak memory of both; none where it cannot be read."""
    if sys.platform != "linux":
        return []
    mine, other = (memory(part, shape) / 1e6 for part in (ours, theirs))
    return [Row(text, metric, "MB", mine, name, other, other / mine, 0.0)]


def words(case: Case, mine: Any, theirs: Any, rows: RowCounter, peer_rows: RowCounter, shape: Shape) -> str:
    """What is compared: experts, assignments, operations of a token on both sides."""
    flops = [
        size_of(model, shape.length, rows=measured.per_token()).forward_flops / 1e6
        for model, measured in ((mine, rows), (theirs, peer_rows))
    ]
    experts = sorted({len(counts) for counts in rows.counts.values()})
    each = sum(sum(n) for n in rows.per_token().values()) / max(1, len(rows.counts))
    routed = f"{'-'.join(str(n) for n in experts)} experts, {each:.2f} a token" if experts else "no assignments"
    if case.kind == "mlp" and not any(place.path in rows.counts for place in sites(mine, "mlp")):
        routed = routed.replace("experts", "choices")  # the axes of product keys: an expert is a pair of choices
    place = "" if case.kind == "mlp" else f" at the {case.kind}"
    place += f" in {case.note}" if case.note else ""
    place += f" on {case.rows_of_batch} rows" if case.rows_of_batch is not None else ""
    return f"{case.id}{place}: {routed}, {flops[0]:.2f} MFLOP a token against {flops[1]:.2f}"


def memory(part: Part, shape: Shape) -> int:
    """Bytes by which a process rises that trains one arm: weights, gradients, moments, activations.

    Each arm has a process of its own, forked from one that computed nothing. A first step of a tiny model brings what
    every process loads once.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["transformers.models.qwen3.modeling_qwen3", __name__])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_rise, part, shape, torch.get_num_threads()).result()


def _rise(part: Part, shape: Shape, threads: int) -> int:
    torch.set_num_threads(threads)
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)  # what is freed goes back: the peak is that of what lives
    small = Shape(layers=1, hidden=16, experts=2, inner=8, top_k=2, heads=2, rows=1, length=8)
    Step(Peer(small.mixture).model(small), small)()
    before, step = restart_peak(), part.step(shape)
    for _ in range(2):
        step()
    return peak_bytes() - before


def run(rounds: int) -> list[Row]:
    """All methods of the stage, those of other packages too."""
    shape, rows = Shape(), []
    for method_id, info in infos().items():
        if info.stage == "train" and "build" in info.entries:
            try:
                rows += compare(method_id, shape, rounds)
            except ConfigError as error:
                logging.getLogger("moestro").warning("left out: %s", error)
    for part in further(shape):
        rows += measure(part, shape, rounds) if isinstance(part, Case) else measure_layers(part, shape, rounds)
    return rows


def further(shape: Shape) -> list[Case | Layers]:
    """What the settings of ``find`` do not show: the sparse phases of a gate that begins dense, layers of pairs."""
    gates = [
        Case("train.evomoe", "mlp", {"num_experts": shape.experts, **phase}, routes=True, note=name)
        for name, phase in PHASES.items()
    ]
    return [*gates, *cases()]
