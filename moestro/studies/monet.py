"""Monet: thousands of tiny experts at the parameters of a dense layer. As good? And can a domain be cut out?

Models read four domains in equal shares: Python, English prose, German prose and C++. Then the experts that one domain
uses at least twice as much as any other are masked, and the loss of every domain is measured again. The controls mask
as many experts at random, and the experts of an ordinary mixture, by the same rule or the one most typical a layer.
Paragraphs of held-out text that also stand in training text (headers, topics that quote one another) are taken out.
"""

import functools
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from moestro.core.errors import DataError
from moestro.core.registry import method
from moestro.core.site import Shared, Site
from moestro.data.corpora import MIN_SHARED_PARAGRAPH, corpus
from moestro.data.dataset import Dataset
from moestro.data.packing import Packed, pack, positions
from moestro.data.tokens import encode, separator_id, train_bpe
from moestro.studies._framework import BUDGETS, Arm, Beats, Budget, Claim, NotWorse, Study, Within
from moestro.studies._language import Scale, llama, train


DOMAINS = ("python", "english", "german", "cpp")
HELDOUT_OF = 8  # one document in this many
PROBE = 4  # times as many rows to find experts with as to measure their loss on: rare experts need many tokens
LAMBDA = 1e-3  # of both losses, on means over routers
GROUP = 2  # layers that share a router
ENOUGH, TIMES = 0.1, 3.0  # nats and selectivity at which a domain counts as cut out
EXPERTS, TOP_K = 8, 2  # of the ordinary mixture
SHORTER = 2  # the part of the steps that the short arms take
KINDS = {"monet_random": "monet_vd", "monet_loose": "monet_vd", "moe_most": "moe"}  # arms that use another's model
RATIOS = {"monet_loose": 1.3}


@dataclass(frozen=True)
class Text:
    """Rows of every domain: to train on, to find experts with (of the same documents), and held out."""

    train: Dataset
    probe: Mapping[str, list[dict[str, Tensor]]]
    heldout: Mapping[str, list[dict[str, Tensor]]]


def scale(budget: Budget) -> Scale:
    """A small run for each budget; ``inner`` is that of the dense layer and is worked out."""
    return budget.pick(
        ci=Scale(layers=2, dim=32, heads=2, vocabulary=512, length=32, batch=4, steps=4, heldout=4),
        micro=Scale(layers=2, dim=64, heads=2, vocabulary=1024, length=64, batch=8, steps=60, heldout=16),
        full=Scale(steps=240, heldout=32),
    )


def product_keys(size: Scale) -> dict[str, int]:
    """Settings of the Monet layer at a scale: n = 48, m = 8, H = 4, k = 6 at width 128."""
    small = size.dim < 128
    return {"axis": 16 if small else 48, "expert_size": 8, "heads": 2 if small else 4, "top_k": 4 if small else 6}


# -- text ---------------------------------------------------------------------------------------------------------


def documents(domain: str) -> list[str]:
    """Library modules, the language reference, our German pieces, or the C++ headers that come with PyTorch.

    Raises:
        DataError: this installation was made without them.
    """
    if domain == "german":
        return corpus("german")
    if domain == "english":
        try:
            from pydoc_data.topics import topics
        except ImportError:
            raise DataError("english: this Python has no pydoc_data.topics; install its whole library") from None
        cut = (topics[name].split("\n\n") for name in sorted(topics))
        return ["\n\n".join(part for part in parts if ">>>" not in part and "::=" not in part) for parts in cut]
    if domain == "python":
        folder, files = Path(sysconfig.get_path("stdlib")), "*.py"
    else:
        folder, files = Path(torch.__file__).parent / "include" / "c10", "**/*.h"
    found = sorted(folder.glob(files))
    if len(found) < HELDOUT_OF:
        raise DataError(f"{domain}: {len(found)} files {files} in {folder}, {HELDOUT_OF} are needed; install them")
    return [file.read_text(encoding="utf-8", errors="replace") for file in found]


@functools.cache
def text(name: str) -> Text:
    """The four domains at a budget, tokenised by one BPE; German is short and comes round many times."""
    size, budget = scale(BUDGETS[name]), BUDGETS[name]
    most = budget.pick(ci=60_000, micro=200_000, full=900_000)  # characters of a domain
    cut = {}
    for domain in DOMAINS:
        texts = documents(domain)
        train = [text for place, text in enumerate(texts) if place % HELDOUT_OF]
        cut[domain] = _first(train, most), _first(unseen(texts[::HELDOUT_OF], train), most // 4)
    tokenizer = train_bpe([text for train, _ in cut.values() for text in train], size.vocabulary)
    end = separator_id(tokenizer)
    rows = {
        domain: [pack(encode(tokenizer, texts), size.length, end) for texts in both] for domain, both in cut.items()
    }
    share = -(-size.steps * size.batch // len(DOMAINS))
    mixed = [rows[domain][0][place % len(rows[domain][0])] for place in range(share) for domain in DOMAINS]
    return Text(
        Dataset({"data": mixed}),
        {domain: _batches(rows[domain][0], size, PROBE * size.heldout) for domain in DOMAINS},
        {domain: _batches(rows[domain][1], size, size.heldout) for domain in DOMAINS},
    )


def unseen(texts: Sequence[str], train: Sequence[str]) -> list[str]:
    """Held-out texts without the longer paragraphs that also stand in training text."""
    known = {" ".join(part.split()) for text in train for part in text.split("\n\n")}
    known = {part for part in known if len(part) >= MIN_SHARED_PARAGRAPH}
    left = ([part for part in text.split("\n\n") if " ".join(part.split()) not in known] for text in texts)
    return [text for text in map("\n\n".join, left) if text.strip()]


def _first(texts: Sequence[str], characters: int) -> list[str]:
    """Texts in a fixed random order, up to a number of characters in all."""
    order = np.random.default_rng(0).permutation(len(texts))
    found: list[str] = []
    for place in order:
        found.append(texts[place][: characters - sum(map(len, found))])
        if sum(map(len, found)) >= characters:
            break
    return found


def _batches(rows: Packed, size: Scale, most: int) -> list[dict[str, Tensor]]:
    """Batches of rows at even distances, at most ``most`` rows."""
    places = np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int)
    found = []
    for at in range(0, len(places), size.batch):
        chosen = [rows[int(place)] for place in places[at : at + size.batch]]
        starts_BS = torch.as_tensor(np.stack([row["starts"] for row in chosen]))
        ids_BS = torch.as_tensor(np.stack([row["input_ids"] for row in chosen])).long()
        found.append({"input_ids": ids_BS, "position_ids": positions(starts_BS)})
    return found


# -- models -------------------------------------------------------------------------------------------------------


class Squared(nn.Module):
    """The dense layer: V max(U x + b, 0)^2 + c."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, inner), nn.Linear(inner, dim)
        for linear in (self.up, self.down):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        y: Tensor = self.down(self.up(x).relu().square())
        return y


def budget_of_layer(size: Scale) -> int:
    """Parameters of a Monet layer and of its share of a router, which every arm may spend a layer."""
    keys = product_keys(size)
    layer = keys["axis"] * (2 * keys["expert_size"] * size.dim + keys["expert_size"] + size.dim)
    return layer + 2 * size.dim * keys["heads"] * keys["axis"] // GROUP


def build(size: Scale, kind: str, seed: int) -> nn.Module:
    """A Llama model with the feed-forward layers of one kind, all of equal parameters."""
    model = llama(size, seed)
    torch.manual_seed(seed + 1)
    room, shared = budget_of_layer(size), Shared()
    for number, block in enumerate(model.model.layers):
        site = Site(path=f"model.layers.{number}.mlp", kind="mlp", module=block.mlp, dim=size.dim, layer=number)
        if kind == "dense":
            block.mlp = Squared(size.dim, (room - size.dim) // (2 * size.dim + 1))
        elif kind == "moe":
            inner = (room // EXPERTS - size.dim) // (2 * size.dim)
            losses = {"balance": {"method": "train.balance_loss"}}
            form = {"expert_size": inner, "activation": "gelu", "gated": False, "bias": False, "losses": losses}
            use = method("train.moe")
            router = {"method": "train.softmax_topk", "config": {"top_k": TOP_K}}
            block.mlp = use.build(site, use.configure({"num_experts": EXPERTS, "router": router, **form}), shared)
        else:
            use = method("train.monet")
            decompose = "horizontal" if kind == "monet_hd" else "vertical"
            config = {**product_keys(size), "group_size": GROUP, "decompose": decompose}
            block.mlp = use.build(site, use.configure(config), shared)
    model.add_module("moestro_shared", shared.modules)
    return model


@functools.cache
def trained(kind: str, seed: int, name: str) -> nn.Module:
    """One trained model; arms that only mask it differently share it."""
    size = scale(BUDGETS[name])
    model = build(size, kind.removesuffix("_short"), seed)
    weight = LAMBDA / -(-size.layers // GROUP)  # losses add up over routers
    weights = {"uniformity": weight, "ambiguity": weight} if kind.startswith("monet") else {}
    steps = size.steps // (SHORTER if kind.endswith("_short") else 1)
    train(model, text(name).train, size, seed, steps=steps, losses={"balance": 0.01} if kind == "moe" else weights)
    return model.eval()


@functools.cache
def scored(kind: str, seed: int, name: str) -> dict[str, Tensor]:
    """Scores of the experts of a trained model in every domain, on training text."""
    found: dict[str, Tensor] = _meter().expert_scores(trained(kind, seed, name), text(name).probe)
    return found


# -- cutting out --------------------------------------------------------------------------------------------------


def masks_of(arm: str, scores: Mapping[str, Tensor], place: int, seed: int) -> dict[str, Tensor]:
    """The experts of a domain, bool by site: by the ratio, the most typical one, or as many at random."""
    meter = _meter()
    if arm == "moe_most":
        found = {}
        for site, score in scores.items():
            others = torch.cat([score[:place], score[place + 1 :]]).mean(0).clamp(min=1e-9)
            found[site] = nn.functional.one_hot((score[place] / others).argmax(), len(others)).bool()
        return found
    ratio = RATIOS.get(arm, 2.0)
    masks = {site: meter.assign_domains(score, ratio) == place for site, score in scores.items()}
    return meter.random_masks(masks, seed) if arm == "monet_random" else masks


def forget(
    arm: str, model: nn.Module, scores: Mapping[str, Tensor], data: Text, plain: Sequence[float], seed: int
) -> dict[str, float]:
    """Mask each domain in turn; means over domains. ``plain``: the domains' losses without a mask."""
    meter = _meter()
    own, others, selective, share = [], [], [], []
    for place, _ in enumerate(DOMAINS):
        masks = masks_of(arm, scores, place, seed)
        change_D = meter.loss_changes(model, data.heldout, masks, plain)
        own.append(float(change_D[place]))
        others.append(float(change_D.sum() - change_D[place]) / (len(DOMAINS) - 1))
        selective.append(meter.selectivity(change_D, place))
        share.append(sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values()))
    cut_out = [rise >= ENOUGH and times >= TIMES for rise, times in zip(own, selective, strict=True)]
    return {
        "domains_cut_out": float(sum(cut_out)),
        "own_rise": float(np.mean(own)),
        "others_rise": float(np.mean(others)),
        "gap": float(np.mean(own) - np.mean(others)),
        "masked_share": float(np.mean(share)),
    }


def _meter() -> ModuleType:
    return method("inspect.domain_experts").module


def run(arm: str, seed: int, budget: Budget) -> Mapping[str, float]:
    """Train or reuse the arm's model, then measure its held-out loss and what masking a domain does."""
    data = text(budget.name)
    kind = KINDS.get(arm, arm)
    model = trained(kind, seed, budget.name)
    losses = [_meter().loss(model, batches) for batches in data.heldout.values()]
    found = {"heldout_loss": float(np.mean(losses))}
    if arm.startswith("dense"):
        return found
    return {**found, **forget(arm, model, scored(kind, seed, budget.name), data, losses, seed)}


STUDY = Study(
    paper="monet",
    title="Experts that can be cut out by domain",
    setting=(
        "A Llama model (4 layers, width 128) whose feed-forward layers have equal parameters: 2304 Monet experts (48 "
        "halves of each kind, width 8, 4 routing heads, a router for 2 layers), 8 ordinary experts (gelu, where the "
        "others have a squared relu) with 2 active, or one dense layer. 240 steps of 1024 tokens, a quarter each of "
        "Python, English prose, German prose (short, read many times) and C++. Experts are found on training text and "
        "masked on held-out text, where the change of the loss is measured. The paper has 262,144 experts a layer, 850 "
        "million parameters and more, and benchmarks."
    ),
    claims=(
        Claim(
            key="quality",
            text="It is nearly as good as a dense layer of equal parameters after the same tokens.",
            where="table 2",
            claimed="average of 8 benchmarks 0.478 against 0.484 at 1.4B, 0-shot",
            metric="heldout_loss",
            judge=NotWorse(method="monet_vd", control="dense", tolerance=0.03, relative=True),
            tells="vertical {monet_vd}, dense {dense}; after half the steps {monet_vd_short} and {dense_short}.",
        ),
        Claim(
            key="vertical",
            text="The vertical decomposition is better than the horizontal one.",
            where="table 2",
            claimed="0.478 against 0.463 at 1.4B, 0-shot",
            metric="heldout_loss",
            judge=Beats(method="monet_vd", control="monet_hd"),
            tells="vertical {monet_vd}, horizontal {monet_hd}, dense {dense}.",
        ),
        Claim(
            key="cut_out",
            text=(
                "Masking a domain's experts raises its loss by 0.1 nats or more and three times as much as that of "
                "the others, for 3 of 4 domains."
            ),
            where="tables 3 and 4",
            claimed="pass@100 of the masked language -9.1 to -30.6, of the others -0.6 to -1.8 on average",
            metric="domains_cut_out",
            judge=Within(arm="monet_vd", low=3),
            tells=(
                "domains cut out {monet_vd}; the mean rise of the masked domain is {monet_vd.own_rise} nats, of the "
                "others {monet_vd.others_rise}, with {monet_vd.masked_share} of the experts masked. With experts that "
                "a domain uses 1.3 times as much: {monet_loose.own_rise} and {monet_loose.others_rise}, "
                "{monet_loose.masked_share} masked. After half the steps: {monet_vd_short.own_rise} and "
                "{monet_vd_short.others_rise}, {monet_vd_short.masked_share} masked."
            ),
        ),
        Claim(
            key="chosen",
            text="It is the choice of experts: as many at random do not tell the domains apart.",
            where="the refuting control",
            claimed="not measured in the paper",
            metric="gap",
            judge=Beats(method="monet_vd", control="monet_random", better="higher", by=0.1),
            tells=(
                "rise of the masked domain above the others: chosen {monet_vd}, random {monet_random} nats, with "
                "{monet_vd.masked_share} of the experts masked; chosen among those that a domain uses 1.3 times as "
                "much {monet_loose}, with {monet_loose.masked_share}."
            ),
        ),
        Claim(
            key="monosemantic",
            text="An ordinary mixture has no experts that can be cut out like this.",
            where="section 5 and figure 2: OLMoE has no expert that passes the domain rule",
            claimed="none in OLMoE, 2.2 % of Monet's a domain",
            metric="gap",
            judge=Beats(method="monet_vd", control="moe", better="higher", by=0.1),
            tells=(
                "rise of the masked domain above the others: Monet {monet_vd} nats with {monet_vd.masked_share} of the "
                "experts masked, the mixture by the same rule {moe} with {moe.masked_share}, by its most typical "
                "expert a layer {moe_most} with {moe_most.masked_share}."
            ),
        ),
        Claim(
            key="typical",
            text="Nor does an ordinary mixture forget a domain alone without its most typical expert of each layer.",
            where="the stronger control of an ordinary mixture",
            claimed="the paper masks the mixture's most activated expert; it states no number for this choice",
            metric="gap",
            judge=Beats(method="monet_vd", control="moe_most", better="higher", by=0.1),
            tells=(
                "rise of the masked domain and of the others: Monet {monet_vd.own_rise} and {monet_vd.others_rise} "
                "nats with {monet_vd.masked_share} of the experts masked, the mixture {moe_most.own_rise} and "
                "{moe_most.others_rise} with {moe_most.masked_share}."
            ),
        ),
    ),
    arms=(
        Arm(name="monet_vd", text="vertical halves; experts masked that a domain uses twice as much as any other"),
        Arm(name="monet_hd", text="horizontal halves, the same rule"),
        Arm(name="dense", text="one dense layer of equal parameters", role="control"),
        Arm(name="moe", text="8 ordinary experts, 2 active, the same rule", role="control"),
        Arm(name="moe_most", text="the same mixture, the most typical expert of each layer masked", role="control"),
        Arm(name="monet_random", text="the vertical model, as many experts masked at random", role="control"),
        Arm(name="monet_loose", text="the vertical model, experts used 1.3 times as much", role="reference"),
        Arm(name="monet_vd_short", text="vertical halves, half the steps", role="reference"),
        Arm(name="dense_short", text="the dense layer, half the steps", role="reference"),
    ),
    run=run,
    methods=(
        "train.monet",
        "train.uniformity_loss",
        "train.ambiguity_loss",
        "inspect.domain_experts",
        "train.moe",
        "train.softmax_topk",
        "train.balance_loss",
    ),
    units={
        "heldout_loss": "nats a token, mean of four domains",
        "domains_cut_out": "domains of 4",
        "gap": "nats, masked domain above the others",
    },
)
