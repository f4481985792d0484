"""Robust QA: do experts in or on an encoder help it answer in domains of which it saw few examples, and does easy data
augmentation?

A pretrained encoder learns cloze questions (``_cloze.py``) of three domains with many examples and three with few, then
of the three alone with its experts frozen. Every arm takes the same steps over the same questions. The mixture before
the head is held against one feed-forward of its active width, each with and without augmented copies of the few; with
them, against one of all its experts' width and two dense encoders that answer together as well.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moestro.core.errors import ConfigError
from moestro.core.registry import method
from moestro.core.session import session
from moestro.data.augment import Eda, Neighbours, eda
from moestro.data.dataset import span_example
from moestro.data.spans import Question, Window, windows
from moestro.models.swap import swap
from moestro.studies._cloze import DOMAINS, SOURCE, TARGET, Together, halves, open_encoder, split, word_tokenizer
from moestro.studies._domains import FirstExperts, normalised_information
from moestro.studies._framework import Arm, Beats, Budget, Claim, Study, Within
from moestro.training.objectives import Batch, Span
from moestro.training.optimizer import make_optimizer, set_lr
from moestro.training.phases import freeze
from moestro.training.recipe import OptimizerConfig, PhaseConfig
from moestro.training.schedule import ScheduleConfig
from moestro.training.spans import predict, scores
from moestro.training.step import Stepper


AUX = {"balance": 0.01}
UNTRAINED = "moe_untrained"  # an arm
NEW = ["qa_outputs.*", "*.top.*"]  # parameters that start anew learn faster
SECOND = PhaseConfig(name="target", freeze=["*.bank.*"])


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Size of a run.

    Attributes:
        encoder: the pretrained one, or a tiny random one. frozen: its lower layers that stand still.
        experts, size: of a mixture, and inner width of an expert of the head. length, batch: tokens a window, rows.
        source, target, test: questions of a domain. copies: augmented ones of each target question, while all domains
            are learned and afterwards. first, second: steps of the two phases. limit: paragraphs read of a domain.
    """

    pretrained: bool = True
    frozen: int = 3
    experts: int = 4
    size: int = 768
    length: int = 88
    batch: int = 16
    source: int = 200
    target: int = 60
    test: int = 70
    copies: tuple[int, int] = (4, 8)
    first: int = 44
    second: int = 16
    lr: float = 3e-4
    limit: int | None = None


def scale(budget: Budget) -> Scale:
    """The run of a budget."""
    small = Scale(
        pretrained=False, frozen=1, experts=2, size=32, batch=8, source=8, target=4, test=4, copies=(2, 2), first=2,
        second=1, limit=16, lr=2e-3,
    )  # fmt: skip
    middle = Scale(
        pretrained=False, frozen=1, experts=2, size=64, source=50, target=15, test=15, copies=(2, 4), first=16,
        second=4, limit=120, lr=2e-3,
    )  # fmt: skip
    return budget.pick(ci=small, micro=middle, full=Scale())


@dataclass(frozen=True)
class Encoder:
    """A model with a fresh span head, and its tokenizer."""

    model: Any
    tokenizer: Any


@functools.lru_cache(maxsize=1)
def encoder(seed: int, size: Scale) -> Encoder:
    """The pretrained encoder, or two random layers of width 64 with the words of the questions.

    Raises:
        LoadError: the package that carries the pretrained one is not installed.
    """
    from moestro.training.build import make_model

    torch.manual_seed(seed)
    if size.pretrained:
        return Encoder(*open_encoder())
    tokenizer = word_tokenizer([text for one in every_question(seed, size) for text in (one.question, one.context)])
    values = {
        "model_type": "bert", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": size.length,
    }  # fmt: skip
    return Encoder(make_model(values, "span", len(tokenizer)), tokenizer)


def build(arm: str, size: Scale, seed: int, member: int = 0) -> Any:
    """The upper half with what the arm puts there; a later ``member`` of several has a span head of its own."""
    _, model = halves(encoder(seed, size).model, size.frozen)
    torch.manual_seed(1000 * member + seed)
    if member:
        nn.init.normal_(model.qa_outputs.weight, std=model.config.initializer_range)
    last = len(model.bert.encoder.layer) - 1
    head = {"placement": "head", "num_experts": size.experts, "expert_size": size.size}
    if arm.startswith("moe"):
        swap(model, "train.switch_encoder", head, kind="block", layers=[last])
    if arm.startswith(("dense_ffn", "dense_wide")):
        mixture: Any = method("train.switch_encoder").configure(head)
        inner = size.size * (size.experts if arm.startswith("dense_wide") else mixture.top_k)
        dense = {**head, "num_experts": 1, "expert_size": inner, "capacity_factor": None, "eval_capacity_factor": None}
        swap(model, "train.switch_encoder", dense, kind="block", layers=[last])
    if arm.startswith("switch"):
        config = {"placement": "replace", "num_experts": size.experts}
        swap(model, "train.switch_encoder", config, kind="block", layers=list(range(min(2, last + 1))))
    return model


# -- questions ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """Windows of one seed with the questions they are of. first, second: pools of the phases. test: by domain."""

    questions: tuple[Question, ...]
    first: tuple[Window, ...]
    second: tuple[Window, ...]
    lost: int
    unchanged: int


def parts(domain: str, seed: int, size: Scale) -> Any:
    """The domain's split."""
    return split(domain, seed, size.source if domain in SOURCE else size.target, size.test, size.limit)


def every_question(seed: int, size: Scale) -> list[Question]:
    """What may be learned from, before augmentation."""
    return [one for domain in DOMAINS for one in parts(domain, seed, size).train]


@functools.lru_cache(maxsize=2)
def data_of(seed: int, size: Scale, augmented: bool) -> Data:
    """The two pools, with augmented copies or without."""
    found = encoder(seed, size)
    target = [one for domain in TARGET for one in parts(domain, seed, size).train]
    pools = [every_question(seed, size), list(target)]
    lost = unchanged = 0
    if augmented:
        table = found.model.get_input_embeddings().weight
        synonyms = Neighbours(found.tokenizer, table, threshold=0.5 if size.pretrained else -1.0)
        for number, copies in enumerate(size.copies):
            rng = np.random.default_rng([seed, 77, number])
            more = eda(target, Eda(sr=0.3, copies=copies), synonyms, rng)
            pools[number] += more.questions
            lost, unchanged = lost + more.lost, unchanged + more.unchanged
    cut = [tuple(windows(found.tokenizer, questions, size.length, size.length // 4)[0]) for questions in pools]
    return Data(tuple(pools[0] + pools[1]), cut[0], cut[1], lost, unchanged)


@functools.lru_cache(maxsize=1)
def lower_half(seed: int, size: Scale) -> tuple[Any, dict[bytes, Tensor]]:
    """The frozen layers and what they made of windows so far."""
    return halves(encoder(seed, size).model, size.frozen)[0], {}


def collate(group: Sequence[Window], seed: int, size: Scale) -> Batch:
    """A batch for the upper half; windows that the frozen layers have not seen run through them once."""
    stack, kept = lower_half(seed, size)
    objective = Span(encoder(seed, size).tokenizer)
    batch = objective.collate([span_example(window) for window in group], [])
    keys = [window.input_ids.tobytes() for window in group]
    new = [row for row, key in enumerate(keys) if key not in kept]
    if new:
        part = {name: batch[name][new] for name in ("input_ids", "attention_mask", "token_type_ids")}
        with torch.no_grad():
            hidden = stack(**part).last_hidden_state
        for row, hidden_SD in zip(new, hidden, strict=True):
            kept[keys[row]] = hidden_SD[: len(group[row].input_ids)].clone()
    rows = [nn.functional.pad(kept[key], (0, 0, 0, batch["input_ids"].shape[1] - len(kept[key]))) for key in keys]
    masks = {name: batch[name] for name in ("attention_mask", "start_positions", "end_positions")}
    return {"inputs_embeds": torch.stack(rows), **masks}


# -- training and measuring --------------------------------------------------------------------------------------


def fit(model: Any, data: Data, size: Scale, seed: int, member: int = 0) -> None:
    """Both phases in place; experts stand still in the second. A later ``member`` has an order of its own."""
    optimizer = make_optimizer(
        model,
        OptimizerConfig.parse({"lr": size.lr, "weight_decay": 0.01, "groups": [{"match": NEW, "lr": 3 * size.lr}]}),
    )
    stepper = Stepper(model, Span(encoder(seed, size).tokenizer), optimizer)
    total = size.first + size.second
    schedule = ScheduleConfig(kind="cosine", warmup=max(1, total // 10))
    has_experts = any(".bank." in name for name, _ in model.named_parameters())
    routed = any(module.router.num_experts > 1 for module in model.modules() if hasattr(module, "router"))
    torch.manual_seed(1000 * member + seed)
    model.train()
    step = 0
    for pool, steps in ((data.first, size.first), (data.second, size.second)):
        if step and has_experts:
            freeze(model, SECOND)
        order = np.random.default_rng([seed, step, member]).permutation(len(pool))
        for place in range(steps):
            group = [pool[order[(place * size.batch + row) % len(order)]] for row in range(size.batch)]
            set_lr(optimizer, schedule.factor(step, total))
            weights = {"span": 1.0, **(AUX if routed else {"balance": 0.0} if has_experts else {})}
            stepper.run(step, [collate(group, seed, size)], weights=weights)
            step += 1


def measure(model: Any, seed: int, size: Scale) -> dict[str, float]:
    """F1 and exact match of each domain's test questions, in percent, and how experts and domains hang together."""
    found: dict[str, dict[str, float]] = {}
    experts = FirstExperts(len(DOMAINS))
    for number, domain in enumerate(DOMAINS):
        questions = parts(domain, seed, size).test
        cut, _ = windows(encoder(seed, size).tokenizer, questions, size.length, size.length // 4)
        groups = [cut[at : at + size.batch] for at in range(0, len(cut), size.batch)]
        experts.domain = number
        with session(recorder=experts):
            answers = predict(model, [(group, collate(group, seed, size)) for group in groups], questions)
        found[domain] = scores(answers, questions)
    means = {
        f"{name}_{score}": 100 * float(np.mean([found[domain][score] for domain in domains]))
        for name, domains in (("target", TARGET), ("source", SOURCE))
        for score in ("f1", "em")
    }
    each = {f"f1_{domain}": 100 * found[domain]["f1"] for domain in DOMAINS}
    shared = [normalised_information(count.numpy()) for count in experts.counts.values()]
    return {**means, **each, **({"expert_domain_nmi": float(np.mean(shared))} if shared else {})}


def trained(arm: str, data: Data, size: Scale, seed: int, member: int = 0) -> Any:
    """A model after both phases."""
    model = build(arm, size, seed, member)
    fit(model, data, size, seed, member)
    return model


@functools.lru_cache(maxsize=1)
def plain(size: Scale, seed: int) -> Any:
    """The dense encoder with augmentation, which two arms ask for."""
    return trained("dense_eda", data_of(seed, size, True), size, seed)


def run(arm: str, seed: int, budget: Budget) -> Mapping[str, float]:
    """Train one arm in two phases, unless it is there untrained, and measure it."""
    size = scale(budget)
    data = data_of(seed, size, arm.endswith("_eda"))
    if not data.second:
        raise ConfigError(f"no question of {', '.join(TARGET)} fits {size.length} tokens")
    if arm == UNTRAINED:
        model = build(arm, size, seed)
    elif arm == "dense_eda":
        model = plain(size, seed)
    elif arm == "dense_two_eda":
        model = Together([plain(size, seed), trained(arm, data, size, seed, member=1)])
    else:
        model = trained(arm, data, size, seed)
    return {
        **measure(model, seed, size),
        "lost": float(data.lost),
        "unchanged": float(data.unchanged),
    }


CELLS = (
    "target F1 of dense + FFN, mixture: {dense_ffn}, {moe}; the same with augmentation: {dense_ffn_eda}, {moe_eda}. "
    "Without a head: {dense}, {dense_eda}. With augmentation, as wide as all experts: {dense_wide_eda}; two encoders "
    "without a head together: {dense_two_eda}."
)

STUDY = Study(
    paper="robust-qa",
    title="Experts and augmentation in domains with few examples",
    setting=(
        "All-MiniLM-L6-v2 with its lower 3 of 6 layers frozen learns cloze questions of at most 88 tokens: 200 of each "
        "of 3 source domains and 60 of each of 3 target domains for 44 steps of 16, then the target domains alone for "
        "16 steps with experts frozen. Tested on 70 questions of each domain after the last step; no checkpoint is "
        "chosen. 4 experts of 768 inner units. Synonyms are neighbours in the encoder's own table of word embeddings. "
        "The paper has DistilBERT, 16 experts, three large question sets and WordNet. Target texts are those of the "
        "installed packages; small budgets have a tiny random encoder."
    ),
    claims=(
        Claim(
            key="experts",
            text="A mixture before the head helps in the target domains.",
            where="abstract (gain of architecture and augmentation together)",
            claimed="+9.52 % F1 relative, experts not told apart",
            metric="target_f1",
            judge=Beats(method="moe", control="dense_ffn", better="higher"),
            tells=CELLS,
        ),
        Claim(
            key="experts_augmented",
            text="It helps when the target examples are augmented.",
            where="abstract",
            claimed="+9.52 % F1 relative, experts not told apart",
            metric="target_f1",
            judge=Beats(method="moe_eda", control="dense_ffn_eda", better="higher"),
            tells=CELLS,
        ),
        Claim(
            key="whole_recipe",
            text="Mixture and augmentation together gain what the paper gains over the plain encoder.",
            where="abstract: 53.477 F1 out of domain",
            claimed="+9.52 % F1 relative",
            metric="target_f1",
            judge=Beats(method="moe_eda", control="dense", better="higher", by=0.0952, relative=True),
            tells=CELLS,
        ),
        Claim(
            key="more_than_augmentation",
            text="Experts alone gain more than augmentation alone.",
            where="the refuting control; augmentation alone reaches the same test F1 in another project of the course",
            claimed="not compared",
            metric="target_f1",
            judge=Beats(method="moe", control="dense_ffn_eda", better="higher"),
            tells=CELLS,
        ),
        Claim(
            key="switch_layers",
            text="Switch layers in the middle of the encoder help.",
            where="abstract (where they stand)",
            claimed="the best architecture, not told apart from augmentation",
            metric="target_f1",
            judge=Beats(method="switch", control="dense", better="higher"),
            tells=(
                "target F1 of dense and of switch layers: {dense}, {switch}; with augmentation {dense_eda}, "
                "{switch_eda}. In the source domains {dense.source_f1} and {switch.source_f1}."
            ),
        ),
        Claim(
            key="domains",
            text="Experts belong to domains.",
            where="abstract (why a mixture should be robust)",
            claimed="not measured",
            metric="expert_domain_nmi",
            judge=Within(arm="moe_eda", low=0.1),
            tells=(
                "normalised mutual information of a token's first expert and its domain: {moe_eda} in the augmented "
                "mixture, {moe} without augmentation, {moe_untrained} before training, {switch} in switch layers; 1 "
                "would be one expert a domain."
            ),
        ),
        Claim(
            key="domains_learned",
            text="Training, not the tokens alone, makes experts belong to domains.",
            where="abstract (why a mixture should be robust)",
            claimed="not measured",
            metric="expert_domain_nmi",
            judge=Beats(method="moe_eda", control=UNTRAINED, better="higher"),
            tells="normalised mutual information of first expert and domain: {moe_eda}; untrained {moe_untrained}",
        ),
    ),
    arms=(
        Arm(name="moe", text="a mixture of 4 experts, 2 active, before the span head"),
        Arm(name="moe_eda", text="the same, target examples augmented"),
        Arm(name="switch", text="4 copies of the feed-forward in layers 3 and 4, one active"),
        Arm(name="switch_eda", text="the same, target examples augmented"),
        Arm(
            name="dense_ffn", text="one feed-forward of the mixture's active width before the span head", role="control"
        ),
        Arm(name="dense_ffn_eda", text="the same, target examples augmented", role="control"),
        Arm(name="dense_wide_eda", text="one as wide as all experts, target examples augmented", role="control"),
        Arm(name="dense", text="the encoder and its span head", role="control"),
        Arm(name="dense_eda", text="the same, target examples augmented", role="control"),
        Arm(name="dense_two_eda", text="two such encoders, trained apart, answer together", role="control"),
        Arm(name=UNTRAINED, text="the mixture before any step", role="control"),
    ),
    run=run,
    methods=("train.switch_encoder", "train.balance_loss"),
    units={
        "target_f1": "% in target domains",
        "target_em": "% in target domains",
        "source_f1": "% in source domains",
        "source_em": "% in source domains",
        "expert_domain_nmi": "0 to 1",
        "lost": "examples",
        "unchanged": "copies",
    },
)
