"""Z-code M3, training: random token selection against other ways to drop, and denoising beside translation.

An encoder-decoder with Switch layers translates names to and from English and restores names with spans masked out
(``_names.py``). Batches mix both tasks half and half in random order. The way of dropping is exchanged in one arm after
the other, at equal places and tokens; the denoising half is taken away, or replaced by as much translation.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moestro.core.context import RoutingContext
from moestro.core.routing import Routing
from moestro.core.session import session
from moestro.models.swap import swap
from moestro.studies._framework import Arm, Beats, Budget, Claim, Study, Within
from moestro.studies._names import LANGUAGES, LONGEST, POOR, Characters, Names, chrf, corruptions, names, translations
from moestro.training.build import make_model
from moestro.training.objectives import Batch, SeqToSeq
from moestro.training.optimizer import make_optimizer, set_lr
from moestro.training.recipe import OptimizerConfig
from moestro.training.schedule import ScheduleConfig
from moestro.training.step import Stepper


EXPERTS = 8
AUX = 0.01
ORDERS = ("position", "probability")


@dataclass
class Drops:
    """A recorder of how often the token at each place of the flattened batch is dropped, padding apart."""

    kept: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def record(self, site: str, routing: Routing, ctx: RoutingContext) -> None:
        """See Recorder."""
        assert ctx.tokens is not None
        if routing.kept_N is not None:
            self.kept.setdefault(site, []).append(routing.kept_N[ctx.tokens.valid_T].numpy())

    def rank_correlation(self) -> float | None:
        """Spearman's correlation of place and drop rate over the places that every batch has, mean over sites.

        None where nothing was dropped at those places: there is no correlation to speak of, so none is made up.
        """
        from scipy.stats import spearmanr

        found = []
        for batches in self.kept.values():
            width = min(map(len, batches))
            rate = 1.0 - np.mean([kept[:width] for kept in batches], axis=0)
            if rate.min() < rate.max():
                found.append(float(spearmanr(np.arange(width), rate).statistic))
        return float(np.mean(found)) if found else None

    def share(self) -> float:
        """Dropped tokens over all tokens."""
        every = np.concatenate([kept for batches in self.kept.values() for kept in batches])
        return float(1.0 - every.mean())


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Size of the model and the run. rows: rows of one task in a step. probe: batches that drops are counted over."""

    dim: int = 64
    inner: int = 128
    heads: int = 4
    rows: int = 96
    steps: int = 300
    lr: float = 3e-3
    concepts: int | None = None
    probe: int = 30


def scale(budget: Budget) -> Scale:
    """The run of a budget."""
    return budget.pick(
        ci=Scale(dim=16, inner=32, heads=2, rows=8, steps=3, concepts=60, probe=3),
        micro=Scale(dim=32, inner=64, heads=2, rows=32, steps=40, concepts=300, probe=10),
        full=Scale(),
    )


def model_of(arm: str, size: Scale, vocabulary: int, seed: int) -> Any:
    """Two encoder and two decoder layers, the second of each a mixture with the arm's way of dropping."""
    torch.manual_seed(seed)
    model = make_model(
        {
            "model_type": "switch_transformers", "vocab_size": vocabulary, "d_model": size.dim, "d_ff": size.inner,
            "d_kv": size.dim // size.heads, "num_heads": size.heads, "num_layers": 2, "num_decoder_layers": 2,
            "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": EXPERTS,
            "dropout_rate": 0.0, "router_jitter_noise": 0.0, "router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0,
            "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
        },
        "seq2seq",
        vocabulary,
    )  # fmt: skip
    factor = None if arm == "no_drop" else 1.0
    router = {"capacity_factor": factor, "eval_capacity_factor": None, "order": arm if arm in ORDERS else "random"}
    swap(model, "train.random_token_selection", {"num_experts": EXPERTS, **router}, layers=[1])
    swap(model, "train.balance_loss", {"scope": "batch"}, layers=[1])
    return model


def batches(arm: str, data: Names, size: Scale, characters: Characters, seed: int) -> Iterator[list[dict[str, Any]]]:
    """Examples of each step, in an order of their own. Every arm sees the same translations first.

    Half the rows are translations and half are to be restored; ``mt_only`` leaves out the second half, and in
    ``mt_double`` it is translations of as many tokens, to within a row over all steps so far.
    """
    tasks = {task: np.random.default_rng([seed, place]) for place, task in enumerate(("mt", "more", "dae", "order"))}
    owed = 0
    while True:
        examples = [characters.example(row) for row in translations(data, size.rows, tasks["mt"])]
        second = [characters.example(row) for row in corruptions(data, size.rows, tasks["dae"])]
        if arm == "mt_double":
            owed += sum(map(length, second))
            second = []
            while owed > 0:
                second += [characters.example(row) for row in translations(data, 1, tasks["more"])]
                owed -= length(second[-1])
        if arm != "mt_only":
            examples += second
        yield [examples[i] for i in tasks["order"].permutation(len(examples))]


def length(example: Mapping[str, Sequence[int]]) -> int:
    """Tokens of source and target."""
    return sum(map(len, example.values()))


def fit(model: nn.Module, objective: SeqToSeq, stream: Iterator[list[dict[str, Any]]], size: Scale) -> int:
    """Train in place; the number of tokens seen, of sources and targets."""
    optimizer = make_optimizer(model, OptimizerConfig(lr=size.lr, weight_decay=0.01))
    stepper = Stepper(model, objective, optimizer)
    schedule = ScheduleConfig(kind="cosine", warmup=max(1, size.steps // 10))
    model.train()
    seen = 0
    for step in range(size.steps):
        batch = objective.collate(next(stream), [])
        set_lr(optimizer, schedule.factor(step, size.steps))
        stepper.run(step, [batch], weights={"seq2seq": 1.0, "balance": AUX})
        seen += int(batch["attention_mask"].sum()) + objective.targets(batch)
    return seen


def loss_of(model: nn.Module, objective: SeqToSeq, rows: Sequence[dict[str, Any]]) -> float:
    """Nats a target token."""
    total, count = 0.0, 0
    for at in range(0, len(rows), 256):
        batch = objective.collate(rows[at : at + 256], [])
        with torch.no_grad():
            total += float(objective(model, batch, {})["seq2seq"].total)
        count += objective.targets(batch)
    return total / count


def translate(model: Any, batch: Batch) -> Tensor:
    """Greedy target ids [B, S]."""
    with torch.no_grad():
        ids: Tensor = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], do_sample=False, num_beams=1,
            max_new_tokens=LONGEST + 2,
        )  # fmt: skip
    return ids[:, 1:]


def run(arm: str, seed: int, budget: Budget) -> Mapping[str, float]:
    """Train one arm, then measure held-out translation and where tokens are dropped."""
    size = scale(budget)
    data = names(seed, size.concepts)
    characters = Characters(data)
    objective = SeqToSeq(SimpleNamespace(pad_token_id=0), start_id=0)
    model = model_of(arm, size, characters.size, seed)
    stream = batches(arm, data, size, characters, seed)
    found = {"tokens": float(fit(model, objective, stream, size))}
    found |= drops(model, objective, stream, size)
    model.eval()
    every = [data.pair(one, int(c), to_english=way) for one in LANGUAGES for c in data.heldout for way in (False, True)]
    poor = [data.pair(language, int(c), to_english=False) for language in POOR for c in data.heldout]
    found["heldout_loss"] = loss_of(model, objective, [characters.example(row) for row in every])
    found["poor_loss"] = loss_of(model, objective, [characters.example(row) for row in poor])
    answers: list[str] = []
    for at in range(0, len(poor), 256):
        batch = objective.collate([characters.example(row) for row in poor[at : at + 256]], [])
        answers += [characters.text(ids) for ids in translate(model, batch).tolist()]
    found["poor_chrf"] = chrf(answers, [target for _, _, target in poor])
    return found


def drops(model: nn.Module, objective: SeqToSeq, stream: Iterator[Any], size: Scale) -> dict[str, float]:
    """How drops hang together with the place in the batch, in training mode; nothing for an arm that drops none."""
    recorder = Drops()
    with torch.no_grad(), session(recorder=recorder):
        for _ in range(size.probe):
            objective(model, objective.collate(next(stream), []), {})
    if not recorder.kept:
        return {}
    rank = recorder.rank_correlation()
    return {"dropped": recorder.share()} | ({} if rank is None else {"position_rank": rank})


TELLS_DROPS = (
    "drops go with the place by {rts} at random, {position} by position, {probability} by probability; shares dropped "
    "{rts.dropped}, {position.dropped} and {probability.dropped}."
)
TELLS_DENOISING = (
    "chrF and loss on poor languages with denoising {rts} and {rts.poor_loss}, translation alone {mt_only} and "
    "{mt_only.poor_loss}, twice the translation {mt_double} and {mt_double.poor_loss}; on all languages the loss is "
    "{rts.heldout_loss}, {mt_only.heldout_loss} and {mt_double.heldout_loss}. Tokens seen {rts.tokens}, "
    "{mt_only.tokens} and {mt_double.tokens}."
)

STUDY = Study(
    paper="zcode-m3",
    part="training",
    title="Random token selection and denoising",
    setting=(
        "Switch encoder-decoders (2 + 2 layers, width 64, 8 experts in the second of each, capacity factor 1) on the "
        "names of languages, places, scripts and currencies in 12 languages and English, 300 steps of 192 rows. "
        "Held-out translation is measured without dropping. The paper trains models of up to 10B parameters on 50 "
        "languages; no number of it is about random token selection alone, so none is quoted."
    ),
    claims=(
        Claim(
            key="unbiased",
            text="With random selection drops do not depend on the place in the batch.",
            where="random token selection (how it is defined)",
            claimed="no bias towards positions",
            metric="position_rank",
            judge=Within(arm="rts", low=-0.1, high=0.1),
            tells=TELLS_DROPS,
        ),
        Claim(
            key="prefix_is_biased",
            text="Served by position, late tokens of a batch are dropped more often.",
            where="random token selection (what it is meant to end)",
            claimed="biased towards the front",
            metric="position_rank",
            judge=Within(arm="position", low=0.5),
            tells=TELLS_DROPS,
        ),
        Claim(
            key="quality",
            text="Random selection trains to a lower held-out loss than dropping by position.",
            where="random token selection",
            claimed="faster convergence",
            metric="heldout_loss",
            judge=Beats(method="rts", control="position"),
            tells=(
                "at random {rts}, by position {position}, by probability {probability}, nothing dropped {no_drop}: the "
                "last bounds what a way of dropping can win. Shares dropped {rts.dropped}, {position.dropped} and "
                "{probability.dropped}."
            ),
        ),
        Claim(
            key="denoising_adds",
            text="Denoising beside translation helps translation into poor languages, at equal translation tokens.",
            where="multitask training",
            claimed="better translation, most of all into low-resource languages",
            metric="poor_chrf",
            judge=Beats(method="rts", control="mt_only", better="higher"),
            tells=TELLS_DENOISING,
        ),
        Claim(
            key="denoising_pays",
            text="It does so at equal tokens of any kind too, where translation takes the place of denoising.",
            where="multitask training",
            claimed="not compared at equal tokens",
            metric="poor_chrf",
            judge=Beats(method="rts", control="mt_double", better="higher"),
            tells=TELLS_DENOISING,
        ),
    ),
    arms=(
        Arm(name="rts", text="translation and denoising, random token selection"),
        Arm(name="position", text="the same, first come, first served", role="control"),
        Arm(name="probability", text="the same, highest probability first", role="reference"),
        Arm(name="no_drop", text="the same, nothing dropped", role="reference"),
        Arm(name="mt_only", text="the translation half alone, random token selection", role="control"),
        Arm(
            name="mt_double", text="translation in both halves, at equal tokens, random token selection", role="control"
        ),
    ),
    run=run,
    methods=("train.random_token_selection", "train.balance_loss"),
    units={
        "heldout_loss": "nats a character",
        "poor_loss": "nats a character",
        "poor_chrf": "chrF",
        "position_rank": "Spearman's rho of place and drop rate",
        "dropped": "share of tokens",
        "tokens": "tokens",
    },
)
