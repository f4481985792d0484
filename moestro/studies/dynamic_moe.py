"""Dynamic-MoE: does a number of experts chosen by the router beat a fixed one, and does it follow difficulty?

Rows of source code alternate with rows of the same files after the letters of each identifier were shuffled, which are
harder to predict. Controls: fixed top-1 and top-2 at equal tokens, top-p without the entropy loss, top-p put on a
trained top-2 model, and the trained top-p model with its numbers of experts dealt out to other tokens.
"""

import functools
import keyword
import random
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from moestro.core.context import RoutingContext
from moestro.core.registry import method
from moestro.core.router import Router
from moestro.core.routing import Routing
from moestro.core.session import Edit, session
from moestro.core.site import Shared, Site
from moestro.data.corpora import corpus
from moestro.data.dataset import Dataset
from moestro.data.packing import IGNORE, Packed, pack
from moestro.methods.train.dynamic_moe import TopP, calibrate_p, rank, take_first
from moestro.studies._framework import BUDGETS, Arm, Beats, Budget, Claim, NotWorse, Study, Within
from moestro.studies._language import Scale, llama, train
from moestro.training.objectives import Causal


EXPERTS, P = 8, 0.4
MIXTURES = 2
BALANCE, USUAL = 1e-2 / MIXTURES, 1e-4 / MIXTURES  # the paper weighs means over layers; the loop adds layers up
ENTROPY = {"top_p": USUAL, "no_entropy": 0.0, "more_entropy": 100 * USUAL, "renormalised": USUAL}
TOP_K = {"top_1": 1, "top_2": 2, "top_2_renormalised": 2}
IDENTIFIER = re.compile(r"[A-Za-z_]\w*")


def scale(budget: Budget) -> Scale:
    """Tokens are bytes, 0 closes a file."""
    return budget.pick(
        ci=Scale(vocabulary=257, layers=4, dim=16, inner=16, heads=2, length=32, batch=4, steps=4, heldout=8),
        micro=Scale(vocabulary=257, layers=4, dim=64, inner=64, heads=2, length=64, batch=8, steps=80, heldout=64),
        full=Scale(vocabulary=257, layers=4, dim=128, inner=256, length=128, batch=8, steps=300, heldout=192),
    )


# -- text of two difficulties -------------------------------------------------------------------------------------


def scramble(text: str, rng: random.Random) -> str:
    """The text with the letters of each identifier, keywords apart, in random order."""

    def mixed(match: re.Match[str]) -> str:
        word = match.group()
        return word if keyword.iskeyword(word) else "".join(rng.sample(word, len(word)))

    return IDENTIFIER.sub(mixed, text)


@functools.cache
def rows(split: str, length: int, every: int, limit: int | None = None) -> Packed:
    """Rows of plain code at even places, of scrambled code at odd ones; one file in ``every``.

    Args:
        limit: at most this many rows of each kind, evenly spread.
    """
    rng = random.Random(0)
    texts = corpus("stdlib-code", "train" if split == "train" else "heldout")[::every]
    both = [texts, [scramble(text, rng) for text in texts]]
    plain, hard = (pack([[byte + 1 for byte in text.encode()] for text in part], length, 0) for part in both)
    count = min(len(plain), len(hard))
    kept = np.linspace(0, count - 1, min(limit or count, count)).astype(int)
    ids, starts = (
        np.stack([getattr(part, name)[kept] for part in (plain, hard)], 1).reshape(2 * len(kept), length)
        for name in ("ids_NS", "starts_NS")
    )
    return Packed(ids, starts)


@functools.cache
def data_of(size: Scale, name: str) -> tuple[Dataset, Packed, Packed]:
    """Training rows, some of them to calibrate p on, and held-out rows taken at even distances."""
    budget = BUDGETS[name]
    every = budget.pick(ci=60, micro=8, full=4)
    plenty = size.steps * size.batch
    heldout = rows("heldout", size.length, budget.pick(ci=16, micro=2, full=1), size.heldout // 2)
    known = rows("train", size.length, every, plenty)
    some = np.random.default_rng(0).permutation(len(known))[: size.heldout]
    return Dataset({"data": known}), Packed(known.ids_NS[some], known.starts_NS[some]), heldout


# -- models -------------------------------------------------------------------------------------------------------


class Course:
    """Recorder: mean experts a token of each training step, over the mixtures."""

    def __init__(self) -> None:
        self.counts: dict[str, list[float]] = defaultdict(list)

    def record(self, site: str, routing: Routing, ctx: RoutingContext) -> None:
        """See Recorder."""
        if ctx.training:
            self.counts[site].append(routing.token_N.numel() / routing.num_tokens)

    def numbers(self) -> dict[str, float]:
        """The mean at the start, from a tenth of the run and at its end (each over a twentieth), overall, its fall."""
        mean = np.mean(list(self.counts.values()), axis=0)
        width = max(1, len(mean) // 20)
        places = {"at_start": 0, "at_tenth": len(mean) // 10, "at_end": len(mean) - width}
        found = {f"experts_{name}": float(mean[place : place + width].mean()) for name, place in places.items()}
        found["experts_in_training"] = float(mean.mean())
        return {**found, "fall": 1 - found["experts_at_end"] / found["experts_at_tenth"]}


@functools.cache
def trained(kind: str, seed: int, name: str, size: Scale) -> tuple[nn.Module, dict[str, float]]:
    """The trained model of an arm, and how many experts it used; made once a process."""
    model = llama(size, seed)
    setting: dict[str, float] = {"renormalise": kind.endswith("renormalised")}
    setting |= {"top_k": TOP_K[kind]} if kind in TOP_K else {"p": P}
    router = {"method": "train.softmax_topk" if kind in TOP_K else "train.dynamic_moe", "config": setting}
    weights = {"balance": BALANCE, "entropy": ENTROPY.get(kind, 0.0)}
    losses = {key: {"method": f"train.{key}_loss"} for key, weight in weights.items() if weight}
    use = method("train.moe")
    config = use.configure({"num_experts": EXPERTS, "expert_size": size.inner, "router": router, "losses": losses})
    for number in range(0, size.layers, size.layers // MIXTURES):
        block = model.model.layers[number]
        site = Site(path=f"model.layers.{number}.mlp", kind="mlp", module=block.mlp, dim=size.dim, layer=number)
        block.mlp = use.build(site, config, Shared())
    course = Course()
    with session(recorder=course):
        train(model, data_of(size, name)[0], size, seed, losses={key: weights[key] for key in losses})
    return model.eval(), course.numbers()


@dataclass
class Seen:
    """What held-out rows showed: loss of each target [M], experts of its token by mixture [M, L], is it hard [M]."""

    loss: Tensor
    experts: Tensor
    hard: Tensor
    probabilities: list[Tensor]


@torch.no_grad()
def look(model: nn.Module, heldout: Packed, size: Scale, *edits: Edit) -> Seen:
    """One pass over the held-out rows."""
    objective, losses, experts, hard, probabilities = Causal(), [], [], [], []
    torch.manual_seed(0)
    for at in range(0, len(heldout), size.batch):
        batch = objective.collate([heldout[i] for i in range(at, min(at + size.batch, len(heldout)))], [])
        labels = batch.pop("labels")[:, 1:]
        with session(edits=edits, collect=True) as opened:
            logits = model(**batch).logits[:, :-1]
        found = labels != IGNORE
        losses.append(nn.functional.cross_entropy(logits[found], labels[found], reduction="none"))
        (ctx,) = opened.take()
        routings = [routing for routing in ctx.routings.values() if routing is not None]
        counts = torch.stack([torch.bincount(one.token_N, minlength=one.num_tokens) for one in routings], -1)
        experts.append(counts.view(*batch["input_ids"].shape, -1)[:, :-1][found])
        odd = (torch.arange(at, at + len(labels)) % 2 == 1)[:, None].expand_as(labels)
        hard.append(odd[found])
        probabilities += [one.scores.probabilities() for one in routings if one.scores is not None]
    return Seen(torch.cat(losses), torch.cat(experts).double(), torch.cat(hard), probabilities)


class Dealt(Edit):
    """The control: as many experts for as many tokens, but dealt out at random; each token takes its best ones."""

    def on_routing(self, site: str, routing: Routing, router: Router, ctx: RoutingContext) -> Routing:
        """See Edit."""
        scores = routing.scores
        assert scores is not None
        count_T = torch.bincount(routing.token_N, minlength=routing.num_tokens)
        order_TC = rank(scores)
        dealt_T = count_T[torch.randperm(len(count_T))]
        return take_first(order_TC, scores.gate_TC.gather(1, order_TC), dealt_T, routing, scores)


def at_two(model: nn.Module, size: Scale, name: str) -> Seen:
    """Held-out rows under the p that gives two experts a token on training rows, found in turns: layers shift."""
    _, known, heldout = data_of(size, name)
    seen = look(model, known, size)
    for part in (known, known, heldout):
        seen = look(model, part, size, TopP(calibrate_p(seen.probabilities, 2.0)))
    return seen


@functools.cache
def difficulty(seed: int, name: str, size: Scale) -> Tensor:
    """How hard each held-out target is: its loss under the top-1 model, [M]."""
    model, _ = trained("top_1", seed, name, size)
    return look(model, data_of(size, name)[2], size).loss


def measure(seen: Seen, hardness: Tensor) -> dict[str, float]:
    """The numbers of an arm. ``hardness``: what ``difficulty`` gives."""
    from scipy.stats import spearmanr

    experts = seen.experts.mean(-1)
    by_layer = seen.experts.mean(0)
    found = {
        "heldout_loss": float(seen.loss.mean()),
        "mean_experts": float(experts.mean()),
        "first_minus_last": float(by_layer[0] - by_layer[-1]),
        "hard_minus_easy": float(experts[seen.hard].mean() - experts[~seen.hard].mean()),
        "spread": float(experts.std(correction=0)),
        "hard_loss_gap": float(seen.loss[seen.hard].mean() - seen.loss[~seen.hard].mean()),
    }
    varies = bool((experts != experts[0]).any())  # a number that never varies follows nothing
    found["spearman"] = float(spearmanr(experts.numpy(), hardness.numpy()).statistic) if varies else 0.0
    return found


def run(arm: str, seed: int, budget: Budget) -> Mapping[str, float]:
    """Train what the arm needs, then measure on held-out rows."""
    size = scale(budget)
    heldout = data_of(size, budget.name)[2]
    kind = {"post_hoc": "top_2", "shuffled": "top_p"}.get(arm, arm)
    model, course = trained(kind, seed, budget.name, size)
    hardness = difficulty(seed, budget.name, size)
    if arm == "post_hoc":
        found = measure(at_two(model, size, budget.name), hardness)
        return {**found, "loss_at_two": found["heldout_loss"], "experts_at_two": found["mean_experts"]}
    found = measure(look(model, heldout, size, *([Dealt()] if arm == "shuffled" else [])), hardness)
    if arm in ENTROPY:
        seen = at_two(model, size, budget.name)
        found |= {**course, "loss_at_two": float(seen.loss.mean()), "experts_at_two": float(seen.experts.mean())}
    if TOP_K.get(arm) == 2:
        found |= {"loss_at_two": found["heldout_loss"], "experts_at_two": 2.0}
    return found


# What explains a claim about the loss at two experts a token.
AT_TWO = (
    "at two experts a token: top-p {top_p} ({top_p.experts_at_two} experts), top-2 {top_2}, top-p without entropy loss "
    "{no_entropy}, with a hundredfold {more_entropy}; with weights that sum to 1 top-p {renormalised}, top-2 "
    "{top_2_renormalised}. Top-1 reaches {top_1.heldout_loss}; top-p at its own p {top_p.heldout_loss} with "
    "{top_p.mean_experts} experts. In training top-p used {top_p.experts_in_training} experts a token."
)

STUDY = Study(
    paper="dynamic-moe",
    title="As many experts as the router needs",
    setting=(
        "A Llama model (4 layers, width 128, layers 0 and 2 mixtures of 8 experts of width 256) reads bytes: the "
        "standard library's source files, and the same files with the letters of identifiers shuffled, row by row in "
        "turn; 300 steps of 1024 tokens, p = 0.4, weights not renormalised unless an arm says so. Arms see equal "
        "tokens, not equal compute: top-p starts at three experts a token or more. The paper trains 3.5B parameters "
        "with 16 experts on 100B tokens. p for two experts a token is calibrated on training rows. Numbers of the "
        "paper are quoted as public notes on it give them; two of its tables are quoted with different scores for the "
        "same setting."
    ),
    # Thresholds without a number in the notes: 0.1 experts between layers is a thirtieth of what the paper sees, 0.02
    # between texts twice what it sees inside one family of tasks, a rank correlation of 0.05 explains 1/400 of ranks.
    claims=(
        Claim(
            key="fewer_with_training",
            text="Experts a token fall while the router learns.",
            where="README of the released code",
            claimed="above 2 early, below 2 after 60B tokens",
            metric="fall",
            judge=Within(arm="top_p", low=0.25),
            tells=(
                "experts a token of top-p: {top_p.experts_at_start} at the start, {top_p.experts_at_tenth} after a "
                "tenth of the run, {top_p.experts_at_end} at its end; at the end {no_entropy.experts_at_end} without "
                "the entropy loss, {more_entropy.experts_at_end} with a hundredfold one, {renormalised.experts_at_end}"
                " where weights sum to 1."
            ),
        ),
        Claim(
            key="entropy_saves",
            text="With the entropy loss a token needs fewer experts than without.",
            where="ablation of the entropy loss",
            claimed="1.8 against 2.0 experts",
            metric="mean_experts",
            judge=Beats(method="top_p", control="no_entropy"),
            tells=(
                "experts a token: {no_entropy} without the loss, {top_p} with weight 1e-4, {more_entropy} with 1e-2; "
                "held-out loss {no_entropy.heldout_loss}, {top_p.heldout_loss}, {more_entropy.heldout_loss}."
            ),
        ),
        Claim(
            key="as_good_as_top_2",
            text="At two experts a token it is no worse than top-2.",
            where="main table, p = 0.4 against top-2",
            claimed="score 42.3 with 1.8 experts against 41.6 with 2",
            metric="loss_at_two",
            judge=NotWorse(method="top_p", control="top_2", tolerance=0.005),
            tells=AT_TWO,
        ),
        Claim(
            key="better_than_top_2",
            text="At two experts a token it is better than top-2.",
            where="abstract",
            claimed="+0.7 % on average with less than 90 % of the activated parameters",
            metric="loss_at_two",
            judge=Beats(method="top_p", control="top_2", by=0.01),
            tells=AT_TWO,
        ),
        Claim(
            key="which_tokens_matters",
            text="It matters which tokens get more experts: dealt out at random, the same numbers do worse.",
            where="the refuting control",
            claimed="harder tasks need more experts",
            metric="heldout_loss",
            judge=Beats(method="top_p", control="shuffled"),
            tells=(
                "loss {top_p}, dealt out {shuffled}; the number of experts has mean {top_p.mean_experts} and standard "
                "deviation {top_p.spread}. One expert for all reaches {top_1}, two {top_2}."
            ),
        ),
        Claim(
            key="not_afterwards",
            text="Put on a trained top-2 model, top-p saves nothing: at two experts a token it is worse than top-2.",
            where="top-p applied to the top-2 model",
            claimed="score 40.3 at 1.9 experts against 41.6",
            metric="loss_at_two",
            judge=Beats(method="top_2", control="post_hoc"),
            tells=(
                "top-2 {top_2}, top-p put on it {post_hoc} at {post_hoc.experts_at_two} experts (standard deviation "
                "{post_hoc.spread}); trained with top-p {top_p}; top-1 {top_1.heldout_loss}."
            ),
        ),
        Claim(
            key="lower_layers_more",
            text="Lower layers use more experts than upper ones.",
            where="experts by layer",
            claimed="up to about 4 in low layers, about 1 in the top layer",
            metric="first_minus_last",
            judge=Within(arm="top_p", low=0.1),
            tells=(
                "first less last layer: {top_p} of {top_p.mean_experts} experts; without entropy loss {no_entropy}, "
                "with a hundredfold {more_entropy}, with weights that sum to 1 {renormalised}, top-p on top-2 "
                "{post_hoc}."
            ),
        ),
        Claim(
            key="harder_tokens_more",
            text="Tokens that a top-1 model finds hard get more experts (rank correlation with its loss).",
            where="title and section 4 (BBH)",
            claimed="1.87 experts on the hardest task, 1.76 on average",
            metric="spearman",
            judge=Beats(method="top_p", control="shuffled", better="higher", by=0.05),
            tells=(
                "rank correlation {top_p}, dealt out {shuffled}; without entropy loss {no_entropy}, with a hundredfold"
                " {more_entropy}, with weights that sum to 1 {renormalised}, top-p on top-2 {post_hoc}. The number of "
                "experts has standard deviation {top_p.spread}."
            ),
        ),
        Claim(
            key="harder_text_more",
            text="The harder text gets more experts.",
            where="section 4 (BBH)",
            claimed="1.87 experts on the hardest task, 1.76 on average",
            metric="hard_minus_easy",
            judge=Beats(method="top_p", control="shuffled", better="higher", by=0.02),
            tells=(
                "hard less easy text: {top_p} experts, dealt out {shuffled}; without entropy loss {no_entropy}, with a"
                " hundredfold {more_entropy}, top-p on top-2 {post_hoc}. The hard text costs top-1 "
                "{top_1.hard_loss_gap} nats a byte more than the easy one."
            ),
        ),
    ),
    arms=(
        Arm(name="top_p", text="top-p with p = 0.4, entropy loss of weight 1e-4"),
        Arm(name="no_entropy", text="the same without the entropy loss", role="control"),
        Arm(name="top_1", text="one expert a token", role="control"),
        Arm(name="top_2", text="two experts a token", role="control"),
        Arm(name="post_hoc", text="top-p on the trained top-2 model, at two experts a token", role="control"),
        Arm(name="shuffled", text="the top-p model, numbers of experts dealt out to other tokens", role="control"),
        Arm(
            name="more_entropy",
            text="top-p, entropy loss of weight 1e-2: is 1e-4 too weak for a short run?",
            role="reference",
        ),
        Arm(name="renormalised", text="top-p, weights divided by their sum: is it the scale?", role="reference"),
        Arm(name="top_2_renormalised", text="top-2, weights divided by their sum, to compare", role="reference"),
    ),
    run=run,
    methods=("train.dynamic_moe", "train.entropy_loss", "train.balance_loss", "train.softmax_topk", "train.moe"),
    units={
        "heldout_loss": "nats a byte",
        "loss_at_two": "nats a byte at two experts a token",
        "mean_experts": "experts a token",
        "fall": "part of the experts a token at a tenth of the run",
        "first_minus_last": "experts a token",
        "hard_minus_easy": "experts a token",
        "spearman": "rank correlation",
    },
)
