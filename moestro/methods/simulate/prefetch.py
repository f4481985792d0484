"""Reading ahead on a recorded trace: what forecasts hide, and what they read in vain.

Tokens run step by step through all layers. At every mixture its experts are asked for, then the forecast speaks; one
reader reads what is needed first and what is wished for behind it, while the processor computes: ``layer_s`` for a
layer beside its experts, ``expert_s`` for each of them. With r seconds to read an expert (latency + bytes / rate)

    hidden = reading - wait        bound = min(reading, computing)        hidden share = hidden / bound

where ``wait`` is the time in which nothing could be computed. A read that is never needed takes time too, so a forecast
may hide much and still be slower: compare the milliseconds of a token.

Three arms need no method: ``none`` reads on demand, ``repeat`` wishes for what the sequences' previous tokens chose in
the next mixture, ``perfect`` for what the next mixture will need. Forecasts that peek at later gates find what these
said in the file ``peeks``, which `moestro.engine.recorder` writes. In a trace of a pre-gated model of distance d, which
does not say so itself, ``decided=d`` tells forecasts with every mixture what is decided for the d-th behind it.

Source: the metrics catalogue of 2412.14219 (movement: wasted bytes, exposed wait, overlap); 2308.12066 for the time of
a layer with one reader; the arm ``repeat`` after the locality found in 2312.17238.
"""

from collections.abc import Callable
from typing import Any, Final, Literal

import numpy as np
from pydantic import Field

from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.errors import ConfigError
from moestro.core.expert_cache import Learner, Oracle
from moestro.core.forecast import Floats, Forecast, Student, Wish
from moestro.core.inputs import MeterInputs
from moestro.core.plan import MethodUse
from moestro.core.registry import method
from moestro.core.report import Report, Table
from moestro.methods.simulate._parts.arms import Nothing, Perfect, Repeat
from moestro.methods.simulate._parts.machine import Counts, Machine
from moestro.methods.simulate._parts.rows import Rows, rows_of


COLUMNS: Final = ["forecast", "policy", "experts held", "share", "hits", "misses", "on the way", "foreseen", "right",
                  "bytes a token", "wasted a token", "wait (ms)", "bound (ms)", "hidden share",
                  "token (ms)"]  # fmt: skip


class Config(BaseConfig):
    """Settings.

    Attributes:
        forecasts: methods of the stage serve with an entry ``forecast``. policies: who leaves the cache.
        peeks: file with what later gates said, for forecasts that ask. decided: distance of a pre-gated model, else 0.
        budgets: shares of all experts' bytes, or bytes above 1. order: decode (token by token) or recorded (forwards as
        they were). batch: sequences side by side in decode.
        learn: share of the steps that policies and forecasts may learn from; the rest is measured.
        least_right: share of a layer's wishes, of those not in memory, that must have been needed lately, else they are
        not read; the engine takes 0.5.
        expert_bytes: of an expert. disk_bytes_per_s, disk_latency_s: of reading one. expert_s: seconds to compute one
        for a step. layer_s: seconds of a layer beside its experts.
    """

    forecasts: tuple[MethodUse, ...] = ()
    policies: tuple[MethodUse, ...] = (MethodUse(method="serve.lru"),)
    peeks: str | None = None
    decided: int = Field(default=0, ge=0)
    budgets: tuple[float, ...] = (0.1, 0.25, 0.5)
    order: Literal["decode", "recorded"] = "decode"
    batch: int = Field(default=1, ge=1)
    learn: float = Field(default=0.25, ge=0, lt=1)
    least_right: float = Field(default=0.0, ge=0, le=1)
    expert_bytes: int = Field(default=1 << 20, ge=1)
    disk_bytes_per_s: float = Field(default=1e9, gt=0)
    disk_latency_s: float = Field(default=1e-4, ge=0)
    expert_s: float = Field(default=1e-4, ge=0)
    layer_s: float = Field(default=3e-4, ge=0)


def play(forecast: Forecast, policy: Any, rows: Rows, budget: int, config: Config) -> Counts:
    """Every step of the rows through a machine."""
    read_s = config.disk_latency_s + config.expert_bytes / config.disk_bytes_per_s
    machine = Machine(policy, budget, config.expert_bytes, read_s, config.expert_s, config.least_right)
    told = rows.recorded
    running: set[int] = set()
    for part in rows.steps():
        sequences = set(told.sequences[part].tolist())
        for over in running - sequences:
            forecast.forget(over)
        running = sequences
        machine.begin()
        machine.ahead(forecast.begin(told.tokens[part], told.positions[part], told.sequences[part]))
        for place, layer in enumerate(rows.layers):
            machine.compute(config.layer_s)
            wishes: list[Wish] = []
            if config.decided and place + config.decided < len(rows.layers):
                later = rows.layers[place + config.decided]
                wishes += forecast.settled(later, told.routes[later][part])
            wishes += forecast.routed(layer, told.routes[layer][part], peeking(rows, part, layer))
            machine.layer(layer, rows.experts(part, layer), wishes)
    return machine.finish()


def peeking(rows: Rows, part: slice, layer: int) -> Callable[[int], Floats]:
    """What later gates said of some rows' inputs of a layer."""

    def peek(later: int) -> Floats:
        scores = rows.recorded.peeks.get((layer, later))
        if scores is None:
            raise ConfigError(
                f"this forecast asks what the gate of layer {later} says of the input of layer {layer}, and the trace "
                "does not tell; record peeks and name their file with --peeks"
            )
        return scores[part]

    return peek


def budget_bytes(budget: float, rows: Rows, config: Config) -> int:
    """Bytes of a budget.

    Raises:
        ConfigError: less than one expert.
    """
    experts = sum(rows.recorded.experts)
    found = int(budget * experts * config.expert_bytes) if budget <= 1 else int(budget)
    if found < config.expert_bytes:
        raise ConfigError(
            f"budget {budget:g} is {found} bytes, less than one expert of {config.expert_bytes}; all {experts} take "
            f"{experts * config.expert_bytes}"
        )
    return found


def acting(name: str, use: MethodUse, policy: MethodUse, past: Rows, rows: Rows) -> tuple[Forecast, Any]:
    """A forecast and a policy that were told what they ask for; one object where both name one method.

    Raises:
        ConfigError: a method is not of that kind.
    """
    made: Forecast
    if name in BUILT_IN:
        made = Perfect(rows) if name == "perfect" else Repeat() if name == "repeat" else Nothing()
    else:
        found = method(use.method)
        if not hasattr(found.module, "forecast"):
            raise ConfigError(f"forecasts: {use.method} is no forecast")
        made = found.entry("forecast")(found.configure(use.config))
    made.meet(rows.recorded.experts)
    if isinstance(made, Student):
        made.study(past.recorded)
    leaves = getattr(made, "policy", None) if policy.method == use.method else None
    if leaves is None:
        found = method(policy.method)
        if not hasattr(found.module, "policy"):
            raise ConfigError(f"policies: {policy.method} is no serving policy")
        leaves = found.entry("policy")(found.configure(policy.config))
        if isinstance(leaves, Learner):
            leaves.learn(past.needs())
        if isinstance(leaves, Oracle):
            leaves.foresee(rows.needs())
    return made, leaves


BUILT_IN: Final = ("none", "repeat", "perfect")


def label(use: MethodUse) -> str:
    """A method with its settings in one word."""
    settings = ",".join(f"{name}={value}" for name, value in use.config.items())
    return use.method.removeprefix("serve.") + (f"({settings})" if settings else "")


def row(names: list[str], budget: int, found: Counts, rows: Rows, config: Config) -> list[Any]:
    """One row of the table."""
    tokens = len(rows.recorded.tokens)
    whole = sum(rows.recorded.experts) * config.expert_bytes
    return [
        *names,
        budget // config.expert_bytes,
        budget / whole,
        found.hits,
        found.misses,
        found.joined,
        found.foreseen / found.foreseeable if found.foreseeable else 0.0,
        found.foreseen / found.wished if found.wished else 0.0,
        found.bytes / tokens,
        found.wasted / tokens,
        1e3 * found.wait / tokens,
        1e3 * found.hideable / tokens,
        found.hidden / found.hideable if found.hideable else 1.0,
        1e3 * (found.computing + found.wait) / tokens,
    ]


def curves(report: Report) -> dict[str, Any]:
    """What to draw of a report: time of a token of every forecast by the share of experts held."""
    series: dict[str, list[tuple[Any, Any]]] = {}
    for cells in report.tables["forecasts"].rows:
        series.setdefault(f"{cells[0]}, {cells[1]}", []).append((cells[3], cells[-1]))
    return {"x": "share of all experts in the cache", "y": "milliseconds of a token", "series": series}


def measure(subject: MeterInputs, config: Config) -> Report:
    """Play the trace.

    Raises:
        ConfigError: a budget below one expert, a trace too short to measure anything behind what is learned, or to
            decide anything ahead in, peeks that were not recorded.
    """
    past, rows = rows_of(subject.trace, config.order, config.batch, config.peeks).split(config.learn)
    if not len(rows.recorded.tokens):
        raise ConfigError(f"learn={config.learn} leaves none of {len(past.starts) - 1} steps to measure; record more")
    if config.decided >= max(len(rows.layers), 1):
        raise ConfigError(f"decided={config.decided} in a trace of {len(rows.layers)} mixtures decides none ahead")
    arms = {name: MethodUse(method=name) for name in BUILT_IN} | {label(use): use for use in config.forecasts}
    table, numbers = [], {}
    for budget in sorted({budget_bytes(budget, rows, config) for budget in config.budgets}):
        held = budget // config.expert_bytes
        for policy in config.policies:
            for name, use in arms.items():
                found = play(*acting(name, use, policy, past, rows), rows, budget, config)
                table.append(row([name, label(policy)], budget, found, rows, config))
                if policy == config.policies[0]:
                    numbers[f"hidden_share_{name}_at_{held}"] = table[-1][-2]
                    numbers[f"token_ms_{name}_at_{held}"] = table[-1][-1]
    return Report(
        method="simulate.prefetch",
        config=config.model_dump(mode="json"),
        subject=subject.name,
        numbers=numbers,
        tables={"forecasts": Table(columns=COLUMNS, rows=table)},
        notes={
            "tokens": len(rows.recorded.tokens),
            "steps": len(rows.starts) - 1,
            "learned_steps": len(past.starts) - 1,
            "experts": int(np.sum(rows.recorded.experts)),
            "foreseen": "of what layers with a wish needed, the share that was wished for; right: of wishes, the share",
        },
    )


CARD = MethodCard(
    title="A Survey on Inference Optimization Techniques for Mixture of Experts Models",
    year=2024,
    arxiv="2412.14219",
    paper="survey-inference",
    summary="What forecasts hide of the reading and what they read in vain, on a recorded trace and a machine's times.",
    taxonomy="inference/system/offloading/prefetching",
    needs=("trace",),
)
