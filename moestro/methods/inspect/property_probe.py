"""How readable the hidden units of a mixture are: which facts about a token single units tell.

The code of a token is z [F], F = E I: for each of its experts the routing weight times what enters the down projection,
0 for all others. A classifier is a unit f with a threshold t = i / levels of the unit's largest value on even
sequences, i = 0 .. levels - 1: it says yes where z_f > t max z_f. Facts are boolean properties p of tokens.

    coverage        mean over p of the best F1 that any classifier reaches on p
    reconstruction  on even sequences each classifier that says yes ``min_active`` times or more is given every p on
                    which its precision is at least ``precision``; on odd sequences a token's properties are predicted
                    to be the union over the classifiers that say yes. Mean over tokens of the F1 of that prediction
    by chance       both again with the properties of all tokens of a half shuffled: what the best of many units reaches
                    without knowing anything. Compare models by what is above it: wider ones have more chances

Beside them stand the mean number of active units of a token, L0 (``|z| > active_above``), the share of units that are
never active, and the share of (token, expert) pairs without one: an expert that answers nothing looks sparse.

Batches may carry ``properties`` [B, S, P] (bool); without them a property is "this token is v" for the most frequent v.
A dense model is measured once ``convert.upcycle`` with one expert has made it a mixture of one.

Source: MoE-X (2503.07639, chess experiments), after the board-game protocol of Karvonen et al. 2024 (2408.00113).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from moestro import ops
from moestro.core.bank import StackedFFN
from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.errors import ConfigError, DataError
from moestro.core.inputs import MeterInputs, spell
from moestro.core.layer import MoELayer, mixture_layers
from moestro.core.report import Cell, Report, Table
from moestro.core.session import session


class Config(BaseConfig):
    """Settings.

    Attributes:
        layers: which mixture layers, counted from 0; None means all. levels: thresholds of a unit.
        precision: of the properties a classifier is given. min_active: yeses of a classifier that is given any.
        min_true: tokens on which a property must be true, in each half; others are left out.
        active_above: values of a unit that count as active. frequent: properties made of token ids.
    """

    layers: list[int] | None = Field(default=None, min_length=1)
    levels: int = Field(default=10, ge=1, le=1000)
    precision: float = Field(default=0.95, gt=0, le=1)
    min_active: int = Field(default=10, ge=1)
    min_true: int = Field(default=10, ge=1)
    active_above: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    frequent: int = Field(default=64, ge=1)


Block = tuple[Tensor, Tensor]
"""A run of units: rows of the tokens on which they may be active, int64 [n], and their values there [n, U]."""


@dataclass(frozen=True)
class Seen:
    """Tokens of all batches but padding: sequence and token id of each, and its properties where batches carry them."""

    sequence_T: Tensor
    ids_T: Tensor
    true_TP: Tensor | None


@dataclass(frozen=True)
class Code:
    """What one layer was given: inputs [T, D] and assignments (token, expert, weight)."""

    x_TD: Tensor
    token_N: Tensor
    expert_N: Tensor
    weight_N: Tensor


@dataclass(frozen=True)
class Scored:
    """Coverage and reconstruction of one set of labels."""

    coverage: float
    reconstruction: float


def blocks(bank: StackedFFN, code: Code) -> Iterator[Block]:
    """The code, expert by expert."""
    weights = bank.weights()
    for expert in range(bank.num_experts):
        mine_N = code.expert_N == expert
        row_N = code.token_N[mine_N]
        bias = None if weights.up_bias_EJ is None else weights.up_bias_EJ[expert]
        pre_NJ = nn.functional.linear(code.x_TD[row_N], weights.up_EJD[expert], bias)
        hidden_NI = ops.apply_activation(pre_NJ, bank.activation, bank.gated)
        yield row_N, (hidden_NI * code.weight_N[mine_N, None]).float()


def f1(both: Tensor, said: Tensor, true: Tensor) -> Tensor:
    """2 both / (said + true), 0 where nothing was said and nothing is true."""
    return 2 * both / (said + true).clamp(min=1)


def probe(code: Iterable[Block], labels: Sequence[Tensor], fit_T: Tensor, config: Config) -> list[Scored]:
    """Coverage and reconstruction of a code, for several sets of labels at once.

    Args:
        code: runs of units. labels: bool [T, P] each. fit_T: bool, the half on which classifiers are chosen.
    """
    true_TP = torch.cat([label.float() for label in labels], 1)
    true_P = true_TP.sum(0)
    best_P = torch.zeros_like(true_P)
    told_TP = torch.zeros_like(true_TP, dtype=torch.bool)
    for row_N, value_NU in code:
        fit_N = fit_T[row_N]
        if not fit_N.any():
            continue
        test_N = row_N[~fit_N]
        top_U = value_NU[fit_N].amax(0).clamp(min=0)
        for level in range(config.levels):
            yes_NU = (value_NU > top_U * (level / config.levels)).float()
            fit_NU, test_NU = yes_NU[fit_N], yes_NU[~fit_N]
            said_U, both_UP = fit_NU.sum(0), fit_NU.T @ true_TP[row_N[fit_N]]
            whole_UP = both_UP + test_NU.T @ true_TP[test_N]
            best_P = torch.maximum(best_P, f1(whole_UP, yes_NU.sum(0)[:, None], true_P).amax(0))
            sure_UP = (both_UP >= config.precision * said_U[:, None]) & (said_U >= config.min_active)[:, None]
            told_TP[test_N] |= (test_NU @ sure_UP.float()) > 0
    found, first = [], 0
    for label in labels:
        here = slice(first, first + label.shape[1])
        first = here.stop
        some_T = label.any(1) & ~fit_T
        true_NP, told_NP = label[some_T], told_TP[some_T, here]
        score_N = f1((true_NP & told_NP).sum(1), told_NP.sum(1), true_NP.sum(1))
        found.append(Scored(float(best_P[here].mean()), float(score_N.mean())))
    return found


def activity(code: Iterable[Block], num_tokens: int, active_above: float) -> dict[str, float]:
    """L0, the share of units that are never active, the share of (token, expert) pairs without an active unit."""
    active = dead = units = empty = pairs = 0
    for row_N, value_NU in code:
        active_NU = value_NU.abs() > active_above
        active += int(active_NU.sum())
        units += active_NU.shape[1]
        dead += int((~active_NU.any(0)).sum())
        pairs += len(row_N)
        empty += int((~active_NU.any(1)).sum())
    return {"L0": active / num_tokens, "dead units": dead / units, "empty pairs": empty / max(pairs, 1)}


def shuffled(true_TP: Tensor, fit_T: Tensor, seed: int) -> Tensor:
    """The properties of each half's tokens in another order."""
    draw = torch.Generator().manual_seed(seed)
    order_T = torch.arange(len(true_TP))
    for half_T in (fit_T, ~fit_T):
        places = half_T.nonzero().squeeze(1)
        order_T[places] = places[torch.randperm(len(places), generator=draw)]
    return true_TP[order_T]


def token_properties(ids_T: Tensor, count: int) -> Tensor:
    """ "This token is v" for the ``count`` most frequent ids v, bool [T, P]; equally frequent ones by id."""
    ids, counts = torch.unique(ids_T, return_counts=True)
    chosen = ids[torch.sort(counts, descending=True, stable=True).indices[:count]]
    return ids_T[:, None].eq(chosen)


def run(subject: MeterInputs, layers: Mapping[str, MoELayer]) -> tuple[Seen, dict[str, Code]]:
    """Run the model on the data and keep what each layer was given. Padding is left out.

    Raises:
        ConfigError: no data. DataError: properties that do not fit their tokens.
    """
    parts: dict[str, list[tuple[Tensor, ...]]] = {site: [] for site in layers}
    tokens: list[tuple[Tensor, ...]] = []
    first = seen = 0
    for batch in subject.batches:
        given = dict(batch)
        ids_BS, true_BSP = given["input_ids"], given.pop("properties", None)
        if true_BSP is not None and (true_BSP.ndim != 3 or true_BSP.shape[:2] != ids_BS.shape):
            raise DataError(f"properties of shape {list(true_BSP.shape)} for token ids {list(ids_BS.shape)}")
        with torch.no_grad(), session(keeps=("input",), collect=True) as opened:
            subject.model(**given)
        found = {site: ctx for ctx in opened.take() for site in ctx.routings if site in layers}
        valid_T = torch.ones(ids_BS.numel(), dtype=torch.bool)
        for site, ctx in found.items():
            assert ctx.tokens is not None
            valid_T = ctx.tokens.valid_T
            if len(valid_T) != ids_BS.numel():
                raise DataError(f"{site} saw {len(valid_T)} tokens of a batch of {ids_BS.numel()} token ids")
            parts[site].append(_valid(ctx.kept[site, "input"], ctx.routings[site], valid_T, seen))
        row_T = torch.arange(len(ids_BS)).repeat_interleave(ids_BS.shape[1])[valid_T] + first
        more = () if true_BSP is None else (true_BSP.flatten(0, 1)[valid_T].bool(),)
        tokens.append((row_T, ids_BS.reshape(-1)[valid_T], *more))
        first, seen = first + len(ids_BS), seen + len(row_T)
    if not tokens:
        raise ConfigError("inspect.property_probe looks at tokens; give texts or batches")
    if len({len(part) for part in tokens}) > 1:
        raise DataError("some batches carry properties and some do not; give them with every batch or with none")
    if len(counts := sorted({part[2].shape[1] for part in tokens if len(part) > 2})) > 1:
        raise DataError(f"batches carry {spell(counts)} properties a token; give the same ones with every batch")
    joined = [torch.cat(column) for column in zip(*tokens, strict=True)]
    codes = {site: Code(*(torch.cat(column) for column in zip(*part, strict=True))) for site, part in parts.items()}
    return Seen(joined[0], joined[1], joined[2] if len(joined) > 2 else None), codes


def _valid(x_TD: Tensor, routing: Any, valid_T: Tensor, seen: int) -> tuple[Tensor, ...]:
    """Inputs and assignments of the valid tokens, counted on from ``seen``."""
    real = routing.real()
    place_T = valid_T.cumsum(0) - 1 + seen
    live_N = valid_T[real.token_N]
    token_N = place_T[real.token_N[live_N]]
    return x_TD[valid_T].detach(), token_N, real.expert_N[live_N], real.weight_N[live_N]


def chosen_layers(model: nn.Module, layers: list[int] | None) -> dict[str, MoELayer]:
    """The mixture layers to look at, by site.

    Raises:
        ConfigError: there are none, a listed one does not exist, or its experts have no units that are known.
    """
    every = mixture_layers(model)
    if not every:
        raise ConfigError(
            "no mixture layer; `moestro convert upcycle --num-experts 1 --top-k 1` makes a dense model one"
        )
    wanted = range(len(every)) if layers is None else sorted(set(layers))
    if wanted[-1] >= len(every) or wanted[0] < 0:
        raise ConfigError(f"layers={layers}, but the model has mixture layers {spell(range(len(every)))}")
    sites = list(every)
    found = {sites[place]: every[sites[place]] for place in wanted}
    for site, layer in found.items():
        if not isinstance(layer.bank, StackedFFN) or layer.pre is not None:
            raise ConfigError(
                f"{site}: the units of a {type(layer.bank).__name__} (or behind a projection) are not known"
            )
    return found


def measure(subject: MeterInputs, config: Config) -> Report:
    """Run the model on the data and report on the units of the chosen layers.

    Numbers are means over layers; properties that are true too rarely are left out, and with none left only activity is
    reported.

    Raises:
        ConfigError: no data, a single sequence, or layers that do not exist.
    """
    layers = chosen_layers(subject.model, config.layers)
    seen, codes = run(subject, layers)
    fit_T = seen.sequence_T % 2 == 0
    if bool(fit_T.all()):
        raise ConfigError("inspect.property_probe fits on one half of the sequences and tests on the other; give two")
    true_TP = token_properties(seen.ids_T, config.frequent) if seen.true_TP is None else seen.true_TP
    often_P = (true_TP[fit_T].sum(0) >= config.min_true) & (true_TP[~fit_T].sum(0) >= config.min_true)
    true_TP = true_TP[:, often_P]
    labels = [true_TP, shuffled(true_TP, fit_T, subject.seed)]
    rows: list[dict[str, float]] = []
    for site, layer in layers.items():
        bank, code = layer.bank, codes[site]
        assert isinstance(bank, StackedFFN)
        with torch.no_grad():
            row = activity(blocks(bank, code), len(fit_T), config.active_above)
            if true_TP.shape[1]:
                real, chance = probe(blocks(bank, code), labels, fit_T, config)
                row |= {"coverage": real.coverage, "coverage by chance": chance.coverage}
                row |= {"reconstruction": real.reconstruction, "reconstruction by chance": chance.reconstruction}
        rows.append({"units": bank.num_experts * bank.inner, **row})
    table: list[list[Cell]] = [[site, *row.values()] for site, row in zip(layers, rows, strict=True)]
    return Report(
        method="inspect.property_probe",
        config=config.model_dump(mode="json"),
        subject=subject.name,
        numbers={name: sum(row[name] for row in rows) / len(rows) for name in rows[0]},
        tables={"layers": Table(columns=["site", *rows[0]], rows=table)},
        notes={"tokens": len(fit_T), "properties": true_TP.shape[1]},
    )


CARD = MethodCard(
    title="Mixture of Experts Made Intrinsically Interpretable",
    year=2025,
    arxiv="2503.07639",
    paper="moe-x",
    summary="Which facts about a token single hidden units tell: coverage, reconstruction, sparsity, against chance.",
    taxonomy="inspection/measurement",
    needs=("model", "data"),
    deviations=(
        "labels shuffled over tokens give a level of chance, which the paper does not report",
        "a classifier that says yes fewer than ten times is given no property",
    ),
)
