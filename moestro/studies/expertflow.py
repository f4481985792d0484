"""ExpertFlow: can a small transformer over token ids foresee routing well enough to be worth its place?

One mixture is trained a seed on source files, documentation and a little German; routing is recorded and the predictor
is taught on source files and documentation, whose held-out files are "in domain". German is routed by the same mixture
but was never shown to the predictor: "cross domain". Three parts: what forecasts name (recall and precision, of tokens
and of batches joined), what caches hit and read with the same slots, the same policy and the same machine, and how many
experts two batches touch when they are split by expected paths.

Every rival that forecasts from token ids runs in the same policy and the same queue of reads, so that only the forecast
differs: how often experts are used, what the token before used, a table from token id to experts, the truth. The next
layer's gate on real hidden states runs as published, with LRU.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moestro.core.expert_cache import Learner
from moestro.core.registry import method
from moestro.methods.serve._parts import route_rivals as rivals
from moestro.methods.serve._parts.token_split import split, touched
from moestro.studies._foreseen import Made, data, drawn, made, size_of
from moestro.studies._framework import Arm, Beats, Budget, Claim, NotWorse, Study, Within
from moestro.studies._offload import Gates, Told, columns_of, decoding, keys_of, replay, written


SHARES, BATCHES = (0.10, 0.25, 0.50), (1, 4, 16)
HALVES = (4, 8, 16, 32)
FORECASTS = ("predictor", "token_table", "previous_token", "frequency", "perfect")
CACHES = (*FORECASTS, "next_gate", "lru", "lfu", "static", "belady")
SPLITS = ("predictor", "perfect", "arrival", "random", "cover", "loop")


# -- what forecasts name ----------------------------------------------------------------------------------------------


def named(arm: str, bench: Made) -> dict[str, float]:
    """Recall and precision of the k best, 1.5 k and 2 k, and joined; ``later``: without the first layer."""
    found: dict[str, float] = {}
    for kind, paths in bench.held.items():
        ranked = bench.gate[kind] if arm == "next_gate" else bench.said[kind][arm]
        best = rivals.top(ranked, paths.layers)
        behind = slice(paths.layers[0].experts, None)
        found[f"later_{kind}"] = rivals.recall(best[:, behind], paths.used[:, behind])
        if arm == "next_gate":
            continue
        found[f"recall_{kind}"] = rivals.recall(best, paths.used)
        for factor, name in ((1.5, "wide"), (2.0, "double")):
            more = rivals.top(ranked, paths.layers, factor)
            found |= {
                f"{name}_{kind}": rivals.recall(more, paths.used),
                f"{name}_precision_{kind}": rivals.precision(more, paths.used),
            }
        for batch in (4, 16):
            steps = decoding(paths, batch, 64, 4)
            groups = np.repeat(np.arange(len(steps)), batch)
            rows = np.concatenate([step.rows for step in steps])
            marks, truth = rivals.merged(best[rows], groups), rivals.merged(paths.used[rows], groups)
            found[f"joined{batch}_{kind}"] = rivals.recall(marks, truth)
            found[f"joined{batch}_precision_{kind}"] = rivals.precision(marks, truth)
    return found


# -- what caches hit and read -----------------------------------------------------------------------------------------


def flow() -> Any:
    """Policy, forecast and order in one, without a predictor."""
    use = method("serve.expertflow")
    return use.module.ExpertFlow(use.configure({}))


def player(arm: str, bench: Made, kind: str, past: list[Any]) -> tuple[Any, Any]:
    """Policy and forecast of an arm."""
    paths = bench.held[kind]
    if arm in FORECASTS:
        both = flow()
        both.predictor = Told(paths, bench.said[kind][arm])
        return both, both
    name = {"static": "serve.static_hot", "next_gate": "serve.lru"}.get(arm, f"serve.{arm}")
    policy = method(name).entry("policy")(method(name).configure({}))
    if isinstance(policy, Learner):
        policy.learn(past)
    gate = method("serve.next_gate")
    return policy, gate.entry("forecast")(gate.configure({})) if arm == "next_gate" else None


def cached(arm: str, bench: Made, budget: Budget) -> dict[str, float]:
    """Hit ratio, experts read for a token, and waiting as a share of computing, by slots, batch and domain."""
    found: dict[str, float] = {}
    tokens = budget.pick(ci=6, micro=24, full=96)
    cases = [("in", share, batch, 1.0) for share in SHARES for batch in BATCHES]
    cases += [("cross", 0.25, 16, 1.0), ("in", 0.25, 16, 0.25)]
    for kind, share, batch, speed in cases:
        paths = bench.held[kind]
        steps = decoding(paths, batch, tokens, 4 if batch < 16 else 3)
        slots = max(2, round(share * paths.used.shape[1]))
        past = keys_of(decoding(bench.taught, batch, tokens, 4)) if arm == "static" else []
        policy, forecast = player(arm, bench, kind, past)
        counts = replay(paths, steps, policy, forecast, slots, speed, Gates(bench.gate[kind], columns_of(paths)))
        name = f"{round(100 * share)}_{batch}" + ("_cross" if kind == "cross" else "") + ("_slow" if speed < 1 else "")
        played = sum(len(step.rows) for step in steps)
        found |= {
            f"hits_{name}": counts.hits / (counts.hits + counts.misses),
            f"reads_{name}": counts.bytes / played,
            f"wait_{name}": counts.wait / counts.computing,
        }
    return found


# -- who runs together ------------------------------------------------------------------------------------------------


def covered(paths: Any) -> Any:
    """A greedy cover: the group grows by whoever adds fewest new experts."""
    half, left, group = len(paths) // 2, set(range(1, len(paths))), [0]
    have = paths[0].copy()
    while len(group) < half:
        best = min(left, key=lambda place: (int((paths[place] & ~have).sum()), place))
        group.append(best)
        left.discard(best)
        have |= paths[best]
    return np.array([*group, *sorted(left)])


def grouped(arm: str, paths: Any, seed: int) -> Any:
    """An order whose halves run together, by an arm."""
    if arm == "arrival":
        return np.arange(len(paths))
    if arm == "random":
        return np.random.default_rng(seed).permutation(len(paths))
    if arm == "cover":
        return covered(paths)
    return split(paths, seed=seed, exact=0) if arm == "loop" else split(paths, seed=seed)


def scheduled(arm: str, bench: Made, budget: Budget, seed: int) -> dict[str, float]:
    """(layer, expert) pairs that two batches of T sequences touch, by T."""
    paths = bench.held["in"]
    source = "perfect" if arm == "perfect" else "predictor"
    expected = rivals.top(bench.said["in"][source], paths.layers)
    found: dict[str, float] = {}
    for half in HALVES:
        if 2 * half > len(paths):
            continue
        draw, total = np.random.default_rng([seed, half]), 0
        rounds = budget.pick(ci=3, micro=12, full=60)
        for number in range(rounds):
            who = draw.choice(len(paths), 2 * half, replace=False)
            rows = paths.start[who] + int(draw.integers(size_of(budget).length))
            total += touched(paths.used[rows], grouped(arm, expected[rows], seed * 1000 + number))
        found[f"pairs_{half}"] = total / rounds
    return found


# -- a real run -------------------------------------------------------------------------------------------------------


def same_texts(bench: Made, budget: Budget) -> float:
    """Share of texts that the engine writes alike with all experts resident and with a few, foreseen and scheduled."""

    size = size_of(budget)
    count = budget.pick(ci=3, micro=6, full=8)
    prompts = [row[:8].tolist() for row in drawn(data(size)[size.task, "heldout"], count, 0)]
    both = flow()
    both.predictor = bench.predictor
    with tempfile.TemporaryDirectory() as folder:
        plain, flown = written(bench.model, both, prompts, budget.pick(ci=4, micro=8, full=24), Path(folder))
    return float(np.mean([one == other for one, other in zip(plain, flown, strict=True)]))


def run(arm: str, seed: int, budget: Budget) -> Mapping[str, float]:
    """Measure one arm."""
    bench = made(seed, budget)
    found: dict[str, float] = {}
    if arm in (*FORECASTS, "next_gate"):
        found |= named(arm, bench)
    if arm in CACHES:
        found |= cached(arm, bench, budget)
    if arm in SPLITS:
        found |= scheduled(arm, bench, budget, seed)
    if arm == "predictor":
        found["same_texts"] = same_texts(bench, budget)
    return found


NAMES = (
    "Recall of the k best, in domain: predictor {predictor.recall_in}, token table {token_table.recall_in}, previous "
    "token {previous_token.recall_in}, frequency {frequency.recall_in}; cross domain {predictor.recall_cross}, "
    "{token_table.recall_cross}, {previous_token.recall_cross}, {frequency.recall_cross}. Of layers behind the first "
    "the next layer's gate names {next_gate.later_in} and {next_gate.later_cross}, the predictor {predictor.later_in} "
    "and {predictor.later_cross}. "
)
CACHE = (
    "A quarter of the slots, 16 sequences: hit ratio {predictor.hits_25_16}, LRU {lru.hits_25_16}, LFU "
    "{lfu.hits_25_16}, static {static.hits_25_16}, Belady {belady.hits_25_16}, next gate {next_gate.hits_25_16}; in "
    "the predictor's place the token table {token_table.hits_25_16}, the previous token {previous_token.hits_25_16}, "
    "frequency {frequency.hits_25_16}, the truth {perfect.hits_25_16}. Experts read for a token: "
    "{predictor.reads_25_16}, LRU {lru.reads_25_16}, Belady {belady.reads_25_16}, the truth {perfect.reads_25_16}. "
    "Waiting as a share of computing: {predictor.wait_25_16}, LRU {lru.wait_25_16}, the truth {perfect.wait_25_16}. "
    "Joined over the batch the predictor names {predictor.joined16_in} of what is needed, and "
    "{predictor.joined16_precision_in} of what it names is needed. "
)
FOREIGN = (
    "Cross domain, a quarter of the slots, 16 sequences: hit ratio and experts read for a token "
    "{predictor.hits_25_16_cross} and {predictor.reads_25_16_cross}, LRU {lru.hits_25_16_cross} and "
    "{lru.reads_25_16_cross}, LFU {lfu.hits_25_16_cross} and {lfu.reads_25_16_cross}, previous token "
    "{previous_token.hits_25_16_cross} and {previous_token.reads_25_16_cross}, the truth "
    "{perfect.hits_25_16_cross} and {perfect.reads_25_16_cross}: what is foreseen wrongly is read in vain. "
)
PAIRS = (
    "Pairs touched at T = 16: predicted paths {predictor.pairs_16}, true paths {perfect.pairs_16}, greedy cover "
    "{cover.pairs_16}, as they came {arrival.pairs_16}, random {random.pairs_16}; at T = 4 the loop {loop.pairs_4}, "
    "all splits tried {predictor.pairs_4}, random {random.pairs_4}. One sequence alone has nobody to be "
    "scheduled with. "
)

STUDY = Study(
    paper="expertflow",
    title="Routing foreseen from token ids: prediction, caching, scheduling",
    setting=(
        "A mixture of 4 layers (width 128, 32 experts of 64, 2 a token, OLMoE's architecture), trained 350 steps of "
        "1024 tokens on the standard library's source files and documentation and on little German prose; the "
        "predictor (2 layers of 64, window 64, 400 updates) is taught on 179,200 of their training tokens; held out "
        "are 128 rows of 128 tokens of both, and German, which the predictor never saw, cross domain. Caches play "
        "decoding on a simulated machine in which reading what a layer needs takes as long as computing it. The paper "
        "has Switch, Mixtral, Qwen1.5-MoE and DeepSeek-MoE, a T5 of width 32 taught for 50 epochs on 30,000 prompts, "
        "and a GPU. "
    ),
    claims=(
        Claim(
            key="beats_table",
            text="In domain the predictor names at least 5 points more of the experts used than a table of token ids.",
            where="section on the routing path predictor; the table is not compared there",
            claimed="over 90 % accuracy in domain",
            metric="recall_in",
            judge=Beats(method="predictor", control="token_table", better="higher", by=0.05),
            tells="If a table is as good, the transformer is not needed. " + NAMES,
        ),
        Claim(
            key="beats_frequency",
            text="In domain the predictor names at least 5 points more than the experts used most.",
            where="section on the routing path predictor",
            claimed="heuristics under 20 to 30 %",
            metric="recall_in",
            judge=Beats(method="predictor", control="frequency", better="higher", by=0.05),
            tells=NAMES,
        ),
        Claim(
            key="cross_domain",
            text="On a domain it was not taught, too, it names at least 5 points more than the table.",
            where="cross-domain evaluation",
            claimed="80 to 90 % accuracy",
            metric="recall_cross",
            judge=Beats(method="predictor", control="token_table", better="higher", by=0.05),
            tells=NAMES,
        ),
        Claim(
            key="beats_next_gate",
            text="Behind the first layer it names more than the next layer's gate on real hidden states.",
            where="comparison with heuristic predictors",
            claimed="heuristics under 20 to 30 %",
            metric="later_in",
            judge=Beats(method="predictor", control="next_gate", better="higher"),
            tells=NAMES,
        ),
        Claim(
            key="beats_lru",
            text="With a quarter of the slots and 16 sequences the hit ratio is 5 points above LRU's.",
            where="hit ratios, Switch-32",
            claimed="85.9 % against 58.4 % with half of the slots, 71.9 % against 36.2 % with a quarter",
            metric="hits_25_16",
            judge=Beats(method="predictor", control="lru", better="higher", by=0.05),
            tells=CACHE,
        ),
        Claim(
            key="reads_no_more",
            text="For these hits at most a fifth more is read than with LRU.",
            where="not reported there; hits can be bought with reads in vain",
            claimed="not reported",
            metric="reads_25_16",
            judge=NotWorse(method="predictor", control="lru", tolerance=0.2, relative=True),
            tells=CACHE,
        ),
        Claim(
            key="forecast_matters",
            text="In the same cache the predictor hits at least 2 points more than how often experts are used.",
            where="the method: what is foreseen is what helps",
            claimed="not compared",
            metric="hits_25_16",
            judge=Beats(method="predictor", control="frequency", better="higher", by=0.02),
            tells=CACHE,
        ),
        Claim(
            key="table_is_not_enough",
            text="In the same cache the predictor hits at least 2 points more than the table of token ids.",
            where="the method: a transformer reads the sequence",
            claimed="not compared",
            metric="hits_25_16",
            judge=Beats(method="predictor", control="token_table", better="higher", by=0.02),
            tells="If a table hits as often, the transformer is not needed. " + CACHE,
        ),
        Claim(
            key="beats_lfu",
            text="With a quarter of the slots and 16 sequences the hit ratio is 5 points above LFU's, too.",
            where="not compared there; LRU forgets what comes back after all layers",
            claimed="not compared",
            metric="hits_25_16",
            judge=Beats(method="predictor", control="lfu", better="higher", by=0.05),
            tells=CACHE,
        ),
        Claim(
            key="cross_beats_lru",
            text="On the domain it was not taught the hit ratio is 5 points above LRU's.",
            where="cross-domain throughput",
            claimed="2.18 to 2.21 times the throughput",
            metric="hits_25_16_cross",
            judge=Beats(method="predictor", control="lru", better="higher", by=0.05),
            tells=FOREIGN,
        ),
        Claim(
            key="cross_reads_no_more",
            text="There, too, at most a fifth more is read than with LRU.",
            where="not reported",
            claimed="not reported",
            metric="reads_25_16_cross",
            judge=NotWorse(method="predictor", control="lru", tolerance=0.2, relative=True),
            tells=FOREIGN,
        ),
        Claim(
            key="waits_less",
            text="With a quarter of the slots and 16 sequences it waits less than LRU.",
            where="throughput against an expert cache with LRU",
            claimed="1.94 to 2.12 times the throughput",
            metric="wait_25_16",
            judge=Beats(method="predictor", control="lru", by=0.1, relative=True),
            tells=CACHE,
        ),
        Claim(
            key="split",
            text="Two batches of 16 split by predicted paths touch at least 5 % fewer experts than at random.",
            where="token scheduler, Switch-32 to Switch-128",
            claimed="1.03 to 1.17 times the throughput",
            metric="pairs_16",
            judge=Beats(method="predictor", control="random", by=0.05, relative=True),
            tells=PAIRS,
        ),
        Claim(
            key="same_texts",
            text="The engine writes the same texts with a quarter of the experts in memory, foreseen and scheduled.",
            where="real-time correction: outputs never change",
            claimed="identical",
            metric="same_texts",
            judge=Within(arm="predictor", low=1, high=1),
            tells="{predictor.same_texts} of the texts are the same.",
        ),
    ),
    arms=(
        Arm(name="predictor", text="the transformer over token ids"),
        Arm(name="token_table", text="the experts each token id used most", role="control"),
        Arm(name="previous_token", text="what the token before used", role="control"),
        Arm(name="frequency", text="the experts used most", role="control"),
        Arm(name="next_gate", text="the next layer's gate on this layer's input, with LRU", role="control"),
        Arm(name="lru", text="LRU, nothing read ahead", role="control"),
        Arm(name="lfu", text="LFU, nothing read ahead", role="control"),
        Arm(name="static", text="the experts used most stay", role="control"),
        Arm(name="perfect", text="the truth in the predictor's place", role="reference"),
        Arm(name="belady", text="the fewest reads on demand that there can be", role="reference"),
        Arm(name="random", text="split at random", role="control"),
        Arm(name="arrival", text="not split anew: domains in turns, as they came", role="control"),
        Arm(name="cover", text="split by a greedy cover", role="control"),
        Arm(name="loop", text="the K-medoid loop where all splits could be tried", role="control"),
    ),
    run=run,
    methods=("serve.expertflow", "serve.next_gate", "serve.lru", "serve.lfu", "serve.static_hot", "serve.belady"),
    units={
        **{f"recall_{kind}": "share of experts used" for kind in ("in", "cross")},
        **{f"later_{kind}": "share of experts used" for kind in ("in", "cross")},
        "hits_25_16": "share of needs",
        "reads_25_16": "experts a token",
        "wait_25_16": "share of computing",
        "pairs_16": "(layer, expert) pairs",
        "same_texts": "share of texts",
    },
)
