"""What runs and studies cost and reached, in one form: entries with seeds, each with a loss and what it took.

A run is the folder of ``moestro train`` (``metrics.jsonl``, and ``run.json`` with recipe and size); runs whose recipes
differ in the seed alone are one entry. A study's record gives an entry an arm: its loss is the first metric with "loss"
in its name, its costs the metrics called ``train_flops``, ``parameters`` and ``seconds``, also with a prefix
(``gigaflops``).
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moestro.core.errors import DataError
from moestro.report.curves import read_metrics, smooth
from moestro.report.page import read_json


PREFIXES = {"": 1.0, "kilo": 1e3, "mega": 1e6, "giga": 1e9, "tera": 1e12, "peta": 1e15}
_COST = re.compile(
    rf"({'|'.join(PREFIXES)})(?:(?:train|training|wall)_)?(flops|parameters|params|seconds)", re.IGNORECASE
)


@dataclass(frozen=True)
class Point:
    """A moment of a run: steps done, the loss there, and what it took up to there; NaN where nothing tells."""

    step: int
    loss: float
    flops: float
    seconds: float


@dataclass(frozen=True)
class Seed:
    """One run, or one seed of a study's arm.

    Attributes:
        seed: of the random numbers; None where nothing tells. loss: at the end. flops: operations of the whole
            training. parameters, active: of the model; None where nothing tells. curve: empty for a study.
    """

    seed: int | None
    loss: float
    flops: float = math.nan
    seconds: float = math.nan
    parameters: float | None = None
    active: float | None = None
    curve: tuple[Point, ...] = ()


@dataclass(frozen=True)
class Entry:
    """What is compared: a recipe or an arm, with its seeds.

    Attributes:
        kind: whose loss it is (held out, training, a metric). data: losses of different data are not comparable.
    """

    name: str
    source: str
    kind: str
    seeds: tuple[Seed, ...] = field(default=())
    data: str = ""

    @property
    def mean(self) -> float:
        """Mean loss over seeds."""
        return sum(seed.loss for seed in self.seeds) / len(self.seeds)

    @property
    def std(self) -> float | None:
        """Standard deviation over seeds, None for one."""
        if len(self.seeds) < 2:
            return None
        return math.sqrt(sum((seed.loss - self.mean) ** 2 for seed in self.seeds) / (len(self.seeds) - 1))


def read_entries(paths: Iterable[str | Path]) -> list[Entry]:
    """Entries of run folders and study records, in the order given; names are unique.

    All runs give their held-out loss if each has one, else all give their training loss, smoothed.

    Raises:
        DataError: a path that is neither, a damaged file, a loss that is not finite, runs whose losses are of
            different tokenizers, objectives or texts, nothing given.
    """
    runs: list[tuple[Path, dict[str, Any], list[dict[str, Any]]]] = []
    found: list[Entry] = []
    for path in map(Path, paths):
        if not path.exists():
            raise DataError(f"{path}: no such file or folder; give folders of runs, or records of studies")
        if path.is_dir():
            facts = read_json(path / "run.json") if (path / "run.json").is_file() else {}
            if not isinstance(facts, dict) or any(not isinstance(facts.get(k, {}), dict) for k in ("recipe", "size")):
                raise DataError(f"{path / 'run.json'}: not what `moestro train` writes; train the recipe again")
            runs.append((path, facts, read_metrics(path)))
        elif path.suffix == ".json":
            found += _study(path)
        else:
            raise DataError(f"{path}: not a run's folder and not a study's record; give either")
    heldout = all(any(isinstance(row.get("heldout"), Mapping) for row in rows) for _, _, rows in runs)
    _check_comparable(runs, heldout)
    found = [*_grouped(runs, heldout), *found]
    if not found:
        raise DataError("nothing to compare: give the folders of runs, or records of studies")
    return _named_apart(found)


def _named_apart(entries: Sequence[Entry]) -> list[Entry]:
    names = [entry.name for entry in entries]
    return [
        replace(entry, name=f"{entry.name} ({entry.source})") if names.count(entry.name) > 1 else entry
        for entry in entries
    ]


# -- runs ---------------------------------------------------------------------------------------------------------


def _check_comparable(runs: Sequence[tuple[Path, dict[str, Any], list[dict[str, Any]]]], heldout: bool) -> None:
    """Raise DataError for two runs whose losses are not numbers of one kind. Runs that tell nothing are let through."""
    seen: dict[str, tuple[str, Path]] = {}
    for path, facts, _ in runs:
        for what, value in _measured_on(facts.get("recipe", {}), heldout).items():
            told = json.dumps(value, sort_keys=True)
            before, other = seen.setdefault(what, (told, path))
            if told != before:
                one, two = _difference(json.loads(before), value)
                raise DataError(
                    f"{other} and {path} cannot be compared: their {what} differ ({one} and {two}); "
                    f"compare runs of one {what}"
                )


def _measured_on(recipe: Mapping[str, Any], heldout: bool) -> dict[str, Any]:
    """What a run's loss depends on besides model and training; a learned tokenizer is told by the text it is of."""
    data, held = recipe.get("data"), recipe.get("eval")
    if not isinstance(data, Mapping):
        return {}
    tokenizer, text = str(data.get("tokenizer")), None
    if tokenizer.startswith("bpe:"):
        text = data.get("sources")
    elif tokenizer == "model":
        text = (recipe.get("model") or {}).get("load")
    found = {"tokenizer": [tokenizer, text], "objective": recipe.get("objective")}
    if heldout and isinstance(held, Mapping):
        own = held.get("data") or {}
        found["held-out text"] = [own.get("sources"), held.get("limit"), data.get("sequence_length")]
    if not heldout:
        found["training text"] = [data.get("sources"), data.get("sequence_length")]
    return found


def _difference(one: Any, two: Any) -> tuple[str, str]:
    """The innermost parts of two JSON values that differ, shortened."""
    while type(one) is type(two) and isinstance(one, (list, dict)) and len(one) == len(two):
        keys = range(len(one)) if isinstance(one, list) else sorted(one)
        if isinstance(one, dict) and set(one) != set(two):
            break
        key = next(key for key in keys if one[key] != two[key])
        one, two = one[key], two[key]
    return tuple(text if len(text) < 60 else f"{text[:57]}..." for text in map(json.dumps, (one, two)))  # type: ignore[return-value]


def _grouped(runs: Sequence[tuple[Path, dict[str, Any], list[dict[str, Any]]]], heldout: bool) -> list[Entry]:
    """Runs of one recipe together."""
    groups: dict[str, list[Seed]] = {}
    about: dict[str, tuple[str, str]] = {}
    for path, facts, rows in runs:
        recipe = facts.get("recipe", {})
        rest = {name: value for name, value in recipe.items() if name not in ("seed", "name")}
        key = json.dumps(rest, sort_keys=True) if rest else str(path)
        about.setdefault(key, (str(recipe.get("name") or path.name), str(path)))
        groups.setdefault(key, []).append(_seed(path, facts, rows, heldout))
    kind = "held out" if heldout else "training, smoothed"
    return [Entry(*about[key], kind, tuple(seeds)) for key, seeds in groups.items()]


def _seed(path: Path, facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], heldout: bool) -> Seed:
    try:
        return _run(path, facts, rows, heldout)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise DataError(f"{path}: a row of its metrics is not what `moestro train` writes ({error})") from None


def _run(path: Path, facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], heldout: bool) -> Seed:
    recipe, size = facts.get("recipe", {}), facts.get("size", {})
    steps = [row for row in rows if "loss" in row]
    flops, seconds = _spent(steps)
    place = {row["step"]: number for number, row in enumerate(steps)}
    if heldout:
        weights = recipe.get("losses", {})
        losses = [
            (row["step"], sum(float(weights.get(name, 1.0)) * float(value) for name, value in row["heldout"].items()))
            for row in rows
            if isinstance(row.get("heldout"), Mapping)
        ]
    else:
        losses = list(zip((row["step"] for row in steps), smooth([float(row["loss"]) for row in steps]), strict=True))
    bad = next((step for step, loss in losses if not math.isfinite(loss)), None)
    if bad is not None:
        raise DataError(f"{path}: the loss at step {bad} is not a finite number; the run diverged, leave it out")
    curve = [Point(step, loss, flops[place[step]], seconds[place[step]]) for step, loss in losses if step in place]
    if not curve:
        raise DataError(f"{path}: its rows hold no loss; the run has not made a step")
    return Seed(
        seed=recipe.get("seed"),
        loss=curve[-1].loss,
        flops=flops[-1],
        seconds=seconds[-1],
        parameters=size.get("parameters"),
        active=size.get("active"),
        curve=tuple(curve),
    )


def _spent(steps: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    """Operations and seconds up to each step. A report's operations a token hold for the steps since the last one."""
    flops, seconds = [], []
    total = time = 0.0
    ahead = [row.get("flops_per_token") for row in steps]
    for place in range(len(steps) - 2, -1, -1):
        ahead[place] = ahead[place + 1] if ahead[place] is None else ahead[place]
    last = next((row["flops_per_token"] for row in reversed(steps) if "flops_per_token" in row), math.nan)
    for row, each in zip(steps, ahead, strict=True):
        total += float(row.get("tokens", math.nan)) * float(last if each is None else each)
        time += float(row.get("seconds", math.nan))
        flops.append(total)
        seconds.append(time)
    return flops, seconds


# -- studies ------------------------------------------------------------------------------------------------------


def _study(path: Path) -> list[Entry]:
    """The arms of a study's record."""
    record = read_json(path)
    if not isinstance(record, dict) or record.get("schema") != 1 or not isinstance(record.get("measured"), dict):
        raise DataError(f"{path}: not a study record of schema 1; `moestro study` writes them to results/")
    units, entries = record.get("units", {}), []
    for arm, measured in record["measured"].items():
        loss = next((name for name in measured if "loss" in name), None)
        if loss is None:
            continue
        try:
            values = {name: found["seeds"] for name, found in measured.items()}
            costs = _costs(values, units)
            seeds = tuple(
                Seed(int(seed), float(value), **{what: of[seed] for what, of in costs.items() if seed in of})
                for seed, value in values[loss].items()
            )
        except (TypeError, ValueError, KeyError, AttributeError):
            raise DataError(f"{path}: arm {arm!r} does not hold numbers by seed; run `moestro study` again") from None
        if not seeds or not all(math.isfinite(seed.loss) for seed in seeds):
            raise DataError(f"{path}: {loss} of arm {arm!r} is missing or not a finite number in some seed")
        kind = f"{loss} ({units.get(loss, 'no unit')})"
        entries.append(Entry(f"{path.stem}: {arm}", str(path), kind, seeds, data=str(path)))
    if not entries:
        known = ", ".join(dict.fromkeys(name for measured in record["measured"].values() for name in measured))
        raise DataError(f"{path}: none of its metrics is a loss; it has {known or 'none'}")
    return entries


def _costs(values: Mapping[str, Mapping[str, float]], units: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """``flops``, ``parameters`` and ``seconds`` of the whole training by seed; figures for one token are left out."""
    found: dict[str, dict[str, float]] = {}
    for name, seeds in values.items():
        match = _COST.fullmatch(name)
        if match is not None and "token" not in units.get(name, ""):
            what = match[2].lower().replace("params", "parameters")
            found.setdefault(what, {seed: value * PREFIXES[match[1].lower()] for seed, value in seeds.items()})
    return found
