"""DeepSpeed-MoE, inference: rows picked by index, messages of three ways around, and what a pyramid saves at decode.

Dispatch: the same layer with rows gathered and added back by index, and with the one-hot products of GShard, in turns
in one run. Communication: every rank of a machine of 128 in this process, its messages and bytes counted, and four real
processes as two nodes of two. Decode: the mixture layers of the study of the architecture, as wide as to be bound by
memory: bytes of experts that a step touches, and its processor time.
"""

import statistics
from collections.abc import Mapping
from typing import Any

import torch

from moestro.core.bank import StackedFFN
from moestro.core.layer import MoELayer, mixture_layers
from moestro.core.routing import Routing
from moestro.core.session import session
from moestro.studies._dispatch import dispatch, ratio, seconds_of
from moestro.studies._framework import Arm, Beats, Budget, Claim, Matches, Study, Within
from moestro.studies._language import Scale
from moestro.studies._messages import WAYS, communicate, on_processes
from moestro.studies.deepspeed_moe_architecture import build


BATCH = 64  # sequences of a batched decode step
MODELS = ("pr_moe", "moe_large", "top2_large")  # of the study of the architecture


def mixtures(arm: str, seed: int, budget: Budget) -> list[MoELayer]:
    """The mixture layers of that study's arm, with experts that do not fit a cache."""
    dim, inner = budget.pick(ci=(32, 64), micro=(256, 512), full=(512, 1024))
    size = Scale(layers=4, dim=dim, inner=inner, heads=4, vocabulary=259)
    return list(mixture_layers(build(arm, size, seed)).values())


class Touched:
    """Recorder: distinct experts that compute, a layer and step."""

    def __init__(self) -> None:
        self.experts: dict[str, list[int]] = {}

    def record(self, site: str, routing: Routing, ctx: Any) -> None:
        """Take one layer's routing."""
        self.experts.setdefault(site, []).append(len(torch.unique(routing.real().expert_N)))


def fixed_bytes(layer: MoELayer) -> int:
    """Bytes of the layer that every step reads: router, fixed branch and mix."""
    return sum(p.nbytes for name, p in layer.named_parameters() if not name.startswith("bank."))


@torch.no_grad()
def touches(layers: list[MoELayer], tokens: int, seed: int, steps: int) -> float:
    """Mean bytes of all layers that a step of ``tokens`` sequences reads."""
    draw, total = torch.Generator().manual_seed(seed), 0
    for layer in layers:
        seen, bank = Touched(), layer.bank
        assert isinstance(bank, StackedFFN)
        with session(recorder=seen):
            for _ in range(steps):
                layer(torch.randn(tokens, 1, bank.dim, generator=draw))
        total += steps * fixed_bytes(layer) + sum(seen.experts[layer.site]) * bank.nbytes(0)
    return total / steps


@torch.no_grad()
def step_seconds(seed: int, budget: Budget, tokens: int) -> dict[str, list[float]]:
    """Processor seconds of a step through each model's mixture layers, in turns, each with other tokens."""
    draw = torch.Generator().manual_seed(seed)
    models = {arm: mixtures(arm, seed, budget) for arm in MODELS}
    width = models["pr_moe"][0].router.get_parameter("weight").shape[1]

    def step(arm: str) -> None:
        x = torch.randn(tokens, 1, width, generator=draw)
        for layer in models[arm]:
            layer(x)

    calls = {arm: (lambda arm=arm: step(arm)) for arm in MODELS}
    return seconds_of(calls, budget.pick(ci=2, micro=15, full=101))


def decode(arm: str, seed: int, budget: Budget) -> dict[str, float]:
    """Bytes that a step touches and that must be held; or, in one run, times."""
    if arm == "step":
        found = {}
        for name, tokens in (("one", 1), ("batch", BATCH)):
            seconds = step_seconds(seed, budget, tokens)
            for other in MODELS[1:]:
                found[f"time_{name}_over_{other}"] = ratio(seconds, "pr_moe", other)
            found |= {f"ms_{name}_{model}": 1000 * statistics.median(taken) for model, taken in seconds.items()}
        return found
    layers, steps = mixtures(arm, seed, budget), budget.pick(ci=2, micro=10, full=40)
    return {
        "megabytes_one": touches(layers, 1, seed, steps) / 1e6,
        "megabytes_batch": touches(layers, BATCH, seed, steps) / 1e6,
        "megabytes_held": sum(p.nbytes for layer in layers for p in layer.parameters()) / 1e6,
    }


def run(arm: str, seed: int, budget: Budget) -> Mapping[str, float]:
    """Measure one arm."""
    if arm in WAYS:
        return communicate(arm, seed, budget)
    if arm == "processes":
        return on_processes(seed, budget)
    if arm in (*MODELS, "step"):
        return decode(arm, seed, budget)
    tokens, experts, width = budget.pick(ci=(512, 8, 32), micro=(2048, 32, 256), full=(2048, 32, 256))
    if arm == "dispatch_few":
        tokens //= 16
    return dispatch(seed, tokens=tokens, experts=experts, width=width, times=budget.pick(ci=3, micro=5, full=31))


DISPATCH = (
    "einsum over index {dispatch.speedup} times with {dispatch.ms_einsum} ms against {dispatch.ms_index}, of these "
    "{dispatch.ms_einsum_moves} and {dispatch.ms_index_moves} for rows alone; with the experts' products "
    "{dispatch.speedup_of_layer} times, {dispatch.ms_einsum_layer} ms against {dispatch.ms_index_layer}; at a "
    "sixteenth of the tokens {dispatch_few.speedup} times, with the experts {dispatch_few.speedup_of_layer}."
)
WAYS_TELL = (
    "messages out {flat.messages} flat, {hierarchical.messages} hierarchical, {nodes_of_one.messages} with nodes of "
    "one rank, {coordinated.messages} coordinated, {slices_of_one.messages} with slices of one; back "
    "{coordinated.messages_back}; bytes out over those held {flat.volume}, {hierarchical.volume}, "
    "{nodes_of_one.volume}, {coordinated.volume}, {slices_of_one.volume}, coordinated back {coordinated.volume_back}."
)
BYTES = (
    "megabytes a step touches with one sequence: pyramid and residual {pr_moe.megabytes_one}, one of 16 "
    "{moe_large.megabytes_one}, two of 16 {top2_large.megabytes_one}; with 64 {pr_moe.megabytes_batch}, "
    "{moe_large.megabytes_batch} and {top2_large.megabytes_batch}; held {pr_moe.megabytes_held}, "
    "{moe_large.megabytes_held} and {top2_large.megabytes_held}. One token runs through one expert of a plain layer "
    "and through an expert and the fixed branch of the other; many tokens run through nearly all experts there are."
)
TIMES = (
    "processor ms of a step with one sequence: pyramid and residual {step.ms_one_pr_moe}, one of 16 "
    "{step.ms_one_moe_large}, two of 16 {step.ms_one_top2_large}; with 64 {step.ms_batch_pr_moe}, "
    "{step.ms_batch_moe_large} and {step.ms_batch_top2_large}. A step with one sequence reads what the bytes say: "
    "{pr_moe.megabytes_one}, {moe_large.megabytes_one} and {top2_large.megabytes_one} megabytes."
)

STUDY = Study(
    paper="deepspeed-moe",
    part="inference",
    title="Dispatch, messages and decoding",
    setting=(
        "On one core. Dispatch: 2048 tokens, 32 experts, width 256, top-1 with capacity factor 1, against a reference "
        "of the one-hot products in the same run. Messages: 128 ranks, 8 a node, counted in one process; four gloo "
        "processes as two nodes of two agree. Decode: the mixture layers of the study of the architecture at width "
        "512, random tokens, random routers (training balances theirs). Not measured, since it needs GPUs and a "
        "network: latencies of a whole model, throughput, cost, kernels in one launch, and whether fewer messages are "
        "faster; so none of the paper's figures for these is a claim here."
    ),
    claims=(
        Claim(
            key="dispatch_equal",
            text="Rows picked by index give the numbers of the one-hot products, dropped tokens included.",
            where="section 5, MoE kernels",
            claimed="the same function",
            metric="difference",
            judge=Within(arm="dispatch", low=0.0, high=1e-6),
            tells=DISPATCH,
        ),
        Claim(
            key="dropped_are_zero",
            text="A token without a place gets exact zeros.",
            where="section 5, MoE kernels",
            claimed="the same function",
            metric="dropped_output",
            judge=Within(arm="dispatch", low=0.0, high=0.0),
            tells="sum of outputs of dropped tokens {dispatch}, which are {dispatch.dropped} of all.",
        ),
        Claim(
            key="dispatch_faster",
            text="Tables and rows by index take a third of the time of the one-hot products, or less.",
            where="section 5, MoE kernels",
            claimed="S E M C to S M k work; over 6 times lower latency of what is not the experts' products, on a GPU",
            metric="speedup",
            judge=Within(arm="dispatch", low=3.0),
            tells=DISPATCH,
        ),
        Claim(
            key="grows_with_tokens",
            text="What is saved are the zeros: with places in proportion to tokens, few tokens gain less than many.",
            where="the refuting control",
            claimed="work in proportion to S against S E C",
            metric="speedup",
            judge=Beats(method="dispatch", control="dispatch_few", better="higher"),
            tells=DISPATCH,
        ),
        Claim(
            key="layer_faster",
            text="A whole layer, its experts' products included, is at least 1.2 times faster.",
            where="the refuting control",
            claimed="not reported alone",
            metric="speedup_of_layer",
            judge=Within(arm="dispatch", low=1.2),
            tells=DISPATCH,
        ),
        Claim(
            key="hierarchical_messages",
            text="The hierarchical all-to-all sends (G - 1) + (p/G - 1) messages a rank, the flat one p - 1.",
            where="section 5, hierarchical all-to-all",
            claimed="O(p) to O(G + p/G)",
            metric="wrong_messages",
            judge=Within(arm="hierarchical", low=0.0, high=0.0),
            tells=WAYS_TELL,
        ),
        Claim(
            key="fewer_messages",
            text="At 128 ranks, 8 a node, these are less than a fifth of the flat one's.",
            where="section 5, hierarchical all-to-all",
            claimed="O(p) to O(G + p/G)",
            metric="messages",
            judge=Beats(method="hierarchical", control="flat", by=0.8, relative=True),
            tells=WAYS_TELL,
        ),
        Claim(
            key="nodes_matter",
            text="It is the nodes that do it: with one rank a node the same code sends as many as the flat one.",
            where="the refuting control",
            claimed="G + p/G at G = 1 is O(p)",
            metric="messages",
            judge=Matches(method="nodes_of_one", other="flat", tolerance=0.0),
            tells=WAYS_TELL,
        ),
        Claim(
            key="hierarchical_volume",
            text="For that it sends V (2 - 1/G - G/p) bytes instead of V (1 - 1/p).",
            where="section 5, hierarchical all-to-all",
            claimed="twice the volume, at most",
            metric="wrong_volume",
            judge=Within(arm="hierarchical", low=0.0, high=1e-9),
            tells=WAYS_TELL,
        ),
        Claim(
            key="same_across_nodes",
            text="No byte more goes to other nodes than in the flat one.",
            where="the refuting control",
            claimed="not said in the paper",
            metric="volume_across",
            judge=Matches(method="hierarchical", other="flat", tolerance=1e-9),
            tells="bytes to other nodes over those held: flat {flat}, hierarchical {hierarchical}.",
        ),
        Claim(
            key="coordinated_messages",
            text="Where 8 ranks hold the same tokens, a rank sends an eighth of the messages out, p/L of p.",
            where="section 5, parallelism-coordinated communication",
            claimed="128 C1 to 16 C1 on 128 GPUs",
            metric="messages",
            judge=Beats(method="coordinated", control="slices_of_one", by=0.87, relative=True),
            tells=WAYS_TELL,
        ),
        Claim(
            key="coordinated_messages_back",
            text="With the all-gather that brings the answers to all 8, p/L + L, less than a fifth of p.",
            where="section 5, parallelism-coordinated communication",
            claimed="O(p) to O(p/L) + O(L)",
            metric="messages_back",
            judge=Beats(method="coordinated", control="slices_of_one", by=0.8, relative=True),
            tells=WAYS_TELL,
        ),
        Claim(
            key="ways_equal",
            text="All ways bring the same rows to the last bit, between processes too.",
            where="section 5",
            claimed="the same function",
            metric="equal",
            judge=Within(arm="processes", low=1.0, high=1.0),
            tells=(
                "{processes} on {processes.processes} processes; 128 ranks in one process: flat {flat}, hierarchical "
                "{hierarchical}, coordinated {coordinated}."
            ),
        ),
        Claim(
            key="fewer_bytes",
            text="With 64 sequences a decode step of a pyramid-residual model touches less than half the bytes of a "
            "plain mixture of equal quality.",
            where="sections 4 and 5: PR-MoE on fewer GPUs",
            claimed="16 instead of 32 GPUs, with students",
            metric="megabytes_batch",
            judge=Beats(method="pr_moe", control="moe_large", by=0.5, relative=True),
            tells=BYTES,
        ),
        Claim(
            key="fewer_bytes_of_one",
            text="With one sequence too it touches no more.",
            where="the refuting control",
            claimed="not said in the paper",
            metric="megabytes_one",
            judge=Beats(method="pr_moe", control="moe_large"),
            tells=BYTES,
        ),
        Claim(
            key="faster_batch",
            text="With 64 sequences its step takes less processor time.",
            where="section 5: latency of PR-MoE against standard MoE",
            claimed="lower latency on as many GPUs",
            metric="time_batch_over_moe_large",
            judge=Within(arm="step", high=0.95),
            tells=TIMES,
        ),
        Claim(
            key="faster_one",
            text="With one sequence too.",
            where="section 5: latency of PR-MoE against standard MoE",
            claimed="lower latency on as many GPUs",
            metric="time_one_over_moe_large",
            judge=Within(arm="step", high=0.95),
            tells=TIMES,
        ),
    ),
    arms=(
        Arm(name="dispatch", text="one choice of 2048 tokens, by index and by one-hot products in turns"),
        Arm(name="dispatch_few", text="the same with 128 tokens", role="control"),
        Arm(name="hierarchical", text="inside nodes of 8, then across"),
        Arm(name="coordinated", text="8 ranks hold the same tokens: equal places exchange, then gather"),
        Arm(name="flat", text="one exchange among all ranks", role="control"),
        Arm(name="nodes_of_one", text="the hierarchical code with one rank a node", role="control"),
        Arm(name="slices_of_one", text="the coordinated code, no two ranks holding the same", role="control"),
        Arm(name="processes", text="all ways on four processes, two nodes of two", role="reference"),
        Arm(name="pr_moe", text="4 and 8 experts, each beside a fixed branch"),
        Arm(name="moe_large", text="16 and 16 experts, one a token", role="control"),
        Arm(name="top2_large", text="16 and 16 experts, two a token: the active compute of pr_moe", role="control"),
        Arm(name="step", text="the three models' layers in turns in one run", role="reference"),
    ),
    run=run,
    methods=("train.pr_moe", "train.moe", "train.softmax_topk"),
    units={
        "difference": "largest of all outputs",
        "speedup": "times, processor time",
        "speedup_of_layer": "times, processor time",
        "messages": "a rank, one way",
        "messages_back": "a rank, the way back",
        "volume_across": "bytes to other nodes over bytes held",
        "megabytes_batch": "megabytes a step, 64 sequences",
        "megabytes_one": "megabytes a step, one sequence",
        "time_batch_over_moe_large": "processor time over that of one of 16 experts",
        "time_one_over_moe_large": "processor time over that of one of 16 experts",
    },
)
