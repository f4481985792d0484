"""Learning-rate schedules and values that move over time, as pure functions of the step.

Nothing here has state: a resumed run computes the same numbers from the step alone, bit for bit.
"""

import math
from typing import Literal

from pydantic import Field, model_validator

from moestro.core.config import Config


Curve = Literal["linear", "cosine", "exponential"]


class ScheduleConfig(Config):
    """How the learning rate moves between 0 and 1 times its peak.

    ``constant``: 1 after the warm-up. ``linear`` and ``cosine``: from 1 down to ``floor`` at the last step. ``wsd``
    (warm-up, stable, decay; MiniCPM, 2404.06395): 1, then linearly down to ``floor`` over the last ``decay`` share.

    Attributes:
        warmup: steps of linear warm-up, or a share of all steps when under 1.
        floor: the factor at the end.
        decay: share of all steps that ``wsd`` spends on the way down.
    """

    kind: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    warmup: float = Field(default=0, ge=0)
    floor: float = Field(default=0.0, ge=0, le=1)
    decay: float = Field(default=0.2, gt=0, le=1)

    def factor(self, step: int, total: int) -> float:
        """The factor on the learning rate for optimiser step ``step`` (from 0) of ``total``.

        The warm-up gives 1/n, 2/n, ... 1 over its n steps; the last step's factor is just above ``floor``, which would
        be reached at ``step == total``.
        """
        warmup = self.warmup_steps(total)
        if step < warmup:
            return (step + 1) / warmup
        if self.kind == "constant":
            return 1.0
        if self.kind == "wsd":
            length = max(1, round(self.decay * total))
            done = max(0, step - (total - length)) / length
            return 1.0 - (1.0 - self.floor) * min(1.0, done)
        done = min(1.0, (step - warmup) / max(1, total - warmup))
        return ramp(1.0, self.floor, done, self.kind)

    def warmup_steps(self, total: int) -> int:
        """The warm-up in steps."""
        return round(self.warmup * total) if self.warmup < 1 else round(self.warmup)


class Ramp(Config):
    """A value that moves from ``start`` to ``end`` over a phase."""

    start: float
    end: float
    curve: Curve = "linear"

    @model_validator(mode="after")
    def _fits(self) -> "Ramp":
        if self.curve == "exponential" and (self.start <= 0 or self.end <= 0):
            raise ValueError(f"an exponential ramp needs values > 0, got {self.start} to {self.end}")
        return self

    def at(self, done: float) -> float:
        """The value when the share ``done`` (0 to 1) of the phase lies behind."""
        return ramp(self.start, self.end, done, self.curve)


Value = float | Ramp


def value_at(value: Value, done: float) -> float:
    """A constant, or a ramp's value at ``done``."""
    return value.at(done) if isinstance(value, Ramp) else float(value)


def ramp(start: float, end: float, done: float, curve: Curve) -> float:
    """From ``start`` (done = 0) to ``end`` (done = 1) along a curve."""
    done = min(1.0, max(0.0, done))
    if curve == "exponential":
        return float(start * (end / start) ** done)
    if curve == "cosine":
        return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * done))
    return start + (end - start) * done
