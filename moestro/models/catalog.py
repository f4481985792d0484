"""The catalogue of known mixture-of-experts models, and parameter counts worked out from their shapes.

The data is ``catalog.yaml``; its head explains every field. Counts hold weight matrices only: norms, biases
and position tables together stay below a tenth of a per cent of any model listed here.
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import Any, Literal, TypeVar

from moestro.core.datafiles import check_keys, read_yaml
from moestro.core.errors import ConfigError


T = TypeVar("T")
TOLERANCE = 0.03
ENTRY_KEYS = {
    *("name", "about", "verified", "source", "published", "model", "mixers", "ffns"),
    *("placement", "activation", "router", "losses"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """Who published the model, and the Transformers model type that loads it (None: no stock class)."""

    org: str
    year: int
    licence: str | None
    hf_model_type: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """Sizes as printed by the authors, in billions of parameters; None where they print none.

    ``counts`` says which embeddings the active figure holds: ``all`` of them, or ``no-input``.
    """

    total: float | None
    active: float | None
    counts: Literal["all", "no-input"] = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Width:
    """Model width D, vocabulary V, and whether input and output embedding are one matrix."""

    d_model: int
    vocab: int
    tied: bool

    @property
    def matrix(self) -> int:
        """Weights of one embedding matrix [V, D]."""
        return self.vocab * self.d_model


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedAttention:
    """Attention with ``kv_heads`` shared among ``heads``: q [D, H*h], k and v [D, G*h], o [H*h, D]."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    def parameters(self, d_model: int) -> int:
        """Weights of one layer."""
        return 2 * d_model * (self.heads + self.kv_heads) * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention; ``q_rank`` is None where queries are not compressed."""

    layers: int
    heads: int
    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int

    def parameters(self, d_model: int) -> int:
        """Weights of one layer."""
        q_dim = self.heads * (self.nope_dim + self.rope_dim)
        query = d_model * q_dim if self.q_rank is None else self.q_rank * (d_model + q_dim)
        compress = d_model * (self.kv_rank + self.rope_dim)
        expand = self.kv_rank * self.heads * (self.nope_dim + self.v_dim)
        return query + compress + expand + self.heads * self.v_dim * d_model


@dataclass(frozen=True, slots=True, kw_only=True)
class Mamba:
    """Selective state space layer of the first generation."""

    layers: int
    inner: int
    state: int
    conv: int
    dt_rank: int

    def parameters(self, d_model: int) -> int:
        """Weights of one layer: in and out projection, convolution, input-dependent part, A and D."""
        projections = 3 * d_model * self.inner
        selective = self.inner * (self.dt_rank + 2 * self.state) + self.dt_rank * self.inner
        return projections + selective + self.inner * (self.conv + self.state + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ffn:
    """Feed-forward part of ``layers`` layers: two matrices [D, I] and [I, D], three when gated."""

    kind: Literal["routed", "shared", "dense"]
    layers: int
    d_ff: int
    matrices: int
    experts: int = 1
    top_k: int = 1

    def parameters(self, d_model: int) -> int:
        """Weights of one expert, or of the whole part where nothing is routed."""
        return self.matrices * d_model * self.d_ff


@dataclass(frozen=True, slots=True, kw_only=True)
class Other:
    """Weights that fit no other field, ``parameters`` in each of ``layers`` layers."""

    name: str
    layers: int
    parameters: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterFacts:
    """How the router scores, chooses and weighs; None where it is not known to us.

    Attributes:
        score: softmax over all, softmax-of-chosen, sigmoid, or attention.
        normalise: whether the chosen weights are scaled to sum to 1.
        groups, keep_groups, group_score: group-limited choice; 0 and None without it.
        scale: factor on the weights after that.
        selection_bias: a bias that takes part in the choice and not in the weight.
        applies_to: whether the weight multiplies an expert's output or its input.
        capacity: whether an expert takes a bounded number of tokens in training.
        shared_gate: gate on the shared expert, or None.
    """

    score: str
    normalise: bool | None
    groups: int = 0
    keep_groups: int = 0
    group_score: str | None = None
    scale: float = 1.0
    selection_bias: bool = False
    applies_to: Literal["output", "input"] = "output"
    capacity: bool = False
    shared_gate: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LossFacts:
    """Coefficients of the balance and the z-loss, and the scaling of the first.

    Attributes:
        balance: coefficient of E * sum f P, or None.
        f_over: ``tokens`` (the term is k at uniform load), ``slots`` (it is 1), or None if not known.
        scope: what f and P are averaged over: layer, sequence, all-layers, global-batch.
        z: coefficient of the router z-loss, or None.
    """

    balance: float | None
    f_over: Literal["tokens", "slots"] | None
    scope: str | None
    z: float | None


Mixer = GroupedAttention | LatentAttention | Mamba
MIXERS: dict[str, type[GroupedAttention] | type[LatentAttention] | type[Mamba]] = {
    "grouped": GroupedAttention,
    "latent": LatentAttention,
    "mamba": Mamba,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogEntry:
    """One known model; the head of ``catalog.yaml`` explains the fields.

    ``unmatched`` maps ``total`` or ``active`` to the reason why shapes cannot reproduce the published figure.
    """

    name: str
    about: About
    verified: bool
    source: str
    note: str
    published: Published
    unmatched: Mapping[str, str]
    model: Width
    mixers: tuple[Mixer, ...]
    ffns: tuple[Ffn, ...]
    other: tuple[Other, ...]
    placement: str
    activation: str
    router: RouterFacts
    losses: LossFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterCount:
    """Weights of a model by part; ``experts_active`` are the routed ones that one token uses."""

    input_embedding: int
    output_embedding: int
    mixing: int
    dense: int
    shared: int
    router: int
    experts: int
    experts_active: int
    other: int
    tied: bool

    @property
    def backbone(self) -> int:
        """What every token uses, without embeddings: mixing, dense and shared parts, routers, the rest."""
        return self.mixing + self.dense + self.shared + self.router + self.other

    @property
    def total(self) -> int:
        """All weights that are stored."""
        return self.input_embedding + self.output_embedding + self.backbone + self.experts

    def active(self, counts: Literal["all", "no-input"] = "all") -> int:
        """Weights on the path of one token.

        Args:
            counts: ``no-input`` leaves the input embedding out, as a look-up costs no product; a tied
                embedding stays, since it is the output matrix too.
        """
        skipped = self.input_embedding if counts == "no-input" and not self.tied else 0
        return self.total - self.experts + self.experts_active - skipped


def count_parameters(entry: CatalogEntry) -> ParameterCount:
    """Work the size of a model out from its shapes. Encoder and decoder count as one path."""
    d_model = entry.model.d_model
    routed = [ffn for ffn in entry.ffns if ffn.kind == "routed"]
    return ParameterCount(
        input_embedding=entry.model.matrix,
        output_embedding=0 if entry.model.tied else entry.model.matrix,
        mixing=sum(mixer.layers * mixer.parameters(d_model) for mixer in entry.mixers),
        dense=sum(ffn.layers * ffn.parameters(d_model) for ffn in entry.ffns if ffn.kind == "dense"),
        shared=sum(ffn.layers * ffn.parameters(d_model) for ffn in entry.ffns if ffn.kind == "shared"),
        router=sum(ffn.layers * ffn.experts * d_model for ffn in routed),
        experts=sum(ffn.layers * ffn.experts * ffn.parameters(d_model) for ffn in routed),
        experts_active=sum(ffn.layers * ffn.top_k * ffn.parameters(d_model) for ffn in routed),
        other=sum(other.layers * other.parameters for other in entry.other),
        tied=entry.model.tied,
    )


def total_parameters(entry: CatalogEntry) -> int:
    """All weights of a model, from its shapes."""
    return count_parameters(entry).total


def active_parameters(entry: CatalogEntry) -> int:
    """Weights one token uses, from the shapes, counted as the entry's authors count."""
    return count_parameters(entry).active(entry.published.counts)


def deviations(entry: CatalogEntry) -> dict[str, float]:
    """Relative distance of each recomputed figure from its published one (+0.01: ours is 1 % larger)."""
    ours = {"total": total_parameters(entry), "active": active_parameters(entry)}
    printed = {"total": entry.published.total, "active": entry.published.active}
    return {name: ours[name] / (size * 1e9) - 1 for name, size in printed.items() if size is not None}


@cache
def load_catalog() -> tuple[CatalogEntry, ...]:
    """All entries, in the order of the file.

    Raises:
        ConfigError: the data file breaks one of its rules; the message names the entry and the field.
    """
    return parse_catalog(read_yaml("moestro.models", "catalog.yaml"))


def parse_catalog(rows: Any) -> tuple[CatalogEntry, ...]:
    """Build the entries from parsed YAML.

    Raises:
        ConfigError: a wrong shape of the data, a name that appears twice, a model without routed experts,
            more chosen experts than there are, a reason without a published figure it could explain.
    """
    if not isinstance(rows, list) or not rows:
        raise ConfigError("catalog.yaml: expected a list of models")
    entries = tuple(_entry(row, f"catalog.yaml: row {index}") for index, row in enumerate(rows))
    names = [entry.name for entry in entries]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"catalog.yaml: {', '.join(twice)} appears twice")
    return entries


def _entry(row: Any, where: str) -> CatalogEntry:
    where = f"catalog.yaml: {row['name']}" if isinstance(row, dict) and "name" in row else where
    row = check_keys(row, where, ENTRY_KEYS, {"note", "unmatched", "other"})
    entry = CatalogEntry(
        name=str(row["name"]),
        about=_build(About, row["about"], f"{where}: about"),
        verified=row["verified"],
        source=str(row["source"]),
        note=str(row.get("note", "")),
        published=_build(Published, row["published"], f"{where}: published"),
        unmatched=dict(row.get("unmatched", {})),
        model=_build(Width, row["model"], f"{where}: model"),
        mixers=tuple(_mixer(item, f"{where}: mixers") for item in row["mixers"]),
        ffns=tuple(_build(Ffn, item, f"{where}: ffns") for item in row["ffns"]),
        other=tuple(_build(Other, item, f"{where}: other") for item in row.get("other", ())),
        placement=str(row["placement"]),
        activation=str(row["activation"]),
        router=_build(RouterFacts, row["router"], f"{where}: router"),
        losses=_build(LossFacts, row["losses"], f"{where}: losses"),
    )
    _check(entry, where)
    return entry


def _build(cls: type[T], row: Any, where: str) -> T:
    known = fields(cls)  # type: ignore[arg-type]
    required = {field.name for field in known if field.default is MISSING}
    row = check_keys(row, where, required, {field.name for field in known} - required)
    for field in known:
        value = row.get(field.name, field.default)
        if field.type is int and type(value) is not int:
            raise ConfigError(f"{where}: {field.name}={value!r}: expected a whole number")
        if field.type == float | None and not (value is None or type(value) in (int, float)):
            raise ConfigError(f"{where}: {field.name}={value!r}: expected a number or null")
        if type(value) in (int, float) and value < 0:
            raise ConfigError(f"{where}: {field.name}={value}: a size or a coefficient cannot be negative")
    return cls(**row)


def _mixer(row: Any, where: str) -> Mixer:
    kind = row.get("kind") if isinstance(row, Mapping) else None
    if kind not in MIXERS:
        raise ConfigError(f"{where}: kind {kind!r} is unknown; known: {', '.join(MIXERS)}")
    return _build(MIXERS[kind], {name: value for name, value in row.items() if name != "kind"}, where)


def _check(entry: CatalogEntry, where: str) -> None:
    if not isinstance(entry.verified, bool):
        raise ConfigError(f"{where}: verified={entry.verified!r}: expected true or false")
    if not any(ffn.kind == "routed" for ffn in entry.ffns):
        raise ConfigError(f"{where}: no routed experts")
    for ffn in entry.ffns:
        if ffn.kind not in ("routed", "shared", "dense"):
            raise ConfigError(f"{where}: ffns: kind {ffn.kind!r} is unknown; known: routed, shared, dense")
        if ffn.matrices not in (2, 3):
            raise ConfigError(f"{where}: ffns: matrices={ffn.matrices}: expected 2, or 3 when gated")
        if not 1 <= ffn.top_k <= ffn.experts:
            raise ConfigError(f"{where}: ffns: top_k={ffn.top_k} of {ffn.experts} experts")
    for figure, reason in entry.unmatched.items():
        if figure not in deviations(entry) or not str(reason).strip():
            raise ConfigError(f"{where}: unmatched.{figure}: needs a published figure and a reason")
