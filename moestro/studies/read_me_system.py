"""Read-ME, serving: if token ids say which expert every waiting token takes, what do a cache and a batcher gain by it?

Two kinds of traces: made-up ones in which a token keeps the expert before it with probability 0.7, and those of a real
pre-gating router on text of four domains. A cache of experts sees the tokens of interleaved requests one by one; a
batcher sees requests that are read and then written, many at a time.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moestro.core.expert_cache import ExpertCache, Key, run_step
from moestro.core.registry import method
from moestro.studies._framework import BUDGETS, Arm, Beats, Budget, Claim, Matches, NotWorse, Study, Within
from moestro.studies._kinds import DOMAINS, ids_of
from moestro.studies._serving import WINDOW, Random, Request, interleaved, known, serve
from moestro.studies.read_me_model import made


EXPERTS, KEEP = 8, 0.7
CAPACITIES = {"sticky": (2, 3, 4, 5), "router": (1, 2, 3)}
LOAD = 0.85
"""Tokens that arrive, of those that batches in order of arrival could run."""


# -- traces -----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def sticky(seed: int, name: str) -> tuple[Request, ...]:
    """Made-up requests; a new expert is drawn from all, so that a token keeps its own more often than KEEP."""
    budget, draw = BUDGETS[name], np.random.default_rng(seed)
    count, length = budget.pick(ci=24, micro=48, full=128), budget.pick(ci=24, micro=48, full=96)
    found = []
    for _ in range(count):
        experts, keeps = draw.integers(EXPERTS, size=length), draw.random(length) < KEEP
        for at in range(1, length):
            experts[at] = experts[at - 1] if keeps[at] else experts[at]
        found.append(Request(experts.astype(np.int32), length * 2 // 3))
    return tuple(found)


@functools.lru_cache(maxsize=2)
def routed(seed: int, name: str) -> tuple[Request, ...]:
    """Requests of held-out text, in random order, by the router of the model that ``read_me_model`` cuts."""
    budget, cut = BUDGETS[name], made(seed, name)
    each, length = budget.pick(ci=4, micro=12, full=16), budget.pick(ci=12, micro=24, full=48)
    ahead, found = method("train.read_me").module.route_ahead, []
    for domain in DOMAINS:
        flat = ids_of(domain, "heldout", name).flatten()
        ids_BS = flat[: len(flat) // length * length].view(-1, length)[:each]
        experts = next(iter(ahead(cut.model, {"input_ids": ids_BS}).values())).expert_N.view(ids_BS.shape)
        found += [Request(row.numpy().astype(np.int32), length * 2 // 3) for row in experts]
    order = np.random.default_rng(seed).permutation(len(found))
    return tuple(found[place] for place in order)


def traces(seed: int, name: str) -> dict[str, tuple[Request, ...]]:
    """By kind."""
    return {"sticky": sticky(seed, name), "router": routed(seed, name)}


# -- measuring
POLICIES = ("belady", "queue", "next_token", "lru", "lfu", "lfru", "random")


def misses(arm: str, requests: Sequence[Request], capacity: int, seed: int) -> tuple[int, int]:
    """Misses and accesses of a policy."""
    order = interleaved(requests)
    keys: list[list[Key]] = [[(0, int(requests[request].experts[place]))] for request, place in order]
    partly = arm in ("queue", "next_token")
    policy: Any = Random(seed)
    if arm != "random":
        found = method("serve.read_me_belady" if partly else f"serve.{arm}")
        policy = found.entry("policy")(found.configure({"lookahead": WINDOW} if partly else {}))
    if arm == "belady":
        policy.foresee(keys)
    cache, missed = ExpertCache(policy, capacity), 0
    for at, step in enumerate(keys):
        if partly:
            policy.foresee(known(requests, order, at, prompts=arm == "queue"), at)
        missed += run_step(cache, step, 1)
    return missed, len(keys)


@functools.lru_cache(maxsize=64)
def cached(arm: str, seed: int, name: str) -> Mapping[str, float]:
    """Hit ratios by trace and capacity, and reads summed over capacities."""
    found: dict[str, float] = {}
    for kind, requests in traces(seed, name).items():
        counts = {size: misses(arm, requests, size, seed) for size in CAPACITIES[kind]}
        found |= {f"{kind}_hit_{size}": 1 - missed / total for size, (missed, total) in counts.items()}
        found[f"{kind}_reads"] = float(sum(missed for missed, _ in counts.values()))
    return found


def margin(seed: int, name: str) -> float:
    """The least by which Belady's hit ratio is above another policy's, over traces and capacities."""
    bound = cached("belady", seed, name)
    others = [cached(arm, seed, name) for arm in POLICIES if arm != "belady"]
    return min(bound[key] - other[key] for other in others for key in bound if "_hit_" in key)


def batched(arm: str, seed: int, name: str) -> dict[str, float]:
    """Experts of full batches with all requests waiting, and latencies with requests that come at random."""
    budget, found = BUDGETS[name], dict[str, float]()
    rows = budget.pick(ci=8, micro=16, full=32)
    for kind, requests in traces(seed, name).items():
        at_once = [0.0] * len(requests)
        plain = serve("fifo", requests, at_once, rows, 1.0)
        max_wait = 8 * plain.seconds / len(plain.tokens)
        full = serve(arm, requests, at_once, rows, max_wait)
        draw = np.random.default_rng([seed, 1])
        gaps = draw.exponential(plain.seconds / LOAD / len(requests), len(requests))
        open_ = serve(arm, requests, np.cumsum(gaps).tolist(), rows, max_wait)
        found |= {
            f"{kind}_unique": float(np.mean(full.unique)),
            f"{kind}_batch_tokens": float(np.mean(full.tokens)),
            f"{kind}_seconds": full.seconds,
            f"{kind}_load_experts": float(np.mean(open_.experts)),
            f"{kind}_load_tokens": float(np.mean(open_.tokens)),
            f"{kind}_latency": float(np.mean(open_.latencies)),
            f"{kind}_latency_p95": float(np.percentile(open_.latencies, 95)),
            f"{kind}_max_wait": max(full.waits),
            f"{kind}_max_wait_allowed": max_wait,
            f"{kind}_batches_beyond": float(max(full.beyond, open_.beyond)),
        }
    return found


def run(arm: str, seed: int, budget: Budget) -> Mapping[str, float]:
    """Measure one arm."""
    if arm not in POLICIES:
        return batched(arm, seed, budget.name)
    scores = dict(cached(arm, seed, budget.name))
    if arm == "belady":
        stays = [float((r.experts[1:] == r.experts[:-1]).mean()) for r in routed(seed, budget.name)]
        load = np.bincount(np.concatenate([r.experts for r in routed(seed, budget.name)]), minlength=len(DOMAINS))
        scores |= {"worst_margin": margin(seed, budget.name), "router_stays": float(np.mean(stays))}
        scores["router_top_load"] = float(load.max() / load.sum())
    return scores


HITS = (
    "Hit ratios at 2, 3, 4 of 8 experts: Belady {belady.sticky_hit_2}, {belady.sticky_hit_3}, {belady.sticky_hit_4}; "
    "LRU {lru.sticky_hit_2}, {lru.sticky_hit_3}, {lru.sticky_hit_4}; random {random.sticky_hit_2}, "
    "{random.sticky_hit_3}, {random.sticky_hit_4}; LFU {lfu.sticky_hit_2}, {lfu.sticky_hit_3}, {lfu.sticky_hit_4}. "
)
REAL = (
    "By the real router, at 2 of 4 experts: Belady {belady.router_hit_2}, queue {queue.router_hit_2}, LRU "
    "{lru.router_hit_2}, random {random.router_hit_2}; it keeps the expert for {belady.router_stays} of the tokens and "
    "gives one expert {belady.router_top_load} of them. "
)
KNOWN = (
    "Reads: Belady {belady.sticky_reads} and {belady.router_reads} (router), the queue {queue.sticky_reads} and "
    "{queue.router_reads}, one next token a request {next_token.sticky_reads} and {next_token.router_reads}, LRU "
    "{lru.sticky_reads} and {lru.router_reads}. "
)
UNIQUE = (
    "Experts of a full batch: in order {fifo.sticky_unique} and {fifo.router_unique} (router), decode first "
    "{decode_first.sticky_unique} and {decode_first.router_unique}, prefill first {prefill_first.sticky_unique} and "
    "{prefill_first.router_unique}, by expert {expert_aware.sticky_unique} and {expert_aware.router_unique}, with a "
    "bound on waiting {expert_wait.sticky_unique} and {expert_wait.router_unique}. "
)
WAITS = (
    "Longest wait for a batch, all requests there at once: in order {fifo.sticky_max_wait} s, decode first "
    "{decode_first.sticky_max_wait}, prefill first {prefill_first.sticky_max_wait}, by expert "
    "{expert_aware.sticky_max_wait}, with a bound of {expert_wait.sticky_max_wait_allowed} s "
    "{expert_wait.sticky_max_wait}. "
)
LATE = (
    "Mean latency: in order {fifo.sticky_latency} s, decode first {decode_first.sticky_latency}, prefill first "
    "{prefill_first.sticky_latency}, by expert {expert_aware.sticky_latency}, with a bound "
    "{expert_wait.sticky_latency}. Under this load a batch has {decode_first.sticky_load_tokens} tokens and "
    "{decode_first.sticky_load_experts} experts with next tokens first, {expert_aware.sticky_load_tokens} and "
    "{expert_aware.sticky_load_experts} by expert: whoever is left behind waits for what others save. All requests "
    "at once take {decode_first.sticky_seconds} s with next tokens first, {expert_aware.sticky_seconds} s by expert. "
)


def _over_lru(size: int, claimed: str) -> Claim:
    return Claim(
        key=f"belady_{size}",
        text=f"With {size} of 8 experts in the cache, Belady's rule hits at least 5 points more than LRU.",
        where="cache hit ratio of batched requests",
        claimed=claimed,
        metric=f"sticky_hit_{size}",
        judge=Beats(method="belady", control="lru", better="higher", by=0.05),
        tells=HITS,
    )


STUDY = Study(
    paper="read-me",
    part="system",
    title="A cache and a batcher that know the queue's experts",
    setting=(
        "Made-up traces: 128 requests of 96 tokens over 8 experts, each token keeps the expert before it with "
        "probability 0.7 or draws one. Router traces: 64 held-out texts of 48 tokens by a router for the 4 domains of "
        "SmolLM2-135M-Instruct's cut, of width 64. The first two thirds of a request are its prompt. The cache sees 16 "
        "interleaved requests token by token. Batches have 32 rows, as many requests run at once; a batch takes "
        "0.3 ms, 0.1 ms for each expert that it reads and 0.01 ms for each token, and requests come at 0.85 of what "
        "batches in order of arrival could run. A prompt's tokens run in order. The paper measures Read-ME's own "
        "Llama-2 mixture on an A100 and batches of 57 tokens."
    ),
    claims=(
        Claim(
            key="bound",
            text="No policy hits more than Belady's rule, on any trace at any capacity.",
            where="section 4, the cache",
            claimed="highest of all at every capacity",
            metric="worst_margin",
            judge=Within(arm="belady", low=0.0),
            tells=HITS + REAL,
        ),
        _over_lru(2, "44.16 against 33.90 %"),
        _over_lru(3, "61.82 against 52.42 %"),
        _over_lru(4, "77.21 against 66.95 %"),
        Claim(
            key="belady_router",
            text="By the real router, with 2 of 4 experts in the cache, Belady's rule hits 5 points more than LRU.",
            where="cache hit ratio of batched requests",
            claimed="10 points at half of the experts",
            metric="router_hit_2",
            judge=Beats(method="belady", control="lru", better="higher", by=0.05),
            tells=REAL,
        ),
        Claim(
            key="lru_is_random",
            text="On interleaved requests LRU is within 5 points of evicting at random.",
            where="cache hit ratio of batched requests, capacity 3",
            claimed="52.42 against 50.14 %",
            metric="sticky_hit_3",
            judge=Matches(method="lru", other="random", tolerance=0.05),
            tells=HITS,
        ),
        Claim(
            key="known_future",
            text="Knowing the queue's prompts and one token of each running request reads at most 1.10 of what Belady "
            "reads.",
            where="section 4: pre-gating makes Belady's rule possible",
            claimed="equated with it",
            metric="sticky_reads",
            judge=NotWorse(method="queue", control="belady", tolerance=0.10, relative=True),
            tells=KNOWN,
        ),
        Claim(
            key="known_future_router",
            text="The same on the real router's traces.",
            where="section 4: pre-gating makes Belady's rule possible",
            claimed="equated with it",
            metric="router_reads",
            judge=NotWorse(method="queue", control="belady", tolerance=0.10, relative=True),
            tells=KNOWN + REAL,
        ),
        Claim(
            key="unique",
            text="Batches by expert need at least a fifth fewer experts than batches in order, at equal tokens.",
            where="unique experts per batch",
            claimed="3.51 against 5.08 (decode first) and 5.21 (prefill first)",
            metric="sticky_unique",
            judge=Beats(method="expert_aware", control="fifo", by=0.20, relative=True),
            tells=UNIQUE,
        ),
        Claim(
            key="unique_router",
            text="The same on the real router's traces.",
            where="unique experts per batch",
            claimed="3.51 against 5.08 (decode first) and 5.21 (prefill first)",
            metric="router_unique",
            judge=Beats(method="expert_aware", control="fifo", by=0.20, relative=True),
            tells=UNIQUE + REAL,
        ),
        Claim(
            key="unique_prefill",
            text="Also against prompts first, the better of the two usual orders, a fifth fewer experts.",
            where="unique experts per batch",
            claimed="3.51 against 5.21",
            metric="sticky_unique",
            judge=Beats(method="expert_aware", control="prefill_first", by=0.20, relative=True),
            tells=UNIQUE,
        ),
        Claim(
            key="latency",
            text="Mean latency under load is at least 5 % lower than with next tokens first.",
            where="mean end-to-end latency",
            claimed="5.0 to 6.1 % lower",
            metric="sticky_latency",
            judge=Beats(method="expert_aware", control="decode_first", by=0.05, relative=True),
            tells=LATE + UNIQUE,
        ),
        Claim(
            key="latency_p95",
            text="So is the 95th percentile, by at least 9 %.",
            where="p95 latency",
            claimed="9.5 to 10.0 % lower",
            metric="sticky_latency_p95",
            judge=Beats(method="expert_aware", control="decode_first", by=0.09, relative=True),
            tells="95th percentile: decode first {decode_first.sticky_latency_p95} s, by expert "
            "{expert_aware.sticky_latency_p95}, with a bound {expert_wait.sticky_latency_p95}. " + LATE + WAITS,
        ),
        Claim(
            key="bounded",
            text="With a bound on waiting, whoever has waited for it runs in the next batch.",
            where="not in the paper, which gives no waiting times",
            claimed="not measured",
            metric="sticky_batches_beyond",
            judge=Within(arm="expert_wait", high=0.0),
            tells=WAITS,
        ),
        Claim(
            key="still_unique",
            text="The bound leaves a fifth fewer experts than batches in order.",
            where="not in the paper",
            claimed="not measured",
            metric="sticky_unique",
            judge=Beats(method="expert_wait", control="fifo", by=0.20, relative=True),
            tells=UNIQUE + WAITS,
        ),
    ),
    arms=(
        Arm(name="belady", text="cache: Belady's rule on the whole trace", role="reference"),
        Arm(name="queue", text="cache: Belady's rule on queued prompts and one next token of each running request"),
        Arm(name="next_token", text="cache: Belady's rule on one next token of each running request"),
        Arm(name="lru", text="cache: least recently used", role="control"),
        Arm(name="lfu", text="cache: least frequently used", role="control"),
        Arm(name="lfru", text="cache: least frequent recently used", role="control"),
        Arm(name="random", text="cache: anybody goes", role="control"),
        Arm(name="fifo", text="batches: requests in order", role="control"),
        Arm(name="decode_first", text="batches: next tokens, then prompts in order", role="control"),
        Arm(name="prefill_first", text="batches: prompts in order, then next tokens", role="control"),
        Arm(name="expert_aware", text="batches: the expert with the longest queue first"),
        Arm(name="expert_wait", text="batches: the same, but whoever waited for 8 mean batches goes first"),
    ),
    run=run,
    methods=(
        "convert.read_me",
        "train.read_me",
        "serve.belady",
        "serve.read_me_belady",
        "serve.read_me_batching",
        "serve.lru",
        "serve.lfu",
        "serve.lfru",
    ),
    units={
        **{f"{kind}_hit_{size}": "hits an access" for kind, sizes in CAPACITIES.items() for size in sizes},
        **{f"{kind}_reads": "experts read, summed over capacities" for kind in CAPACITIES},
        **{f"{kind}_unique": "experts a full batch" for kind in CAPACITIES},
        **{f"{kind}_{name}_tokens": "tokens a batch" for kind in CAPACITIES for name in ("batch", "load")},
        **{f"{kind}_load_experts": "experts a batch" for kind in CAPACITIES},
        **{
            f"{kind}_{name}": "s"
            for kind in CAPACITIES
            for name in ("seconds", "latency", "latency_p95", "max_wait", "max_wait_allowed")
        },
        **{f"{kind}_batches_beyond": "batches" for kind in CAPACITIES},
        "worst_margin": "hits an access",
        "router_stays": "share of tokens",
        "router_top_load": "share of tokens",
    },
)
