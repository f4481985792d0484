"""MoMa: what experts of their own give each modality, and what is left of it once tokens are chosen causally.

Rows mix bytes of prose with images, 64 pixels in 17 levels, whose tokens are control characters that prose does not
have. All arms cost the same operations a token and see the same tokens. Choices over a batch look ahead, so every loss
here says whether it is causal: training losses of expert choice are not, the claims are about held-out losses with the
choices made by auxiliary routers, token by token.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moestro.core.cost import RowCounter, Work, cost
from moestro.core.errors import ConfigError
from moestro.core.registry import method
from moestro.core.session import Edit, session
from moestro.core.site import Shared, Site
from moestro.data.dataset import Dataset
from moestro.data.packing import pack
from moestro.data.sources import Split
from moestro.data.tokens import byte_tokenizer, encode, separator_id
from moestro.studies._choices import Answers, Flipped, TopOne
from moestro.studies._framework import BUDGETS, Arm, Beats, Budget, Claim, Study, Within
from moestro.studies._language import Scale, batches, llama
from moestro.studies._pixels import documents, image_ids
from moestro.training.objectives import Causal, MethodObjective
from moestro.training.optimizer import make_optimizer, set_lr
from moestro.training.recipe import OptimizerConfig
from moestro.training.schedule import ScheduleConfig
from moestro.training.size import attention_costs
from moestro.training.step import Stepper


DEPTH = 0.25
NAMES = ("text", "image")
GROUPS: dict[str, dict[str, int]] = {"dense": {}, "mixed": {"any": 4}, "moma_1t1i": {"text": 1, "image": 1}}
PAIRS = {"text": 2, "image": 2}  # the other arms
FLIPS, DRAWS = (0.005, 0.01, 0.05), 3


@dataclass(frozen=True)
class Data:
    """Rows to train on, and held-out rows as batches."""

    train: Dataset
    heldout: tuple[dict[str, Tensor], ...]


@functools.cache
def data(name: str) -> Data:
    """The rows of a budget: documents end to end, cut into rows that lie across them."""
    size, most = scale(BUDGETS[name]), BUDGETS[name].pick(ci=20_000, micro=200_000, full=1_000_000)
    tokenizer, rows = byte_tokenizer(), []
    source = "german" if name == "ci" else "stdlib-docs"  # reading the latter takes seconds
    splits: dict[Split, int] = {"train": most, "heldout": max(6000, most // 8)}
    for split, characters in splits.items():
        stream = [i for ids in encode(tokenizer, documents(split, characters, source)) for i in ids]
        rows.append(pack([stream], size.length, separator_id(tokenizer)))
    places = np.linspace(0, len(rows[1]) - 1, min(size.heldout, len(rows[1]))).astype(int)
    kept = [rows[1][int(place)] for place in places]
    parts = [Causal().collate(kept[at : at + size.batch], []) for at in range(0, len(kept), size.batch)]
    return Data(Dataset({"data": rows[0]}), tuple(parts))


def scale(budget: Budget) -> Scale:
    """A run for each budget; ``inner`` is the dense arm's, the others' are worked out."""
    return budget.pick(
        ci=Scale(layers=2, dim=32, inner=64, heads=2, vocabulary=259, length=160, batch=2, steps=3, heldout=2),
        micro=Scale(layers=2, dim=64, inner=128, heads=2, vocabulary=259, length=160, batch=4, steps=60, heldout=16),
        full=Scale(inner=256, vocabulary=259, length=160, batch=8, steps=270, heldout=48, lr=3e-3),
    )


# -- models -------------------------------------------------------------------------------------------------------


class PostNorm(nn.Module):
    """A branch whose output is normalised, not its input."""

    def __init__(self, inner: nn.Module, dim: int) -> None:
        super().__init__()
        self.inner, self.norm = inner, nn.RMSNorm(dim, eps=1e-6)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the branch returns, normalised; attention returns a tuple."""
        out = self.inner(*args, **kwargs)
        return (self.norm(out[0]), *out[1:]) if isinstance(out, tuple) else self.norm(out)


def build(size: Scale, arm: str, seed: int, inner: int, layers: int) -> nn.Module:
    """A Llama model with norms after its branches, and the arm's feed-forwards of width ``inner``. All else begins with
    the same numbers in all arms of as many layers.
    """
    model = llama(size.model_copy(update={"layers": layers}), seed)
    torch.manual_seed(seed + 1)
    shared, groups = Shared(), GROUPS.get(arm, PAIRS)
    modality = {} if "any" in groups else {"image": [image_ids()]}
    for number, block in enumerate(model.model.layers):
        block.input_layernorm = block.post_attention_layernorm = nn.Identity()
        block.self_attn = PostNorm(block.self_attn, size.dim)
        site = Site(path=f"model.layers.{number}.mlp", kind="mlp", module=block.mlp, dim=size.dim, layer=number)
        if groups:
            use = method("train.moma")
            config = {"groups": groups, "modality": modality, "expert_size": inner}
            block.mlp = use.build(site, use.configure(config), shared)
        else:
            block.mlp = PostNorm(block.mlp, size.dim)
        if arm == "token_choice":
            loss = method("train.balance_loss")
            block.mlp.losses = nn.ModuleDict({"balance": loss.build(site, loss.configure({}), shared)})
        if arm.startswith("mod_") and number % 2 == 0:
            use = method("train.mixture_of_depths")
            place = Site(path=f"model.layers.{number}", kind="block", module=block, dim=size.dim, layer=number)
            model.model.layers[number] = use.build(place, use.configure({"capacity": DEPTH}), shared)
    return model


def flops(model: nn.Module, length: int, rows: Mapping[str, Sequence[float]] | None = None) -> float:
    """Operations of a forward for one token, without auxiliary routers while they are not trained."""
    return cost(model, Work(length, False, rows=rows or {}, by_length=attention_costs(model)))


@functools.cache
def equal_size(arm: str, size: Scale) -> tuple[int, int]:
    """Inner width and layers at which an arm costs what the dense one does. Depth routing has more layers: as many
    full ones' worth as there were, rounded down to pairs, of which one is run by a share of the tokens.
    """
    layers = size.layers
    active = float(layers)
    if arm.startswith("mod_"):
        layers = 2 * int(size.layers / (1 + DEPTH))
        active = layers / 2 * (1 + DEPTH)
    wanted = flops(build(size, "dense", 0, size.inner, size.layers), size.length)
    there = flops(build(size, arm, 0, size.inner, layers), size.length)
    return max(1, round(size.inner + (wanted - there) / (6 * size.dim * active))), layers


# -- training -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """A model after both stages. curve: text and image loss of every step of the first, [steps, 2]."""

    model: nn.Module
    curve: np.ndarray
    edits: tuple[Edit, ...]


def split_loss() -> MethodObjective:
    """Next-token prediction, reported by modality and by whether it is causal."""
    use = method("train.moma")
    return MethodObjective(Causal(), use.entry("objective"), use.configure({"modality": {"image": [image_ids()]}}))


def shares(batch: Mapping[str, Tensor]) -> Tensor:
    """Share of the targets that each modality has, float64 [2]."""
    labels = batch["labels"][:, 1:]
    first, last = image_ids()
    image = ((labels >= first) & (labels <= last)).double().mean()
    return torch.stack([1 - image, image])


@functools.cache
def trained(arm: str, seed: int, name: str) -> Trained:
    """Both stages of an arm; made once a process."""
    budget, size = BUDGETS[name], scale(BUDGETS[name])
    model = build(size, arm, seed, *equal_size(arm, size))
    edits: tuple[Edit, ...] = (TopOne(),) if arm == "token_choice" else ()
    weights = {"balance": 0.01} if edits else {"auxiliary": 1.0} if GROUPS.get(arm, PAIRS) else {}
    settings = OptimizerConfig(lr=size.lr)
    stepper = Stepper(model, split_loss(), make_optimizer(model, settings))
    schedule = ScheduleConfig(kind="cosine", warmup=max(1, size.steps // 10), floor=0.1)
    batch = batches(data(name).train, size, seed)
    curve = []
    model.train()
    with session(edits=edits):
        for step in range(size.steps):
            set_lr(stepper.optimizer, schedule.factor(step, size.steps))
            terms = stepper.run(step, [batch(step)], weights=weights, values={"auxiliary": 0.0}).terms
            found = [next(terms[key] for key in terms if key.endswith(f"causal_{part}")) for part in NAMES]
            curve.append((torch.tensor(found, dtype=torch.float64) / shares(batch(step))).numpy())
    if "auxiliary" in weights:
        for key, parameter in model.named_parameters():
            parameter.requires_grad_("auxiliary" in key)
        stepper = Stepper(model, split_loss(), make_optimizer(model, settings))
        total = budget.pick(ci=2, micro=60, full=80)
        for step in range(total):
            set_lr(stepper.optimizer, ScheduleConfig(kind="cosine", warmup=max(1, total // 10)).factor(step, total))
            stepper.run(step, [batch(size.steps + step)], weights=weights)
    return Trained(model.eval(), np.array(curve), edits)


# -- measuring ----------------------------------------------------------------------------------------------------


def losses(one: Trained, parts: Sequence[Mapping[str, Tensor]], *, batch: bool, edits: tuple[Edit, ...] = ()) -> Tensor:
    """Held-out nats a token of text and of images, float64 [2].

    Args:
        batch: choose over the batch as in training, which is not causal; else token by token.

    Raises:
        ConfigError: a loss that should be causal is not.
    """
    objective, total, count = split_loss(), torch.zeros(2).double(), torch.zeros(2).double()
    for part in parts:
        with torch.no_grad(), session(edits=(*one.edits, *edits), values={"batch_selection": float(batch)}):
            terms = objective(one.model, dict(part), {})
        if not batch and not all(key.startswith("causal") for key in terms):
            raise ConfigError(f"this loss was to be causal but is {', '.join(terms)}")
        total += torch.stack([term.total.double() for term in terms.values()])
        count += shares(part) * part["labels"][:, 1:].numel()
    return total / count


def agreement(one: Trained, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """How well auxiliary routers tell the choices over the batch, on the hidden states of those choices."""
    answers = Answers()
    one.model.train()
    for part in parts:
        with torch.no_grad(), session(edits=(answers,)):
            one.model(part["input_ids"], position_ids=part["position_ids"], use_cache=False)
    one.model.eval()
    return answers.told()


def speed_up(curve: np.ndarray, dense: np.ndarray, ratio: float) -> float:
    """Operations at which the dense run's training loss reaches a level over those at which the other's does. The level
    is the higher of the two final losses, so that both reach it: above 1 the other is faster.

    Args:
        curve, dense: losses by step. ratio: operations a token of the other run over those of the dense one.
    """
    wide = max(1, len(dense) // 10)
    ours, theirs = (np.convolve(one, np.ones(wide) / wide, "valid") for one in (curve, dense))
    level = max(ours[-1], theirs[-1])
    return float((np.argmax(theirs <= level) + wide) / ((np.argmax(ours <= level) + wide) * ratio))


def noise(one: Trained, parts: Sequence[Mapping[str, Tensor]], depth: bool, seed: int) -> dict[str, float]:
    """Rise of the loss, mean of DRAWS, when shares of the choices are wrong; of the last share also by wrong choice."""
    calm = float(losses(one, parts, batch=True).mean())
    tokens = sum(part["input_ids"].numel() for part in parts)
    found = {}
    for share in FLIPS:
        drawn = [Flipped(share, depth, DRAWS * seed + draw) for draw in range(DRAWS)]
        rise = sum(float(losses(one, parts, batch=True, edits=(edit,)).mean()) - calm for edit in drawn) / DRAWS
        found[f"rise_at_{round(share * 1000)}_of_1000"] = rise
        found["rise_per_wrong_choice"] = rise * tokens * DRAWS / max(1, sum(edit.flips for edit in drawn))
    return found


def run(arm: str, seed: int, budget: Budget) -> Mapping[str, float]:
    """Train or reuse the arm, then measure it by the batch's choices and token by token."""
    size, parts, one = scale(budget), data(budget.name).heldout, trained(arm, seed, budget.name)
    rows = RowCounter()
    with session(recorder=rows):
        causal = losses(one, parts, batch=False)
    whole = losses(one, parts, batch=True)
    dense = trained("dense", seed, budget.name)
    ratio = flops(build(size, arm, 0, *equal_size(arm, size)), size.length) / flops(dense.model, size.length)
    last = one.curve[-max(1, size.steps // 10) :].mean(0)
    named = one.model.named_parameters()
    found = {
        "text_loss": float(causal[0]),
        "image_loss": float(causal[1]),
        "gap": float((causal - whole).max()),
        "text_gap": float(causal[0] - whole[0]),
        "image_gap": float(causal[1] - whole[1]),
        "text_loss_by_batch": float(whole[0]),
        "image_loss_by_batch": float(whole[1]),
        "text_loss_training": float(last[0]),
        "image_loss_training": float(last[1]),
        "flops_ratio": ratio,
        "flops_ratio_inference": flops(one.model, size.length, rows.per_token()) / flops(dense.model, size.length),
        "parameters": float(sum(p.numel() for key, p in named if not (one.edits and "auxiliary" in key))),
    }
    for place, part in enumerate(NAMES):
        found[f"{part}_eta_training"] = speed_up(one.curve[:, place], dense.curve[:, place], ratio)
    found["eta_training"] = speed_up(one.curve.mean(1), dense.curve.mean(1), ratio)
    if arm in ("dense", "token_choice"):
        return found
    return {**found, **agreement(one, parts), **noise(one, parts, arm.startswith("mod_"), seed)}


STUDY = Study(
    paper="moma",
    title="Experts for each modality, and what remains when choices are causal",
    setting=(
        "Half prose, byte by byte, half images of 64 pixels in 17 levels, 160 tokens a row. Models of 4 layers and "
        "width 128 with norms after their branches, 270 steps of 1280 tokens; depth routing has 6 layers, every second "
        "for a quarter of the tokens. Equal operations a token, computed; then 80 steps for auxiliary routers. Losses "
        "are held out, in nats a token and causal, where their name does not say otherwise: choices by auxiliary "
        "routers. With one expert taken the norm behind it cancels its score, in token_choice everywhere. The paper "
        "trains 435 million to 1.4 billion active parameters on 1 trillion tokens."
    ),
    claims=(
        Claim(
            key="untied_image",
            text="One expert for each modality lowers the image loss at equal operations.",
            where="the comparison of causal inference with auxiliary routers",
            claimed="perplexity on Obelics 41.5 against 44.6 dense (overall, text and images)",
            metric="image_loss",
            judge=Beats(method="moma_1t1i", control="dense", by=0.02),
            tells="{moma_1t1i} against {dense}; text {moma_1t1i.text_loss} and {dense.text_loss}.",
        ),
        Claim(
            key="groups_image",
            text="Two experts for each modality lower the image loss at equal operations.",
            where="abstract",
            claimed="4t4i reaches the dense image loss with 5.2 times fewer operations",
            metric="image_loss",
            judge=Beats(method="moma_2t2i", control="dense", by=0.02),
            tells=(
                "{moma_2t2i} against {dense}, by the batch's own choices {moma_2t2i.image_loss_by_batch}, not causal; "
                "1t1i {moma_1t1i}; chosen by tokens {token_choice}."
            ),
        ),
        Claim(
            key="better_than_mixed",
            text="Groups are better for images than as many experts that take any token.",
            where="abstract",
            claimed="5.2 times against 2.8 times fewer operations for images",
            metric="image_loss",
            judge=Beats(method="moma_2t2i", control="mixed"),
            tells=(
                "{moma_2t2i} against {mixed}; by the batch's own choices, not causal, "
                "{moma_2t2i.image_loss_by_batch} and {mixed.image_loss_by_batch}."
            ),
        ),
        Claim(
            key="causal_gap",
            text="Auxiliary routers lose little: causal choices cost at most 0.03 nats in either modality.",
            where="the comparison of causal inference with auxiliary routers",
            claimed="4t4i still best in perplexity, 39.0 against 44.6 dense, with auxiliary routers",
            metric="gap",
            judge=Within(arm="moma_2t2i", high=0.03),
            tells=(
                "text {moma_2t2i.text_gap}, images {moma_2t2i.image_gap}; mixed {mixed}, depth routing {mod_2t2i}, "
                "1t1i without a choice {moma_1t1i}."
            ),
        ),
        Claim(
            key="auxiliary_learns",
            text="Auxiliary routers tell the choices better than always giving the commoner answer, by a hundredth.",
            where="the training of auxiliary routers",
            claimed="no number in the paper",
            metric="auxiliary_gain",
            judge=Within(arm="moma_2t2i", low=0.01),
            tells=(
                "accuracy {moma_2t2i.auxiliary_accuracy}, F1 {moma_2t2i.auxiliary_f1}; with depth routing "
                "{mod_2t2i.auxiliary_accuracy} and {mod_2t2i.auxiliary_f1}."
            ),
        ),
        Claim(
            key="depth_loses",
            text="With depth routing the causal image loss is higher than without.",
            where="abstract; the comparison of causal inference with auxiliary routers",
            claimed="perplexity of images given text, on COCO, 428.1 with depth routing against 392.5",
            metric="image_loss",
            judge=Beats(method="moma_2t2i", control="mod_2t2i"),
            tells="{moma_2t2i} against {mod_2t2i}; gaps {moma_2t2i.image_gap} and {mod_2t2i.image_gap}.",
        ),
        Claim(
            key="depth_is_fragile",
            text="A wrong choice costs depth routing more than a wrong choice of an expert.",
            where="the test with wrong choices, 635M",
            claimed="depth routing stops paying when more than 0.5 % of its choices are wrong",
            metric="rise_per_wrong_choice",
            judge=Beats(method="mod_2t2i", control="moma_2t2i", better="higher"),
            tells=(
                "{mod_2t2i} against {moma_2t2i} nats a choice; at 0.5 % wrong the loss rises by "
                "{mod_2t2i.rise_at_5_of_1000} and {moma_2t2i.rise_at_5_of_1000}, at 5 % by "
                "{mod_2t2i.rise_at_50_of_1000} and {moma_2t2i.rise_at_50_of_1000}."
            ),
        ),
    ),
    arms=(
        Arm(name="moma_2t2i", text="2 text and 2 image experts, experts choose"),
        Arm(name="moma_1t1i", text="1 text and 1 image expert: untied, nothing to choose"),
        Arm(name="mod_2t2i", text="depth routing in every second layer, then 2 text and 2 image experts"),
        Arm(name="dense", text="one feed-forward", role="control"),
        Arm(name="mixed", text="4 experts that choose among all tokens", role="control"),
        Arm(name="token_choice", text="2 text and 2 image experts, each token takes its best one", role="control"),
    ),
    run=run,
    methods=("train.moma", "train.mixture_of_depths", "train.balance_loss"),
    units={
        "image_loss": "nats an image token, causal",
        "gap": "nats a token of the modality that loses more, causal above chosen by batch",
        "auxiliary_gain": "accuracy above the commoner answer",
        "rise_per_wrong_choice": "nats a wrong choice, choices by batch (not causal)",
    },
)
