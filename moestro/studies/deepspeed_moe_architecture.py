"""DeepSpeed-MoE, architecture: does a fixed branch do for the second expert, and do the last layers need the experts?

Small byte-level decoders whose every second feed-forward is a mixture. A residual layer (one routed expert beside a
fixed feed-forward) is held against two routed experts at equal active compute; the pyramid-residual model against a
plain mixture with more than twice its expert parameters. Each half of PR-MoE is also measured alone, the plain mixture
at PR-MoE's own active compute too, and eight-layer models with the experts in their first or second half.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from moestro.core.layer import MoELayer, mixture_layers
from moestro.core.registry import method
from moestro.core.site import Shared, Site
from moestro.studies._framework import (
    Arm,
    Beats,
    Budget,
    Claim,
    Interval,
    Judgement,
    Matches,
    Measured,
    NotWorse,
    Study,
    Verdict,
    interval,
)
from moestro.studies._language import Scale, heldout, llama, loads, text, train


@dataclass(frozen=True)
class Shape:
    """What stands in the mixture layers of an arm: experts by layer, experts a token, how a fixed branch joins."""

    experts: tuple[int, ...]
    top_k: int = 1
    residual: str = "none"


SMALL, LARGE = 4, 16
WIDE = tuple(method("train.pr_moe").module.pyramid(SMALL, 2, wide=1))
SHAPES = {
    "dense": None,
    "moe": Shape((SMALL, SMALL)),
    "moe_large": Shape((LARGE, LARGE)),
    "top2": Shape((SMALL, SMALL), top_k=2),
    "top2_large": Shape((LARGE, LARGE), top_k=2),
    "residual": Shape((SMALL, SMALL), residual="learned"),
    "pyramid": Shape(WIDE),
    "pr_moe": Shape(WIDE, residual="learned"),
    "first_half": Shape((SMALL,) * 4),
    "second_half": Shape((SMALL,) * 4),
    "no_half": None,
}
HALVES = ("first_half", "second_half", "no_half")
AUX = 0.01


@dataclass(frozen=True, kw_only=True)
class EverySeed:
    """`method` is below `control` in every one of at least three seeds; partly: in more seeds than not."""

    method: str
    control: str

    @property
    def arms(self) -> tuple[str, ...]:
        return (self.method, self.control)

    @property
    def rule(self) -> str:
        return f"{self.method} lower than {self.control} in every seed, of 3 at least"

    def __call__(self, measured: Measured, metric: str) -> Judgement:
        ours, control = measured.paired(self.method, self.control, metric)
        effect = control - ours
        wins = int((effect > 0).sum())
        shown = wins == effect.size >= 3
        verdict: Verdict = "shown" if shown else "partly" if 2 * wins > effect.size else "not_shown"
        between: Interval | None = interval(effect)
        note = f"lower in {wins} of {effect.size} seeds"
        return Judgement(verdict=verdict, measured=float(effect.mean()), interval=between, note=note)


def scale(budget: Budget, arm: str) -> Scale:
    """The size of an arm's model and run; eight thin layers for the pair that compares halves."""
    size = budget.pick(
        ci=Scale(layers=4, dim=16, inner=32, heads=2, vocabulary=259, length=32, batch=2, steps=2, heldout=4),
        micro=Scale(layers=4, dim=32, inner=64, heads=2, vocabulary=259, length=64, batch=8, steps=30, heldout=16),
        full=Scale(layers=4, dim=128, inner=256, heads=4, vocabulary=259, length=128, batch=8, steps=260, heldout=128),
    )
    if arm in HALVES:
        half = {"layers": 8, "dim": size.dim // 2, "inner": size.inner // 2}
        return Scale(**{**size.model_dump(), **half})
    return size


def layers_of(arm: str, size: Scale) -> list[int]:
    """Blocks that hold a mixture: one half of the model, or every second block."""
    half = size.layers // 2
    return {"first_half": list(range(half)), "second_half": list(range(half, size.layers))}.get(
        arm, list(range(1, size.layers, 2))
    )


def build(arm: str, size: Scale, seed: int) -> nn.Module:
    """The arm's model with random weights."""
    model: Any = llama(size, seed)
    shape = SHAPES[arm]
    if shape is None:
        return model
    use = method("train.pr_moe")
    # A token's only weight must stay a probability, or the router learns nothing; two are made to sum to 1.
    router = {"method": "train.softmax_topk", "config": {"top_k": shape.top_k, "renormalise": shape.top_k > 1}}
    for number, experts in zip(layers_of(arm, size), shape.experts, strict=True):
        block = model.model.layers[number]
        site = Site(path=f"model.layers.{number}.mlp", kind="mlp", module=block.mlp, dim=size.dim, layer=number)
        config = {"num_experts": experts, "residual": shape.residual, "expert_size": size.inner, "router": router}
        block.mlp = use.build(site, use.configure(config), Shared())
    return model


def expert_parameters(layers: Mapping[str, MoELayer]) -> int:
    """Parameters of all experts and fixed branches."""
    parts = [part for layer in layers.values() for part in (layer.bank, layer.shared) if part is not None]
    return sum(p.numel() for part in parts for p in part.parameters())


def active_flops(layers: Mapping[str, MoELayer]) -> int:
    """Floating point operations a token costs in the mixture layers."""
    total = 0
    for layer in layers.values():
        top_k = layer.router.top_k
        assert top_k is not None
        dense = 0 if layer.shared is None else 1
        total += (top_k + dense) * layer.bank.flops_per_row(0) + 2 * sum(
            p.numel()
            for part in (layer.router, layer.combine)
            if isinstance(part, nn.Module)
            for p in part.parameters()
        )
    return total


def run(arm: str, seed: int, budget: Budget) -> Mapping[str, float]:
    """Train one arm, then measure its held-out loss and count what it holds, computes and would send."""
    size = scale(budget, arm)
    data = text(size.vocabulary, size.length, size.heldout, limit=budget.pick(ci=4, micro=60, full=None))
    model = build(arm, size, seed)
    layers = mixture_layers(model)
    train(model, data.train, size, seed, losses={"balance": AUX} if layers else {})
    found = {"heldout_loss": heldout(model, data.heldout, size)}
    if layers:
        tokens = min(size.heldout, len(data.heldout.sources["data"])) * size.length
        sent = sum(int(load.sum()) for load in loads(model, data.heldout, size).values())
        found |= {
            "expert_parameters": expert_parameters(layers),
            "active_flops": active_flops(layers),
            "dispatch_bytes": sent * size.dim * 4 / tokens,
        }
    return found


TELLS_RESIDUAL = (
    "one routed expert beside a fixed branch {residual}, two routed experts {top2}, one routed expert alone {moe}, no "
    "mixture {dense}: what the second place of either kind adds to one expert."
)
TELLS_PYRAMID = (
    "pyramid and residual {pr_moe}, pyramid alone {pyramid}, residual alone {residual}, one of 4 experts {moe}, one of "
    "16 {moe_large}, two of 16 {top2_large}, no mixture {dense}; active operations {pr_moe.active_flops}, "
    "{moe_large.active_flops} and {top2_large.active_flops} of the first, fifth and sixth."
)

STUDY = Study(
    paper="deepspeed-moe",
    part="architecture",
    title="Pyramid and residual mixtures",
    setting=(
        "Byte-level Llama models (4 layers, width 128, a mixture in every second one) on the standard library's source "
        "files, 260 steps of 1024 tokens, nothing dropped; experts start as copies in every arm. The paper trains 350M "
        "and 1.3B models with 32 to 128 experts on 300B tokens. Halves are compared in models of 8 layers and half the "
        "width. That training is 10 % faster is not a claim here: on one machine nothing is sent, so the bytes that "
        "would be are counted."
    ),
    claims=(
        Claim(
            key="residual_is_top2",
            text="One routed expert beside a fixed branch is as good as two routed experts.",
            where="section 4, phenomenon II",
            claimed="the same validation loss",
            metric="heldout_loss",
            judge=Matches(method="residual", other="top2", tolerance=0.03),
            tells=TELLS_RESIDUAL,
        ),
        Claim(
            key="residual_is_enough",
            text="It is not worse than two routed experts, whether or not it is better.",
            where="section 4, phenomenon II",
            claimed="the benefit of two experts at the communication of one",
            metric="heldout_loss",
            judge=NotWorse(method="residual", control="top2", tolerance=0.03),
            tells=TELLS_RESIDUAL,
        ),
        Claim(
            key="half_the_bytes",
            text="It sends half as much to experts.",
            where="section 4, phenomenon II (top-1 communication)",
            claimed="half; training more than 10 % faster",
            metric="dispatch_bytes",
            judge=Beats(method="residual", control="top2", by=0.5, relative=True),
            tells="bytes a token: beside a fixed branch {residual}, two routed experts {top2}, one routed {moe}.",
        ),
        Claim(
            key="pr_is_large",
            text="A pyramid-residual model is as good as a plain mixture with the largest expert count in every layer.",
            where="section 4, validation loss of PR-MoE against MoE-128",
            claimed="a loss about 0.01 higher",
            metric="heldout_loss",
            judge=NotWorse(method="pr_moe", control="moe_large", tolerance=0.03),
            tells=TELLS_PYRAMID,
        ),
        Claim(
            key="fewer_parameters",
            text="It holds at most 45 % of the plain mixture's expert parameters.",
            where="section 4, model sizes (31B against 52B, 4B against 13B)",
            claimed="up to 3 times fewer parameters",
            metric="expert_parameters",
            judge=Beats(method="pr_moe", control="moe_large", by=0.55, relative=True),
            tells="pyramid and residual {pr_moe}, pyramid alone {pyramid}, 16 experts in every layer {moe_large}.",
        ),
        Claim(
            key="pr_is_large_at_equal_compute",
            text="It stays as good when the plain mixture may use as much compute, two experts a token.",
            where="the refuting control",
            claimed="not compared in the paper",
            metric="heldout_loss",
            judge=NotWorse(method="pr_moe", control="top2_large", tolerance=0.03),
            tells=TELLS_PYRAMID,
        ),
        Claim(
            key="second_half",
            text="Experts in the second half of a model help more than in the first half.",
            where="section 4, phenomenon I",
            claimed="a lower validation loss for the second half",
            metric="heldout_loss",
            judge=EverySeed(method="second_half", control="first_half"),
            tells=(
                "experts in the first half {first_half}, in the second {second_half}, in none {no_half}: what either "
                "half gains over none is what there is to share out."
            ),
        ),
    ),
    arms=(
        Arm(name="pr_moe", text="4 and 8 experts, each beside a fixed branch, learned mix"),
        Arm(name="residual", text="4 and 4 experts, each beside a fixed branch, learned mix"),
        Arm(name="pyramid", text="4 and 8 experts, one a token", role="reference"),
        Arm(name="moe", text="4 and 4 experts, one a token", role="reference"),
        Arm(name="moe_large", text="16 and 16 experts, one a token", role="control"),
        Arm(name="top2", text="4 and 4 experts, two a token", role="control"),
        Arm(name="top2_large", text="16 and 16 experts, two a token: the active compute of pr_moe", role="control"),
        Arm(name="dense", text="no mixture", role="reference"),
        Arm(name="second_half", text="8 layers, 4 experts in each of the last four"),
        Arm(name="first_half", text="8 layers, 4 experts in each of the first four", role="control"),
        Arm(name="no_half", text="8 layers, no mixture", role="reference"),
    ),
    run=run,
    methods=("train.pr_moe", "train.moe", "train.softmax_topk", "train.balance_loss"),
    units={
        "heldout_loss": "nats a byte",
        "dispatch_bytes": "bytes a token",
        "expert_parameters": "parameters",
        "active_flops": "operations a token",
    },
)
