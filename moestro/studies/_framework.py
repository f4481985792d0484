"""What a study is: claims, arms, budgets, and the rules that turn measurements into a verdict.

A study declares, before anything runs, what the paper claims and where, which arms are measured (at least one of them
a control that could refute the claim), and the rule with its threshold. `run(arm, seed, budget)` measures one arm with
one seed and returns named numbers; everything else (seeding, resuming, statistics, recording) is shared.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar

import numpy as np

from moestro.core.errors import ConfigError


__all__ = [
    "BUDGETS", "Arm", "Beats", "Budget", "Claim", "Interval", "Judge", "Judgement", "Matches", "Measured",
    "NotWorse", "Recovers", "Study", "Verdict", "Within", "interval", "merge",
]  # fmt: skip

Verdict = Literal["shown", "partly", "not_shown"]
Interval = tuple[float, float]
CONFIDENCE = 0.95
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long a study may take. `ci` and `micro` bound all arms and seeds together; `full` bounds one seed, all arms.

    `seeds` is how many seeds run unless told otherwise.
    """

    name: Literal["ci", "micro", "full"]
    seconds: float
    seeds: int

    def pick(self, *, ci: T, micro: T, full: T) -> T:
        """The value for this budget: `steps = budget.pick(ci=5, micro=100, full=4000)`."""
        return {"ci": ci, "micro": micro, "full": full}[self.name]


BUDGETS = {
    "ci": Budget(name="ci", seconds=8, seeds=1),
    "micro": Budget(name="micro", seconds=60, seeds=2),
    "full": Budget(name="full", seconds=900, seeds=5),
}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One thing that is measured. A control is what the claim says the method is better than, or equal to."""

    name: str
    text: str
    role: Literal["method", "control", "reference"] = "method"


class Measured:
    """The numbers of all arms: `values[arm][metric][seed]`."""

    def __init__(self, values: Mapping[str, Mapping[str, Mapping[int, float]]]) -> None:
        self.values = values

    def of(self, arm: str, metric: str) -> dict[int, float]:
        """Seed to number.

        Raises:
            ConfigError: the study's `run` returned no such number for that arm.
        """
        metrics = self.values.get(arm, {})
        if metric not in metrics:
            known = ", ".join(sorted(metrics)) or "nothing"
            raise ConfigError(f"study: arm {arm!r} did not measure {metric!r}; it measured {known}")
        return dict(sorted(metrics[metric].items()))

    def paired(self, first: str, second: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of two arms for the seeds that both have, in order of seed."""
        one, two = self.of(first, metric), self.of(second, metric)
        seeds = [seed for seed in one if seed in two]
        return np.array([one[seed] for seed in seeds]), np.array([two[seed] for seed in seeds])


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """A verdict with the number it rests on. `interval` is None when one seed cannot give one."""

    verdict: Verdict
    measured: float
    interval: Interval | None
    note: str


class Judge(Protocol):
    """A rule fixed before measuring."""

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms it looks at."""
        ...

    @property
    def rule(self) -> str:
        """The rule in words, for the record."""
        ...

    def __call__(self, measured: Measured, metric: str) -> Judgement: ...


def interval(values: Sequence[float] | np.ndarray, confidence: float = CONFIDENCE) -> Interval | None:
    """Student's t interval of the mean, two-sided; None below two values."""
    sample = np.asarray(values, dtype=float)
    if sample.size < 2:
        return None
    from scipy.stats import t

    half = t.ppf((1 + confidence) / 2, sample.size - 1) * sample.std(ddof=1) / math.sqrt(sample.size)
    return float(sample.mean() - half), float(sample.mean() + half)


def _difference(measured: Measured, method: str, control: str, metric: str, relative: bool) -> np.ndarray:
    """method - control, seed by seed; of |control| when ``relative``."""
    ours, theirs = measured.paired(method, control, metric)
    return (ours - theirs) / np.maximum(np.abs(theirs), np.finfo(float).tiny) if relative else ours - theirs


@dataclass(frozen=True, kw_only=True)
class Beats:
    """`method` is better than `control` by at least `by`, seed by seed.

    The effect of a seed is control - method where lower is better (method - control otherwise), divided by |control|
    when `relative`. Shown: the mean effect reaches `by` and the 95 % interval of the mean lies above zero. Partly:
    the mean effect is above zero but one of the two fails. One seed has no interval, so it shows nothing fully.
    """

    method: str
    control: str
    better: Literal["lower", "higher"] = "lower"
    by: float = 0.0
    relative: bool = False

    @property
    def arms(self) -> tuple[str, ...]:
        return (self.method, self.control)

    @property
    def rule(self) -> str:
        unit = f"{self.by:.3g} of the control" if self.relative else f"{self.by:.3g}"
        return f"{self.method} {self.better} than {self.control} by at least {unit}, 95 % interval above zero"

    def __call__(self, measured: Measured, metric: str) -> Judgement:
        effect = _difference(measured, self.method, self.control, metric, self.relative)
        effect = -effect if self.better == "lower" else effect
        mean, between = float(effect.mean()), interval(effect)
        if mean > 0 and mean >= self.by and between is not None and between[0] > 0:
            verdict: Verdict = "shown"
        else:
            verdict = "partly" if mean > 0 else "not_shown"
        note = f"mean effect {mean:.4g} over {effect.size} seeds, needed {self.by:.4g}"
        return Judgement(verdict=verdict, measured=mean, interval=between, note=note)


@dataclass(frozen=True, kw_only=True)
class Matches:
    """`method` equals `other` within `tolerance` (of |other| when `relative`).

    Shown: the 95 % interval of the mean difference lies within the tolerance. Partly: only the mean does.
    """

    method: str
    other: str
    tolerance: float
    relative: bool = False

    @property
    def arms(self) -> tuple[str, ...]:
        return (self.method, self.other)

    @property
    def rule(self) -> str:
        unit = f" of {self.other}" if self.relative else ""
        return f"{self.method} within {self.tolerance:.3g}{unit} of {self.other}, with its whole 95 % interval"

    def __call__(self, measured: Measured, metric: str) -> Judgement:
        gap = _difference(measured, self.method, self.other, metric, self.relative)
        mean, between = float(gap.mean()), interval(gap)
        if between is not None and max(abs(between[0]), abs(between[1])) <= self.tolerance:
            verdict: Verdict = "shown"
        else:
            verdict = "partly" if abs(mean) <= self.tolerance else "not_shown"
        note = f"mean difference {mean:.4g} over {gap.size} seeds, tolerance {self.tolerance:.4g}"
        return Judgement(verdict=verdict, measured=mean, interval=between, note=note)


@dataclass(frozen=True, kw_only=True)
class NotWorse:
    """`method` is at most `tolerance` worse than `control` (of |control| when `relative`); being better is welcome.

    Shown: the worse end of the 95 % interval of the mean gap stays within the tolerance. Partly: only the mean does.
    """

    method: str
    control: str
    tolerance: float
    better: Literal["lower", "higher"] = "lower"
    relative: bool = False

    @property
    def arms(self) -> tuple[str, ...]:
        return (self.method, self.control)

    @property
    def rule(self) -> str:
        unit = f"{self.tolerance:.3g} of {self.control}" if self.relative else f"{self.tolerance:.3g}"
        return f"{self.method} at most {unit} worse than {self.control} ({self.better} is better), whole 95 % interval"

    def __call__(self, measured: Measured, metric: str) -> Judgement:
        worse = _difference(measured, self.method, self.control, metric, self.relative)
        worse = worse if self.better == "lower" else -worse
        mean, between = float(worse.mean()), interval(worse)
        if between is not None and between[1] <= self.tolerance:
            verdict: Verdict = "shown"
        else:
            verdict = "partly" if mean <= self.tolerance else "not_shown"
        note = f"mean {mean:.4g} worse over {worse.size} seeds, allowed {self.tolerance:.4g}"
        return Judgement(verdict=verdict, measured=mean, interval=between, note=note)


@dataclass(frozen=True, kw_only=True)
class Within:
    """Every seed of `arm` lies in [low, high]. Shown: all of them; partly: some."""

    arm: str
    low: float = -math.inf
    high: float = math.inf

    @property
    def arms(self) -> tuple[str, ...]:
        return (self.arm,)

    @property
    def rule(self) -> str:
        return f"every seed of {self.arm} within [{self.low:.4g}, {self.high:.4g}]"

    def __call__(self, measured: Measured, metric: str) -> Judgement:
        values = np.array(list(measured.of(self.arm, metric).values()))
        inside = int(((values >= self.low) & (values <= self.high)).sum())
        verdict: Verdict = "shown" if inside == values.size else "partly" if inside else "not_shown"
        note = f"{inside} of {values.size} seeds inside"
        return Judgement(verdict=verdict, measured=float(values.mean()), interval=interval(values), note=note)


@dataclass(frozen=True, kw_only=True)
class Recovers:
    """`method` brings back more than `share` of what `cut` loses against `whole`; lower is better.

    With loss L = cut - whole and gain G = cut - method by seed. Shown: the 95 % intervals of L and of G - share * L lie
    above zero. Partly: those of L and of G do. Where nothing is lost, nothing can be brought back.
    """

    method: str
    cut: str
    whole: str
    share: float

    @property
    def arms(self) -> tuple[str, ...]:
        return (self.method, self.cut, self.whole)

    @property
    def rule(self) -> str:
        return (
            f"{self.method} recovers more than {self.share:g} of what {self.cut} loses against {self.whole}, both with "
            "95 % intervals above zero"
        )

    def __call__(self, measured: Measured, metric: str) -> Judgement:
        cut, whole = measured.paired(self.cut, self.whole, metric)
        _, ours = measured.paired(self.cut, self.method, metric)
        loss, gain = cut - whole, cut - ours
        lost, gained, enough = (interval(values) for values in (loss, gain, gain - self.share * loss))
        verdict: Verdict = "not_shown"
        if lost is not None and gained is not None and enough is not None and lost[0] > 0:
            verdict = "shown" if enough[0] > 0 else "partly" if gained[0] > 0 else "not_shown"
        elif lost is None and loss.mean() > 0 and gain.mean() > self.share * loss.mean():
            verdict = "partly"  # one seed
        note = f"mean loss {loss.mean():.4g}, mean gain {gain.mean():.4g} over {loss.size} seeds"
        return Judgement(
            verdict=verdict, measured=float(gain.mean() / max(loss.mean(), 1e-12)), interval=None, note=note
        )


def merge(verdicts: Sequence[Verdict]) -> Verdict:
    """One verdict for several: shown if all are, not_shown if none is even partly, else partly."""
    if not verdicts:
        raise ConfigError("no verdicts to merge; a study declares at least one claim")
    if all(verdict == "shown" for verdict in verdicts):
        return "shown"
    return "not_shown" if all(verdict == "not_shown" for verdict in verdicts) else "partly"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What the paper says (`text`), its number (`claimed`, as printed), where it stands, and how it is judged here.

    `tells` is recorded if the claim is not shown: what explains it, in terms of arms that ran. `{arm}` stands for that
    arm's mean of the claim's metric, `{arm.metric}` for its mean of another one.
    """

    key: str
    text: str
    where: str
    claimed: str
    metric: str
    judge: Judge
    tells: str = ""

    def explain(self, measured: Measured) -> str:
        """`tells` with the measured numbers in it.

        Raises:
            ConfigError: it names an arm or a metric that was not measured.
        """

        def mean(found: re.Match[str]) -> str:
            arm, _, metric = found[1].partition(".")
            return f"{np.mean(list(measured.of(arm, metric or self.metric).values())):.4g}"

        return re.sub(r"\{([\w.]+)\}", mean, self.tells)


@dataclass(frozen=True, kw_only=True)
class Study:
    """One study. Checked when built.

    Attributes:
        paper: the key in `papers.yaml`; `part` names one of several studies of that paper. The file is called
            `<paper>[_<part>].py` with underscores for dashes.
        setting: what is measured here, and how it departs from the paper's setting, in a few sentences.
        run: `(arm name, seed, budget) -> {metric: number}`, deterministic given its arguments.
        units: metric to unit, for the figure and the tables.
        methods: method ids whose code the numbers depend on; a change to them outdates finished seeds.

    Raises:
        ConfigError: no control, a name used twice, or a claim about an arm that is not there.
    """

    paper: str
    part: str = ""
    title: str
    setting: str
    claims: tuple[Claim, ...]
    arms: tuple[Arm, ...]
    run: Callable[[str, int, Budget], Mapping[str, float]]
    methods: tuple[str, ...] = ()
    units: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        keys = [claim.key for claim in self.claims]
        for what, given in (("arm", names), ("claim", keys)):
            twice = sorted({name for name in given if given.count(name) > 1})
            if twice:
                raise ConfigError(f"study {self.key}: {what} {twice[0]!r} is declared twice")
        if not self.claims:
            raise ConfigError(f"study {self.key}: declares no claim")
        if not any(arm.role == "control" for arm in self.arms):
            raise ConfigError(f"study {self.key}: has no control arm; name the one that could refute the claim")
        for claim in self.claims:
            looks_at = (*claim.judge.arms, *re.findall(r"\{(\w+)", claim.tells))
            unknown = [arm for arm in looks_at if arm not in names]
            if unknown:
                raise ConfigError(
                    f"study {self.key}: claim {claim.key!r} looks at arm {unknown[0]!r}; arms are {', '.join(names)}"
                )

    @property
    def key(self) -> str:
        """File name without `.py`, and the stem of its results."""
        return "_".join(filter(None, (self.paper.replace("-", "_"), self.part.replace("-", "_"))))

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that claims are about, in order, without repeats."""
        return tuple(dict.fromkeys(claim.metric for claim in self.claims))

    def judge(self, measured: Measured) -> dict[str, Judgement]:
        """Claim key to judgement."""
        return {claim.key: claim.judge(measured, claim.metric) for claim in self.claims}
