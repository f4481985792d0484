"""BAM: are specialists joined with their attentions better than joined without, at equal tokens and at equal compute?

A byte-level model with parallel blocks learns general text; three copies go on, each in a domain. Seed and specialists
are joined in several ways and all joins train on for the same tokens of an even mix, or for the same operations.
"""

import copy
import functools
import hashlib
import re
import sysconfig
import unicodedata
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from moestro import surgery
from moestro.core.config import Config
from moestro.core.context import open_stack
from moestro.methods.planning import make_plan
from moestro.studies._framework import BUDGETS, Arm, Beats, Budget, Claim, NotWorse, Study
from moestro.training.objectives import Causal
from moestro.training.optimizer import make_optimizer, set_lr
from moestro.training.recipe import OptimizerConfig
from moestro.training.schedule import ScheduleConfig
from moestro.training.size import size_of
from moestro.training.step import Stepper


DOMAINS = ("general", "code", "characters", "sums")
GENERAL = 0.1  # share of general text while a copy specialises
HELDOUT_OF = 8
FILES = 80  # source files of the standard library, by name
LOSSES = {"balance": 1e-2, "z": 1e-3}
BAM: dict[str, object] = {"attention": "experts"}
JOINS: dict[str, dict[str, object]] = {
    "bam": BAM,
    "bam_compute": BAM,
    "bam_shared": {**BAM, "kv": "shared"},
    "bam_top1": {**BAM, "attn_top_k": 1},
    "bam_top1_tokens": {**BAM, "attn_top_k": 1},
    "btx": {"attention": "mean"},
    "btx_matched": {"attention": "mean", "extra_experts": 2, "ffn_top_k": 3},
}


class Scale(Config):
    """Size of the model and of a run: steps of the seed, of a specialist, and of a join.

    The inner width is twice the model's, as in the paper: only then are three attentions more of as many weights as two
    feed-forwards more (all in all) and as two more that run (of a token).
    """

    layers: int = 3
    dim: int = 64
    inner: int = 128
    heads: int = 4
    length: int = 128
    batch: int = 8
    seed_steps: int = 250
    branch_steps: int = 150
    mix_steps: int = 120
    lr: float = 3e-3
    heldout: int = 32


def scale(budget: Budget) -> Scale:
    """The sizes of a budget."""
    small = {"layers": 1, "dim": 16, "inner": 32, "heads": 2, "length": 32, "batch": 4, "heldout": 4}
    return budget.pick(
        ci=Scale(**small, seed_steps=4, branch_steps=3, mix_steps=3),
        micro=Scale(layers=2, dim=32, inner=64, length=64, seed_steps=60, branch_steps=40, mix_steps=30, heldout=16),
        full=Scale(),
    )


def documents(domain: str) -> list[tuple[str, str]]:
    """Key and text of each document of a domain; the key decides on which side of the split it stands."""
    if domain == "general":
        from pydoc_data.topics import topics

        return sorted(topics.items())
    if domain == "code":
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:FILES]
        return [(path.name, bare(path.read_text("utf-8"))) for path in files]
    if domain == "characters":
        named = [(f"{code:04x}", unicodedata.name(chr(code), "")) for code in range(0x20, 0x2000)]
        return [(key, f"{key} {name.lower()}\n") for key, name in named if name]
    assert domain == "sums"
    return [(f"{a}+{b}", f"{a}+{b}={a + b}\n") for a in range(10, 1000, 9) for b in range(11, 1000, 11)]


def bare(source: str) -> str:
    """Code without comments, blocks of documentation and empty lines."""
    source = re.sub(r'(?s)""".*?"""|\'\'\'.*?\'\'\'', "", source)
    lines = (re.sub(r"(^|\s)#.*", "", line).rstrip() for line in source.splitlines())
    return "\n".join(line for line in lines if line) + "\n"


@functools.cache
def text(domain: str) -> tuple[np.ndarray, np.ndarray]:
    """Bytes to train on and held-out bytes of a domain, uint8; whole documents stand on one side, shuffled alike."""
    sides: tuple[list[str], list[str]] = ([], [])
    for key, body in sorted(documents(domain), key=lambda found: hashlib.sha256(found[0].encode()).digest()):
        sides[int(hashlib.sha256(key.encode()).hexdigest(), 16) % HELDOUT_OF == 0].append(body)
    train, heldout = (np.frombuffer("".join(side).encode(), np.uint8) for side in sides)
    return train, heldout


def batch(rng: np.random.Generator, shares: Mapping[str, float], size: Scale) -> dict[str, Tensor]:
    """Rows of random pieces of the domains' training bytes."""
    rows = []
    for domain in rng.choice(list(shares), size=size.batch, p=list(shares.values())):
        data = text(domain)[0]
        at = int(rng.integers(len(data) - size.length))
        rows.append(data[at : at + size.length])
    ids_BS = torch.from_numpy(np.stack(rows).astype(np.int64))
    return {"input_ids": ids_BS, "labels": ids_BS.clone()}


def train(
    model: nn.Module,
    shares: Mapping[str, float],
    size: Scale,
    seed: int,
    steps: int,
    lr: float,
    *,
    joined: bool = False,
) -> None:
    """Train in place with AdamW and a cosine schedule."""
    optimizer = make_optimizer(model, OptimizerConfig(lr=lr, weight_decay=0.1))
    stepper, rng = Stepper(model, Causal(), optimizer), np.random.default_rng(seed)
    schedule = ScheduleConfig(kind="cosine", warmup=max(1, steps // 10))
    model.train()
    for step in range(steps):
        set_lr(optimizer, schedule.factor(step, steps))
        stepper.run(step, [batch(rng, shares, size)], weights={"causal": 1.0, **(LOSSES if joined else {})})


@torch.no_grad()
def heldout(model: nn.Module, size: Scale) -> dict[str, float]:
    """Held-out loss of each domain in nats a byte, and their mean."""
    model.eval()
    found: dict[str, float] = {}
    for domain in DOMAINS:
        data = text(domain)[1]
        places = np.linspace(0, len(data) - size.length, size.heldout).astype(int)
        ids_BS = torch.from_numpy(np.stack([data[at : at + size.length] for at in places]).astype(np.int64))
        logits = model(input_ids=ids_BS, use_cache=False).logits[:, :-1]
        found[domain] = float(nn.functional.cross_entropy(logits.flatten(0, 1), ids_BS[:, 1:].flatten()))
    return {"loss": float(np.mean(list(found.values()))), **{f"loss_{name}": value for name, value in found.items()}}


def dense(size: Scale, seed: int) -> nn.Module:
    """A model whose blocks run attention and feed-forward side by side, with random weights."""
    from transformers import CohereConfig, CohereForCausalLM

    torch.manual_seed(seed)
    config = CohereConfig(
        vocab_size=256, hidden_size=size.dim, intermediate_size=size.inner, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, num_key_value_heads=size.heads, max_position_embeddings=size.length,
        logit_scale=1.0, pad_token_id=0, bos_token_id=1, eos_token_id=2, use_cache=False,
    )  # fmt: skip
    model = CohereForCausalLM(config)
    open_stack(model.model, "model")
    return model


@functools.cache
def branches(seed: int, name: str) -> tuple[nn.Module, ...]:
    """The seed model and its specialists in the order of the domains; made once a process."""
    size = scale(BUDGETS[name])
    first = dense(size, seed)
    train(first, {"general": 1.0}, size, seed, size.seed_steps, size.lr)
    found = [first]
    for place, domain in enumerate(DOMAINS[1:], 1):
        branch = dense(size, seed)
        branch.load_state_dict(first.state_dict())
        shares = {domain: 1 - GENERAL, "general": GENERAL}
        train(branch, shares, size, 100 * seed + place, size.branch_steps, size.lr / 2)
        found.append(branch)
    return tuple(found)


def joined(arm: str, seed: int, budget: Budget) -> nn.Module:
    """The models of a seed joined as an arm says."""
    size = scale(budget)
    models = []
    for branch in branches(seed, budget.name):
        model = dense(size, seed)
        model.load_state_dict(branch.state_dict())
        models.append(model)
    donors = {f"donor{place}": model for place, model in enumerate(models[1:], 1)}
    plan = make_plan("convert.bam", models[0], JOINS[arm], donors=donors, seed=seed)
    surgery.apply(models[0], plan, donors=donors)
    return models[0]


def operations(model: nn.Module, size: Scale, *, one: bool = False) -> float:
    """Operations of a token's forward. ``one``: if queries, scores and outputs of one attention expert ran alone."""
    total = float(size_of(model, size.length).forward_flops)
    if not one:
        return total
    count = len(DOMAINS)
    all_of_them = count * (2 * 2 * size.dim**2 + 4 * size.dim * (size.length + 1) / 2)
    return total - size.layers * all_of_them * (count - 1) / count


def steps_of(arm: str, seed: int, budget: Budget, model: nn.Module) -> int:
    """Steps of a join: those of the study, or as many as cost what the arm it is compared with costs."""
    size = scale(budget)
    if arm == "bam_compute":
        other = operations(joined("btx", seed, budget), size)
        return max(1, round(size.mix_steps * other / operations(model, size)))
    if arm == "bam_top1":
        return round(size.mix_steps * operations(model, size) / operations(model, size, one=True))
    return size.mix_steps


def run(arm: str, seed: int, budget: Budget) -> Mapping[str, float]:
    """Join, train on, and measure held-out losses before and after."""
    size, even = scale(budget), dict.fromkeys(DOMAINS, 1 / len(DOMAINS))
    if arm == "dense":
        model = copy.deepcopy(branches(seed, budget.name)[0])
        steps = size.mix_steps
    else:
        model = joined(arm, seed, budget)
        steps = steps_of(arm, seed, budget, model)
    start = heldout(model, size)["loss"]
    train(model, even, size, 1000 + seed, steps, size.lr / 2, joined=arm != "dense")
    cost = operations(model, size, one=arm.startswith("bam_top1")) * steps
    return {
        **heldout(model, size),
        "start": start,
        "steps": steps,
        "gigaflops": cost * 3 * size.batch * size.length / 1e9,
    }


STUDY = Study(
    paper="bam",
    title="Specialists joined with their attentions",
    setting=(
        "A byte-level model with parallel blocks (3 layers, width 64, inner width 128, 4 heads) learns Python's "
        "reference manual for 250 steps of 1024 bytes; three copies go on for 150 steps each in code, names of "
        "characters, and sums, with a tenth of the manual. The four are joined and train on for 120 steps of an "
        "even mix. Losses are means over the four domains' held-out bytes. The paper trains specialists of 590 "
        "million parameters on 100 billion tokens each; here a specialist sees 0.15 million bytes. Operations of "
        "top-1 attention are counted as if only the chosen expert's queries, scores and outputs ran; its gate is "
        "that of the softmax over all four."
    ),
    claims=(
        Claim(
            key="equal_tokens",
            text="Attention experts beside feed-forward experts are better than averaged attentions at equal tokens.",
            where="2408.08274, table 2 (590M, data-matched)",
            claimed="average perplexity 9.70 against 10.72",
            metric="loss",
            judge=Beats(method="bam", control="btx", by=0.01),
            tells=(
                "before training on, the join with attention experts stands at {bam.start}, that with averaged "
                "attentions at {btx.start}; afterwards at {bam} and {btx}, the seed alone on the same mix at {dense}."
            ),
        ),
        Claim(
            key="equal_compute",
            text="They are not worse at equal compute.",
            where="2408.08274, table 2 (590M, compute-matched)",
            claimed="average perplexity 10.00 against 10.72",
            metric="loss",
            judge=NotWorse(method="bam_compute", control="btx", tolerance=0.0),
            tells=(
                "equal operations leave {bam_compute.steps} of {btx.steps} steps: {bam_compute} against {btx}; with "
                "all steps it reaches {bam}."
            ),
        ),
        Claim(
            key="shared_keys",
            text="With keys and values averaged, hence one cache, it is still better than averaged attentions.",
            where="2408.08274, table 2 (590M, shared KV)",
            claimed="average perplexity 10.32 against 10.72",
            metric="loss",
            judge=Beats(method="bam_shared", control="btx"),
            tells=(
                "with one cache it starts at {bam_shared.start} and ends at {bam_shared}; averaged attentions start at "
                "{btx.start} and end at {btx}, and experts with caches of their own end at {bam}."
            ),
        ),
        Claim(
            key="equal_size",
            text="More feed-forward experts do not make up for it: 6 with 3 used, averaged attentions, are worse.",
            where="2408.08274, table 4 (parameter-matched)",
            claimed="perplexity 6.04 against 6.23 (law), 24.06 against 24.13 (general)",
            metric="loss",
            judge=Beats(method="bam", control="btx_matched"),
            tells=(
                "Both have as many weights in all and as many that run, routers apart; attention experts compute "
                "four times the scores besides. 6 experts with 3 used start at {btx_matched.start}, 4 with one "
                "used at {btx.start}: a gate of the whole softmax scales one choice of 4 down to about a quarter, "
                "three of 6 to a half. They end at {btx_matched} and {btx}, attention experts at {bam}."
            ),
        ),
        Claim(
            key="soft_gates",
            text="Hearing all attention experts is better than hearing the best one, at equal compute.",
            where="2408.08274, table 5 (routing of attention)",
            claimed="average perplexity 10.47 against 10.81",
            metric="loss",
            judge=Beats(method="bam", control="bam_top1"),
            tells=(
                "top-1 attention had {bam_top1.steps} steps for the operations of {bam.steps} soft ones; it starts at "
                "{bam_top1.start} and ends at {bam_top1}, with {bam_top1_tokens.steps} steps at {bam_top1_tokens}; "
                "soft gates start at {bam.start} and end at {bam}."
            ),
        ),
    ),
    arms=(
        Arm(name="bam", text="attention and feed-forward experts, keys and values of each"),
        Arm(name="bam_compute", text="the same, for the operations of averaged attentions"),
        Arm(name="bam_shared", text="attention experts with averaged keys and values"),
        Arm(name="bam_top1", text="only the best attention expert, for the operations of soft gates", role="control"),
        Arm(name="bam_top1_tokens", text="the same, for the tokens of soft gates", role="reference"),
        Arm(name="btx", text="feed-forward experts, averaged attentions", role="control"),
        Arm(name="btx_matched", text="averaged attentions, 6 experts of which 3 are used", role="control"),
        Arm(name="dense", text="the seed model trained on the same mix", role="reference"),
    ),
    run=run,
    methods=("convert.bam", "train.mixture_of_attention", "train.softmax_topk", "train.balance_loss", "train.z_loss"),
    units={
        "loss": "nats a byte, mean of four domains",
        **{f"loss_{domain}": "nats a byte" for domain in DOMAINS},
        "start": "nats a byte before training on",
        "steps": "optimiser steps after joining",
        "gigaflops": "billions of operations after joining",
    },
)
