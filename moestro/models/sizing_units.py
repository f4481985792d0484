"""Sizes as people write them, such as ``2GiB``, and back; and what estimates of speed are made of."""

import math
import re
from dataclasses import dataclass
from decimal import Decimal

from moestro.core.errors import ConfigError


UNITS = {
    "": 1,
    "B": 1,
    **{f"{letter}iB": 2 ** (10 * power) for power, letter in enumerate("KMGTP", start=1)},
    **{f"{letter}B": 10 ** (3 * power) for power, letter in enumerate("kMGTP", start=1)},
}
_FOLDED = {name.lower(): factor for name, factor in UNITS.items()}
_SIZE = re.compile(r"(?P<number>[0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*(?P<unit>[a-z]*)", re.IGNORECASE)
_LARGEST = 2**63
_EULER = 0.5772156649


def parse_size(text: str | int, what: str = "size") -> int:
    """Bytes of ``2GiB`` (binary), ``500MB`` (decimal), ``1.5e9`` or ``4096`` (bytes); fractions are cut off.

    Args:
        text: a number with a unit; case does not matter.
        what: the flag or field it comes from, for the message.

    Raises:
        ConfigError: not a size, a unit that could mean two things (``2G``), less than one byte, more than 8 EiB.
    """
    match = _SIZE.fullmatch(str(text).strip())
    if match is None:
        raise ConfigError(f"{what}={text!r} is not a size; write a number and a unit, such as 2GiB, 500MB or 1.5e9")
    number, unit = match["number"], match["unit"].lower()
    if unit not in _FOLDED:
        hint = "B, KiB, MiB, GiB, TiB (powers of 1024) or kB, MB, GB, TB (powers of 1000)"
        if f"{unit}ib" in _FOLDED:
            hint = f"{number}{unit.upper()}iB (powers of 1024) or {number}{unit.upper()}B (powers of 1000)"
        raise ConfigError(f"{what}={text!r}: the unit {match['unit']!r} is not known; write {hint}")
    value = Decimal(number) * _FOLDED[unit]
    if not 1 <= value < _LARGEST:
        raise ConfigError(f"{what}={text!r} is {value:.3g} bytes; it must be at least 1 and below 2^63")
    return int(value)


def show_size(nbytes: float) -> str:
    """``1.50 GiB``: three digits or more, in the largest unit that leaves a number of at least 1."""
    for name in ("TiB", "GiB", "MiB", "KiB"):
        if abs(nbytes) >= UNITS[name]:
            return f"{_digits(nbytes / UNITS[name])} {name}"
    return f"{nbytes:.0f} B"


def show_count(number: float) -> str:
    """``1.29 B``: a count of parameters or operations, in thousands, millions, billions."""
    for name, factor in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if abs(number) >= factor:
            return f"{_digits(number / factor)} {name}"
    return f"{number:.0f}"


def flag_size(nbytes: int) -> str:
    """The smallest size of three digits that is not below ``nbytes``, as ``parse_size`` reads it: ``1.51GiB``."""
    for name in ("TiB", "GiB", "MiB", "KiB"):
        if nbytes >= UNITS[name]:
            whole, hundredths = divmod(-(-nbytes * 100 // UNITS[name]), 100)
            return f"{whole}.{hundredths:02d}".rstrip("0").rstrip(".") + name
    return f"{nbytes}B"


def _digits(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 100 else f"{value:.0f}"


@dataclass(frozen=True, slots=True)
class Range:
    """A predicted rate, tokens a second, with both ends of what it may be."""

    low: float
    estimate: float
    high: float


def harmonic(number: float) -> float:
    """H(n) = 1 + 1/2 + ... + 1/n, continued smoothly; 0 at 0."""
    if number <= 0:
        return 0.0
    if number < 1:
        return number
    return math.log(number) + _EULER + 1 / (2 * number) - 1 / (12 * number * number)


def expected_hits(experts: int, share: float, *, popular: bool) -> float:
    """Share of choices that find their expert in memory, which holds ``share`` of all.

    Args:
        popular: choices follow Zipf's law and the popular experts are in memory; else all are alike.
    """
    if share >= 1 or not popular:
        return min(share, 1.0)
    return min(harmonic(share * experts) / harmonic(experts), 1.0)
