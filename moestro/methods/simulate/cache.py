"""A cache of experts on a recorded trace: what every policy reads under every budget, against Belady's bound.

Every layer of every token is a step that needs a set of experts. Hits are computed at once while misses are read one
after the other; with r seconds to read an expert and c to compute it, a step with h hits and misses 1 .. m takes

    f_0 = h c,   f_i = max(f_(i-1), i r) + c,   wait = f_m - (h + m) c,     r = latency + bytes / rate

so that ``wait`` is the reading that nothing hides. Nothing is read ahead. All policies start with an empty cache
behind the first ``learn`` share of the tokens, which only those that learn from a past are shown.

Source: the metrics catalogue of 2412.14219; the bound of Belady 1966. Hit ratios are of expert accesses, each expert
of a step counted once.
"""

from collections.abc import Sequence
from typing import Any, Final, Literal

from pydantic import Field

from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.errors import ConfigError
from moestro.core.expert_cache import ExpertCache, Key, Learner, Oracle, run_step
from moestro.core.inputs import MeterInputs
from moestro.core.plan import MethodUse, ServingPlan
from moestro.core.registry import method
from moestro.core.report import Report, Table
from moestro.methods.simulate._parts.steps import Steps, steps_of


BOUND: Final = "serve.belady"
COLUMNS: Final = ["policy", "experts held", "share", "hits", "misses", "hit ratio", "bytes a token", "of bound",
                  "wait a token (ms)", "wait share"]  # fmt: skip


class Config(BaseConfig):
    """Settings.

    Attributes:
        policies: methods of the stage serve; the bound is added. budgets: shares of all experts' bytes, or bytes above
        1. order: decode (token by token) or recorded (forwards as they were). batch: sequences side by side in decode.
        learn: share of the tokens that policies may learn from; the rest is measured.
        plan: file of a serving plan: its policy, its share of the experts, in place of policies and budgets.
        expert_bytes: of an expert. disk_bytes_per_s, disk_latency_s: of reading one. expert_s: seconds to compute one
            for a step. layer_s: seconds of a layer beside its experts.
    """

    policies: tuple[MethodUse, ...] = (
        MethodUse(method="serve.lru"),
        MethodUse(method="serve.lfu"),
        MethodUse(method="serve.lfru"),
        MethodUse(method="serve.static_hot"),
        MethodUse(method="serve.next_need"),
    )
    budgets: tuple[float, ...] = (0.1, 0.25, 0.5)
    order: Literal["decode", "recorded"] = "decode"
    batch: int = Field(default=1, ge=1)
    learn: float = Field(default=0.25, ge=0, lt=1)
    plan: str | None = None
    expert_bytes: int = Field(default=1 << 20, ge=1)
    disk_bytes_per_s: float = Field(default=1e9, gt=0)
    disk_latency_s: float = Field(default=1e-4, ge=0)
    expert_s: float = Field(default=1e-4, ge=0)
    layer_s: float = Field(default=3e-4, ge=0)


def waiting(hits: int, misses: int, read_s: float, expert_s: float) -> float:
    """Seconds of a step in which nothing is computed, see the top of the file."""
    done = hits * expert_s
    for number in range(1, misses + 1):
        done = max(done, number * read_s) + expert_s
    return done - (hits + misses) * expert_s


def play(policy: Any, steps: Steps, budget: int, config: Config) -> dict[str, float]:
    """Accesses, misses and waiting of one policy under one budget."""
    cache = ExpertCache(policy, budget)
    read_s = config.disk_latency_s + config.expert_bytes / config.disk_bytes_per_s
    accesses = misses = 0
    wait = busy = 0.0
    for keys in steps.keys:
        missed = run_step(cache, keys, config.expert_bytes)
        accesses += len(keys)
        misses += missed
        wait += waiting(len(keys) - missed, missed, read_s, config.expert_s)
        busy += config.layer_s + len(keys) * config.expert_s
    return {"accesses": accesses, "misses": misses, "wait": wait, "busy": busy}


def budget_bytes(budget: float, steps: Steps, config: Config) -> int:
    """Bytes of a budget.

    Raises:
        ConfigError: less than one expert.
    """
    whole = steps.experts * config.expert_bytes
    found = int(budget * whole) if budget <= 1 else int(budget)
    if found < config.expert_bytes:
        raise ConfigError(
            f"budget {budget:g} is {found} bytes, less than one expert of {config.expert_bytes}; all {steps.experts} "
            f"take {whole}"
        )
    return found


def made(use: MethodUse, past: Sequence[Sequence[Key]], future: Steps) -> Any:
    """A policy that was told what it asks for.

    Raises:
        ConfigError: the method is no policy.
    """
    found = method(use.method)
    if not hasattr(found.module, "policy"):
        raise ConfigError(f"policies: {use.method} is no serving policy")
    policy = found.entry("policy")(found.configure(use.config))
    if isinstance(policy, Learner):
        policy.learn(past)
    if isinstance(policy, Oracle):
        policy.foresee(future.keys)
    return policy


def label(use: MethodUse) -> str:
    """A policy with its settings in one word."""
    settings = ",".join(f"{name}={value}" for name, value in use.config.items())
    return use.method.removeprefix("serve.") + (f"({settings})" if settings else "")


def row(name: str, budget: int, found: dict[str, float], bound: dict[str, float], steps: Steps, config: Config) -> Any:
    """One row of the table."""
    accesses, misses, wait = found["accesses"], found["misses"], found["wait"]
    return [
        name,
        budget // config.expert_bytes,
        budget / (steps.experts * config.expert_bytes),
        int(accesses - misses),
        int(misses),
        1 - misses / accesses,
        misses * config.expert_bytes / steps.num_tokens,
        misses / bound["misses"] if bound["misses"] else 1.0,
        1e3 * wait / steps.num_tokens,
        wait / (wait + found["busy"]) if wait + found["busy"] else 0.0,
    ]


def curves(report: Report) -> dict[str, Any]:
    """What to draw of a report: the hit ratio of every policy by the share of experts held."""
    rows = report.tables["policies"].rows
    series: dict[str, list[tuple[Any, Any]]] = {}
    for cells in rows:
        series.setdefault(str(cells[0]), []).append((cells[2], cells[5]))
    return {"x": "share of all experts in the cache", "y": "hit ratio", "series": series}


def planned(config: Config, plan: ServingPlan) -> Config:
    """The settings by which a plan is played."""
    policy = plan.policy or MethodUse(method="serve.lru")
    return config.model_copy(update={"policies": (policy,), "budgets": (plan.expert_share,)})


def measure(subject: MeterInputs, config: Config) -> Report:
    """Play the trace.

    Raises:
        ConfigError: a budget below one expert, a trace too short to measure anything behind what is learned.
        PlanError: the plan cannot be read.
    """
    if config.plan is not None:
        config = planned(config, ServingPlan.load(config.plan))
    steps = steps_of(subject.trace, config.order, config.batch)
    past, rest = steps.split(config.learn)
    if not rest.keys:
        raise ConfigError(f"learn={config.learn} leaves none of {steps.num_tokens} tokens to measure; record more")
    sizes = [budget_bytes(budget, rest, config) for budget in config.budgets]
    uses = [use for use in config.policies if use.method != BOUND]
    rows, numbers = [], {}
    for size in sorted(set(sizes)):
        bound = play(made(MethodUse(method=BOUND), past, rest), rest, size, config)
        held = size // config.expert_bytes
        best = None
        for use in uses:
            found = play(made(use, past, rest), rest, size, config)
            rows.append(row(label(use), size, found, bound, rest, config))
            best = found["misses"] if best is None else min(best, found["misses"])
        rows.append(row("belady", size, bound, bound, rest, config))
        numbers[f"bound_hit_ratio_at_{held}"] = 1 - bound["misses"] / bound["accesses"]
        if best is not None and bound["misses"]:
            numbers[f"best_of_bound_at_{held}"] = best / bound["misses"]
    different = len({key for keys in rest.keys for key in keys})
    notes = {
        "tokens": rest.num_tokens,
        "learned_steps": len(past),
        "steps": len(rest.keys),
        "experts": rest.experts,
        "experts_met": different,
        "largest_step": max(map(len, rest.keys)),
        "waves": "where a step needs more than the budget holds, its experts come in waves and the bound is no bound",
    }
    return Report(
        method="simulate.cache",
        config=config.model_dump(mode="json"),
        subject=subject.name,
        numbers=numbers,
        tables={"policies": Table(columns=COLUMNS, rows=rows)},
        notes=notes,
    )


CARD = MethodCard(
    title="A Survey on Inference Optimization Techniques for Mixture of Experts Models",
    year=2024,
    arxiv="2412.14219",
    paper="survey-inference",
    summary="Hit ratio, bytes and waiting of every cache policy on a trace, against Belady's bound.",
    taxonomy="inference/system/offloading/caching",
    needs=("trace",),
)
