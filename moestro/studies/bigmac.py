"""BigMac: does a mixture keep its quality when tokens travel narrow, and what does that save on the wire?

Quality: the narrow layer against a fine-grained mixture of equal expert parameters, and against one whose number of
active experts is cut until it sends as few bytes. Traffic: both layers on two real processes, bytes counted where they
enter the collective. Time on machines we do not have: a model with latency, bandwidth and compute, named as a model.
"""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from moestro.core.cost import Work, cost
from moestro.core.layer import MoELayer
from moestro.core.registry import method
from moestro.core.site import Shared, Site
from moestro.studies._framework import Arm, Beats, Budget, Claim, NotWorse, Study, Within
from moestro.studies._language import Scale, heldout, llama, text, train
from moestro.training.expert_parallel import shard_experts


EXPERTS, TOP_K, RATIO = 16, 4, 0.25
LARGE = EXPERTS // TOP_K  # experts that are TOP_K times as large: equal parameters
AUX = {"balance": 0.01}
TRAINING_TOKENS = 16384  # a rank, in the model of a machine


def scale(budget: Budget) -> Scale:
    """A small run for each budget."""
    return budget.pick(
        ci=Scale(layers=2, dim=32, inner=64, heads=2, vocabulary=512, length=32, batch=4, steps=4, heldout=8),
        micro=Scale(layers=2, dim=64, inner=128, heads=2, vocabulary=1024, length=64, batch=8, steps=40, heldout=32),
        full=Scale(steps=240, heldout=128),
    )


def layer(arm: str, width: int, *, path: str = "mlp", top_k: int = TOP_K) -> MoELayer:
    """One layer of an arm: equal expert parameters, 2 r h^2 each."""
    losses = {"balance": {"method": "train.balance_loss", "config": {"scope": "sequence"}}}
    shape = {"num_experts": EXPERTS, "activation": "gelu", "gated": False, "losses": losses}
    router = {"method": "train.softmax_topk", "config": {"renormalise": False}}
    if arm.startswith("bigmac"):
        use = method("train.bigmac")
        reads = "down" if arm == "bigmac_narrow_router" else "full"
        half = arm == "bigmac_half"  # twice the interface, half the inner width: the same parameters of an expert
        values = {**shape, "router": router, "router_input": reads, "top_k": top_k}
        values |= {"down_ratio": 2 * RATIO, "expert_size": width // 2} if half else {"down_ratio": RATIO}
    else:
        use = method("train.moe")
        router["config"] = {"renormalise": False, "top_k": top_k}
        values = {**shape, "expert_size": round(RATIO * width), "bias": False, "router": router}
        if arm == "large_experts":  # one of them a token: equal operations, as few bytes as the narrow layer
            router["config"] = {"renormalise": False, "top_k": 1}
            values |= {"num_experts": LARGE, "expert_size": round(RATIO * width) * TOP_K}
    site = Site(path=path, kind="mlp", module=nn.Identity(), dim=width, out=width)
    made: MoELayer = use.build(site, use.configure(values), Shared())
    return made


def build(size: Scale, arm: str, seed: int) -> nn.Module:
    """A Llama model with the arm's layer in every block."""
    model = llama(size, seed)
    top_k = round(RATIO * TOP_K) if arm == "fine_grained_equal_bytes" else TOP_K
    for number, block in enumerate(model.model.layers):
        block.mlp = layer(arm, size.dim, path=f"model.layers.{number}.mlp", top_k=top_k)
    return model


# -- traffic -----------------------------------------------------------------------------------------------------


def exchange(rank: int, world: int, width: int, tokens: int, seed: int) -> dict[str, float]:
    """On one of the ranks: bytes of hidden rows and seconds of a step of both layers, the median of three."""
    found: dict[str, float] = {}
    for arm in ("fine_grained", "bigmac"):
        for one_copy in (False, True):
            torch.manual_seed(seed)
            made = layer(arm, width)
            with torch.no_grad():  # the same choices in both
                weight = torch.randn(EXPERTS, width, generator=torch.Generator().manual_seed(seed))
                made.router.get_parameter("weight").copy_(weight)
            traffic = shard_experts(made, one_copy=one_copy).traffic
            x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed + rank)).requires_grad_()
            seconds = []
            for _ in range(3):
                traffic.reset()
                started = time.perf_counter()
                made(x).sum().backward()
                seconds.append(time.perf_counter() - started)
            name = f"{arm}{'_one_copy' if one_copy else ''}"
            found |= {f"{name}_bytes": float(traffic.rows), f"{name}_orders": float(traffic.orders)}
            found[f"{name}_seconds"] = statistics.median(seconds)
    return found


def alone(width: int, tokens: int, seed: int) -> dict[str, float]:
    """Seconds of a step of both layers without any traffic, interleaved medians, and their ratios."""
    torch.manual_seed(seed)
    layers = {arm: layer(arm, width) for arm in ("fine_grained", "bigmac")}
    x = torch.randn(tokens, width).requires_grad_()
    seconds: dict[str, list[float]] = {arm: [] for arm in layers}
    for _ in range(7):
        for arm, made in layers.items():
            started = time.perf_counter()
            made(x).sum().backward()
            seconds[arm].append(time.perf_counter() - started)
    narrow, plain = statistics.median(seconds["bigmac"]), statistics.median(seconds["fine_grained"])
    operations = {arm: cost(made, Work(length=tokens)) for arm, made in layers.items()}
    return {
        "seconds_ratio_alone": narrow / plain,
        "seconds_alone_narrow": narrow,
        "seconds_alone_fine_grained": plain,
        "operations_ratio_alone": operations["bigmac"] / operations["fine_grained"],
    }


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A machine of the model: each of ``ranks`` devices computes ``flops`` a second and sends ``bandwidth`` bytes a
    second after ``latency`` seconds a message.
    """

    ranks: int
    bandwidth: float
    latency: float = 2e-5
    flops: float = 6e13


def modelled_step(machine: Machine, *, width: int, tokens: int, narrow: bool, nbytes: float = 2) -> tuple[float, float]:
    """(seconds, share of the all-to-all) of a layer's training step with ``tokens`` a rank, k = 8, ``nbytes`` a number.

    Four exchanges (two ways, forward and backward); compute is three times the forward of the experts and of attention.
    """
    top_k = 8
    row = nbytes * width * (RATIO if narrow else 1.0)
    sent = 4 * tokens * top_k * row * (machine.ranks - 1) / machine.ranks
    messages = 4 * (machine.ranks - 1) * machine.latency
    weights = 4 * width**2 + top_k * 2 * RATIO * width**2 + (2 * RATIO * width**2 if narrow else 0)
    compute = 3 * 2 * tokens * weights / machine.flops
    exchange = sent / machine.bandwidth + messages
    return compute + exchange, exchange / (compute + exchange)


def modelled_speedups(tokens: int, nbytes: float = 2) -> list[float]:
    """The narrow layer's speed-up on the modelled machines on which the fine-grained one exchanges over 80 % of a step.

    Args:
        tokens: a rank. nbytes: a number of a fine-grained row takes; narrow rows take 2 bytes.
    """
    gains = []
    for ranks in (2, 8, 32):
        for bandwidth in (12e9, 1e9):
            machine = Machine(ranks=ranks, bandwidth=bandwidth)
            plain, _ = modelled_step(machine, width=2048, tokens=tokens, narrow=False, nbytes=nbytes)
            _, share = modelled_step(machine, width=2048, tokens=tokens, narrow=False)
            narrow, _ = modelled_step(machine, width=2048, tokens=tokens, narrow=True)
            if share > 0.8:
                gains.append(plain / narrow)
    return gains


# -- the paper's closed forms ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Paper:
    """The setting of the paper's table of counts: GPT3-XL with 64 experts, 8 active, on 32 devices."""

    width: int = 2048
    layers: int = 24
    experts: int = 64
    top_k: int = 8
    vocabulary: int = 50257
    sequence: int = 2048
    tokens: int = 524_288
    ranks: int = 32

    def parameters(self, *, narrow: bool) -> float:
        """Biases of projections, norms and experts included."""
        h = self.width
        block = 4 * h**2 + 8 * h + (2 * RATIO * h**2 + 2 * RATIO * h) * self.experts
        return block * self.layers + (self.vocabulary + self.experts + 2) * h + narrow * 2 * RATIO * self.layers * h**2

    def flops(self, *, narrow: bool) -> float:
        """Of one iteration."""
        h, tokens = self.width, self.tokens
        inner = 2 + self.sequence / h + self.vocabulary / (2 * self.layers * h) + RATIO * self.top_k
        return 12 * tokens * self.layers * h**2 * (inner + narrow * RATIO)

    def bytes(self, *, narrow: bool) -> float:
        """All-to-all of one iteration: 2-byte rows, two ways, forward and backward."""
        plain = 8 * self.tokens * self.layers * self.width * self.top_k * (self.ranks - 1) / self.ranks
        return plain * (RATIO if narrow else 1.0)


# -- arms --------------------------------------------------------------------------------------------------------


def run(arm: str, seed: int, budget: Budget) -> Mapping[str, float]:
    """Train one arm and measure its held-out loss, or measure the traffic."""
    size = scale(budget)
    if arm == "traffic":
        return measure_traffic(seed, budget)
    data = text(size.vocabulary, size.length, size.heldout, limit=budget.pick(ci=6, micro=120, full=None))
    model = build(size, arm, seed)
    steps = size.steps * (2 if arm.endswith("_long") else 1)
    train(model, data.train, size, seed, steps=steps, losses=AUX)
    return {"heldout_loss": heldout(model, data.heldout, size)}


def measure_traffic(seed: int, budget: Budget) -> dict[str, float]:
    """Ratios of bytes and times, narrow over fine-grained."""
    from moestro.testing.distributed import run_distributed

    width, tokens = budget.pick(ci=(32, 64), micro=(64, 512), full=(128, 4096))
    ranks = run_distributed(exchange, 2, width, tokens, seed)
    total = {name: sum(rank[name] for rank in ranks) for name in ranks[0]}
    everything = {arm: total[f"{arm}_bytes"] + total[f"{arm}_orders"] for arm in ("bigmac", "fine_grained")}
    return {
        "bytes_ratio_with_orders": everything["bigmac"] / everything["fine_grained"],
        "bytes_ratio": total["bigmac_bytes"] / total["fine_grained_bytes"],
        "bytes_ratio_one_copy": total["bigmac_one_copy_bytes"] / total["fine_grained_one_copy_bytes"],
        "bytes_over_fine_grained_one_copy": total["bigmac_bytes"] / total["fine_grained_one_copy_bytes"],
        "seconds_ratio": total["bigmac_seconds"] / total["fine_grained_seconds"],
        "modelled_speedup": min(modelled_speedups(TRAINING_TOKENS)),
        "modelled_speedup_over_8_bit_rows": min(modelled_speedups(TRAINING_TOKENS, nbytes=1)),
        "modelled_speedup_one_token": min(modelled_speedups(1)),
        **alone(width, tokens, seed),
    }


STUDY = Study(
    paper="bigmac",
    title="Narrow traffic at equal quality",
    setting=(
        "A Llama model (4 layers, width 128) with 16 experts, 4 active, each of 2 r h^2 parameters with r = 1/4, "
        "trained for 240 steps of 1024 tokens on the standard library's source files; all arms see the same tokens. "
        "Traffic is counted on two gloo processes with 4096 tokens each; speed-ups on larger machines come from a "
        "model of latency, bandwidth and compute. The paper trains 24 layers of width 2048 on 32 devices."
    ),
    claims=(
        Claim(
            key="quality",
            text="It is as good as a fine-grained mixture of equal expert parameters after the same tokens.",
            where="table 4 and section 4.2",
            claimed="better on 4, worse on 3 of 8 tasks; WikiText2 perplexity 17.9 against 17.4 at equal time",
            metric="heldout_loss",
            judge=NotWorse(method="bigmac", control="fine_grained", tolerance=0.01, relative=True),
            tells=(
                "narrow {bigmac} against fine-grained {fine_grained}; with an interface twice as wide and experts of "
                "the same size {bigmac_half}; after twice the steps narrow {bigmac_long}, fine-grained "
                "{fine_grained_long}."
            ),
        ),
        Claim(
            key="equal_bytes",
            text="It is better than a fine-grained mixture that sends as few bytes by using fewer experts.",
            where="the refuting control",
            claimed="not measured in the paper",
            metric="heldout_loss",
            judge=Beats(method="bigmac", control="fine_grained_equal_bytes"),
            tells=(
                "one full-width expert a token {fine_grained_equal_bytes}, four {fine_grained}, one of four experts "
                "four times as large {large_experts}; narrow {bigmac}, with an interface twice as wide {bigmac_half}; "
                "after twice the steps narrow {bigmac_long}."
            ),
        ),
        Claim(
            key="equal_bytes_and_operations",
            text="It is better than few large experts, one a token: equal bytes, parameters and operations of experts.",
            where="table 4",
            claimed="WikiText2 perplexity 17.9 against 27.4 at equal time",
            metric="heldout_loss",
            judge=Beats(method="bigmac", control="large_experts"),
            tells=(
                "one of four large experts {large_experts}, narrow {bigmac}, fine-grained {fine_grained}; narrow with "
                "an interface twice as wide {bigmac_half}; after twice the steps narrow {bigmac_long}."
            ),
        ),
        Claim(
            key="bytes",
            text="The all-to-all carries r times the bytes.",
            where="table 2",
            claimed="1488 to 372 GiB an iteration at r = 0.25",
            metric="bytes_ratio",
            judge=Within(arm="traffic", low=0.99 * RATIO, high=1.01 * RATIO),
            tells=(
                "rows {traffic}, with one copy a rank {traffic.bytes_ratio_one_copy}, with the lists of which row goes "
                "to which expert {traffic.bytes_ratio_with_orders}."
            ),
        ),
        Claim(
            key="faster_where_traffic_rules",
            text="Where the all-to-all takes over 80 % of a step, the step is over 1.5 times faster (modelled).",
            where="figure 6: 1.53 to 3.07 times",
            claimed="up to 3.09 times",
            metric="modelled_speedup",
            judge=Within(arm="traffic", low=1.5),
            tells=(
                "smallest speed-up {traffic} with 16384 tokens a rank, {traffic.modelled_speedup_one_token} with one; "
                "against full-width rows of 8 bits {traffic.modelled_speedup_over_8_bit_rows}."
            ),
        ),
        Claim(
            key="slower_alone",
            text="Without expert parallelism it is slower.",
            where="section 4.4",
            claimed="slightly slower",
            metric="seconds_ratio_alone",
            judge=Within(arm="traffic", low=1.0),
            tells=(
                "a step takes {traffic.seconds_alone_narrow} s narrow and {traffic.seconds_alone_fine_grained} s "
                "fine-grained at {traffic.operations_ratio_alone} times the operations; on two processes the narrow "
                "step takes {traffic.seconds_ratio} of the fine-grained one's time."
            ),
        ),
    ),
    arms=(
        Arm(
            name="bigmac", text="down to a quarter, experts 32 to 128 to 32, up again; the router reads the full width"
        ),
        Arm(name="bigmac_narrow_router", text="the same, the router reads the narrow input", role="reference"),
        Arm(name="fine_grained", text="experts 128 to 32 to 128 at full width", role="control"),
        Arm(name="fine_grained_equal_bytes", text="the same with 1 expert active instead of 4", role="control"),
        Arm(name="large_experts", text="4 experts 128 to 128 to 128 at full width, 1 active", role="control"),
        Arm(name="bigmac_half", text="down to a half, experts 64 to 64 to 64", role="reference"),
        Arm(name="bigmac_long", text="the narrow layer, twice the steps", role="reference"),
        Arm(name="fine_grained_long", text="the fine-grained layer, twice the steps", role="reference"),
        Arm(name="traffic", text="both layers on two processes, experts shared out", role="reference"),
    ),
    run=run,
    methods=("train.bigmac", "train.moe", "train.softmax_topk", "train.balance_loss"),
    units={
        "heldout_loss": "nats a token",
        "bytes_ratio": "narrow over full width, hidden rows",
        "modelled_speedup": "times, smallest case",
        "seconds_ratio_alone": "narrow over fine-grained, one process",
    },
)
