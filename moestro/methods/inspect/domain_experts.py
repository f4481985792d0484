"""Which experts belong to a domain, and what a model forgets when they are masked.

For texts of domains D, s_D(e) is the mean weight that a router gives expert e of its layer over the domain's tokens,
padding left out; for product keys (routings ``<site>.first`` and ``<site>.second``), whose experts are pairs,

    s_D(i, j) = mean over tokens of sum_h g1_hi g2_hj

Expert e belongs to D if s_D(e) > 0 and s_D(e) >= ratio * max over D' != D of s_D'(e). Masking takes a domain's experts
out of every layer; their weight goes to nobody. With L the next-token loss,

    change(D, D') = L of D' with the experts of D masked - L of D' in nats,
    selectivity(D) = change(D, D) / max(mean of change(D, D') over D' != D, 0.001)

beside it the change when as many experts of each layer, drawn at random, are masked. A batch says its domain under the
key ``domain``; batches that do not are the domain ``name``, or a domain each if nothing else gives a second one.

Source: Monet (2412.04139, section 5: domains, programming languages). The random control and the selectivity are ours.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.context import RoutingContext
from moestro.core.errors import ConfigError
from moestro.core.inputs import MeterInputs
from moestro.core.layer import mixture_layers
from moestro.core.report import Report, Table
from moestro.core.routing import Routing
from moestro.core.session import Edit, session
from moestro.methods.inspect._parts.next_token import Batch, loss, valid_tokens


Masks = dict[str, Tensor]  # site -> bool over its experts, [E] or [n, n], True for those that go
FLOOR, MOST_DOMAINS = 1e-3, 16  # nats that count as no change at all; domains in one report


class Config(BaseConfig):
    """Settings.

    Attributes:
        ratio: how much more a domain must use an expert than any other does. name: of the domain of unlabelled batches.
        against: further domains, name -> a text source, read with the tokenizer that lies beside the model.
        tokens: of each of those at most. listed: experts to list for each domain, the most used first.
    """

    ratio: float = Field(default=2.0, gt=1)
    name: str = "data"
    against: dict[str, str] = Field(default_factory=dict)
    tokens: int = Field(default=20_000, ge=2)
    listed: int = Field(default=20, ge=0)


def pair_layers(model: nn.Module) -> dict[str, Tensor]:
    """Layers whose experts are pairs of halves: site -> ``open``, bool [n, n], False for experts that are masked."""
    found = ((module, getattr(module, "open", None)) for module in model.modules() if hasattr(module, "is_mixture"))
    return {str(module.site): there for module, there in found if isinstance(there, Tensor)}


def sizes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Site -> shape of its experts, (E,) or (n, n).

    Raises:
        ConfigError: the model has no mixture layer.
    """
    plain = {site: (layer.router.num_experts,) for site, layer in mixture_layers(model).items()}
    pairs = {site: tuple(there.shape) for site, there in pair_layers(model).items()}
    if not plain and not pairs:
        raise ConfigError(f"{type(model).__name__} has no mixture layer; load one with moestro.load")
    return {**plain, **pairs}


class Scorer:
    """Recorder: the weight that each expert got, summed over valid tokens; ``total`` site -> [E] or [n, n]."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.total = {site: torch.zeros(shape, dtype=torch.float64) for site, shape in shapes.items()}
        self.tokens = 0
        self._first: dict[str, Tensor] = {}

    @torch.no_grad()
    def record(self, site: str, routing: Routing, ctx: RoutingContext) -> None:
        """See Recorder. The two axes of a layer come one after the other."""
        assert ctx.tokens is not None
        owner, _, axis = site.rpartition(".")
        real = routing.real()
        live_N = ctx.tokens.valid_T[real.token_N]
        where = real.token_N[live_N], real.expert_N[live_N]
        weight_N = real.weight_N[live_N].float()
        if len(self.total.get(site, ())) and self.total[site].ndim == 1:
            self.total[site].index_add_(0, where[1].cpu(), weight_N.double().cpu())
        elif axis in ("first", "second") and owner in self.total:
            dense_TC = weight_N.new_zeros(routing.num_tokens, routing.num_experts).index_put(where, weight_N)
            rows_XC = dense_TC.view(-1, self.total[owner].shape[0])  # token by token, head by head
            if axis == "first":
                self._first[owner] = rows_XC
            else:
                self.total[owner] += (self._first.pop(owner).T @ rows_XC).double().cpu()


def expert_scores(model: nn.Module, domains: Mapping[str, Sequence[Batch]]) -> dict[str, Tensor]:
    """Site -> mean weight of every expert in every domain, float64 [domains, E] or [domains, n, n]."""
    found = []
    for batches in domains.values():
        scorer = Scorer(sizes(model))
        with torch.no_grad(), session(recorder=scorer):
            for batch in batches:
                model(**batch)
                scorer.tokens += int(valid_tokens(batch).sum())
        found.append({site: total / max(scorer.tokens, 1) for site, total in scorer.total.items()})
    return {site: torch.stack([scores[site] for scores in found]) for site in found[0]}


def assign_domains(score_X: Tensor, ratio: float = 2.0) -> Tensor:
    """The place of the domain that each expert belongs to, or -1, int64 without the first axis of the scores.

    Args:
        score_X: [domains, ...], at least two domains. ratio: over the second highest.
    """
    best = score_X.topk(2, dim=0)
    mine = (best.values[0] > 0) & (best.values[0] >= ratio * best.values[1])
    return torch.where(mine, best.indices[0], -1)


def random_masks(masks: Masks, seed: int) -> Masks:
    """As many experts of each layer as ``masks`` takes, drawn without regard to anything."""
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for site, mask in masks.items():
        order = torch.randperm(mask.numel(), generator=draw)
        found[site] = mask.flatten()[order].view(mask.shape)
    return found


class Without(Edit):
    """Takes experts out of a routing; their weight goes to nobody."""

    def __init__(self, masks: Masks) -> None:
        self.masks = masks

    def on_routing(self, site: str, routing: Routing, router: Any, ctx: RoutingContext) -> Routing:
        """See Edit."""
        if site not in self.masks:
            return routing
        gone_C = torch.zeros(routing.num_choices, dtype=torch.bool, device=routing.expert_N.device)
        gone_C[: routing.num_experts] = self.masks[site].to(gone_C.device)
        kept_N = ~gone_C[routing.expert_N]
        return routing.replace(kept_N=kept_N if routing.kept_N is None else kept_N & routing.kept_N)


@contextmanager
def masked(model: nn.Module, masks: Masks) -> Iterator[None]:
    """Inside, the experts of ``masks`` are not there; afterwards all is as it was."""
    pairs = {site: there for site, there in pair_layers(model).items() if site in masks}
    before = {site: there.clone() for site, there in pairs.items()}
    try:
        for site, there in pairs.items():
            there &= ~masks[site].to(there.device)
        with session(edits=[Without({site: mask for site, mask in masks.items() if site not in pairs})]):
            yield
    finally:
        for site, there in pairs.items():
            there.copy_(before[site])


def loss_changes(
    model: nn.Module, domains: Mapping[str, Sequence[Batch]], masks: Masks, plain: Sequence[float]
) -> Tensor:
    """What masking adds to the losses ``plain`` of the domains, in nats, float64 [domains]."""
    with masked(model, masks):
        return torch.tensor(
            [loss(model, domains[name]) - was for name, was in zip(domains, plain, strict=True)]
        ).double()


def selectivity(change_D: Tensor, own: int) -> float:
    """Change of the domain's own loss over the mean change of the others, which counts as 0.001 at least."""
    others = torch.cat([change_D[:own], change_D[own + 1 :]]).mean()
    return float(change_D[own]) / max(float(others), FLOOR)


def group_domains(subject: MeterInputs, config: Config) -> dict[str, list[Batch]]:
    """Batches by domain, see the top of the file.

    Raises:
        ConfigError: fewer than two domains, or more than 16.
    """
    plain = [dict(batch) for batch in subject.batches]
    labels = [batch.pop("domain", None) for batch in plain]
    alone = not config.against and not any(labels)
    domains: dict[str, list[Batch]] = {}
    for place, (label, batch) in enumerate(zip(labels, plain, strict=True)):
        domains.setdefault(label or (str(place) if alone else config.name), []).append(batch)
    if config.against:
        from moestro.data.sources import read_texts
        from moestro.data.tokens import open_tokenizer
        from moestro.models.refs import resolve
        from moestro.observe.record import pieces

        tokenizer = open_tokenizer(resolve(subject.name).folder, local_files_only=True)
        texts = {name: read_texts(source) for name, source in config.against.items()}
        for piece in pieces(tokenizer, texts, length=512, limit=config.tokens):
            domains.setdefault(piece.label, []).append({"input_ids": torch.tensor([piece.ids])})
    if not 2 <= len(domains) <= MOST_DOMAINS:
        raise ConfigError(
            f"{len(domains)} domains; 2 to {MOST_DOMAINS} are compared: give each batch its 'domain', or "
            "against={NAME: SOURCE}"
        )
    return domains


def _counts(owners: Masks, count: int) -> list[list[Any]]:
    """Experts of each domain and of all, a row a layer."""
    return [[s, *(int((owner == d).sum()) for d in range(count)), owner.numel()] for s, owner in owners.items()]


def _most(scores: Masks, owners: Masks, names: Sequence[str], config: Config) -> list[list[Any]]:
    """The most used experts of each domain."""
    rows: list[list[Any]] = []
    for place, name in enumerate(names):
        found: list[list[Any]] = []
        for site, score in scores.items():
            best = score.topk(2, dim=0).values.flatten(1)
            mine = torch.where(owners[site].flatten() == place, best[0], 0.0)
            for at in mine.topk(min(config.listed, len(mine))).indices[: int((mine > 0).sum())]:
                expert = ", ".join(str(int(number)) for number in torch.unravel_index(at, score.shape[1:]))
                found.append([name, site, expert, float(mine[at]), float(best[1, at])])
        rows += sorted(found, key=lambda row: -row[3])[: config.listed]
    return rows


def measure(subject: MeterInputs, config: Config) -> Report:
    """Score, assign, mask each domain's experts in turn, and compare with experts drawn at random.

    Raises:
        ConfigError: no mixture layer, or not 2 to 16 domains.
    """
    domains = group_domains(subject, config)
    names = list(domains)
    scores = expert_scores(subject.model, domains)
    owners = {site: assign_domains(score, config.ratio) for site, score in scores.items()}
    plain = [loss(subject.model, batches) for batches in domains.values()]
    numbers: dict[str, float] = {}
    tables = {"experts": Table(columns=["layer", *names, "of all"], rows=_counts(owners, len(names)))}
    changes: list[list[Any]] = []
    for place, name in enumerate(names):
        masks = {site: owner == place for site, owner in owners.items()}
        numbers[f"{name}: experts"] = sum(int(mask.sum()) for mask in masks.values())
        for what, chosen in {"own": masks, "random": random_masks(masks, subject.seed + place)}.items():
            change_D = loss_changes(subject.model, domains, chosen, plain)
            changes.append([name, what, *change_D.tolist()])
            numbers[f"{name}: loss change, {what} masked"] = float(change_D[place])
            numbers[f"{name}: selectivity, {what} masked"] = selectivity(change_D, place)
    tables["loss change"] = Table(columns=["masked experts of", "which", *names], rows=changes)
    tables["most used"] = Table(
        columns=["domain", "layer", "expert", "score", "next domain's"], rows=_most(scores, owners, names, config)
    )
    return Report(
        method="inspect.domain_experts",
        config=config.model_dump(mode="json"),
        subject=subject.name,
        numbers=numbers,
        tables=tables,
    )


CARD = MethodCard(
    title="Monet: Mixture of Monosemantic Experts for Transformers",
    year=2024,
    arxiv="2412.04139",
    paper="monet",
    summary="Experts that one domain uses far more than the others, and the loss everywhere without them.",
    taxonomy="inspection/measurement",
    needs=("model", "data"),
    deviations=("the change of the loss is measured, not that of benchmark scores", "no toxicity correlation"),
)
