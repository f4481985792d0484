"""Run a study seed by seed, keep what is finished, and write the record.

A job is one arm with one seed. A finished job is a small JSON file under `runs/studies/<key>/<budget>/`; running again
skips it unless the study, a bench it imports or a method it names has changed since. The record `results/<key>.json` is
put together from the jobs alone, so seeds may run on different days or machines.
"""

import ast
import hashlib
import inspect
import json
import math
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from moestro.core.errors import ConfigError, NonFiniteError
from moestro.studies._framework import Budget, Measured, Study, interval, merge


__all__ = ["SCHEMA", "compile_record", "fingerprint", "run_jobs", "write_json"]

SCHEMA = 1
LIBRARIES = ("moestro", "torch", "transformers", "numpy", "scipy")
Report = Callable[[str], None]


def run_jobs(
    study: Study, budget: Budget, seeds: Sequence[int], *, work: Path, fresh: bool = False, report: Report = print
) -> int:
    """Run every job that is not finished yet.

    Args:
        work: where finished jobs are kept, for example `runs/studies`.
        fresh: run finished jobs again.
        report: told one line before and after each job.

    Returns:
        How many jobs ran.

    Raises:
        ConfigError: `run` gave back something that is not a mapping of names to numbers.
        NonFiniteError: a measured number is a NaN or an infinity.
    """
    mark = fingerprint(study)
    jobs = [(arm.name, seed) for seed in seeds for arm in study.arms]
    ran = 0
    for number, (arm, seed) in enumerate(jobs, 1):
        path = _job_path(work, study, budget, arm, seed)
        if not fresh and _finished(path, mark):
            report(f"[{number}/{len(jobs)}] {arm}, seed {seed}: finished before")
            continue
        _seed_everything(seed)
        started = time.perf_counter()
        values = _checked(study, arm, seed, study.run(arm, seed, budget))
        seconds = time.perf_counter() - started
        commit, dirty = _commit()
        write_json(
            path,
            {
                "fingerprint": mark, "arm": arm, "seed": seed, "values": values, "seconds": round(seconds, 3),
                "commit": commit, "dirty": dirty, "finished": _now(),
            },
        )  # fmt: skip
        ran += 1
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        report(f"[{number}/{len(jobs)}] {arm}, seed {seed}: {shown} ({seconds:.1f} s)")
    return ran


def compile_record(study: Study, budget: Budget, *, work: Path) -> dict[str, Any]:
    """The record of all seeds for which every arm has finished, as plain data.

    Raises:
        ConfigError: no seed is complete.
    """
    mark = fingerprint(study)
    folder = _job_path(work, study, budget, "-", 0).parent
    jobs = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    jobs = [job for job in jobs if job["fingerprint"] == mark]
    done = {(job["arm"], job["seed"]): job for job in jobs}
    names = [arm.name for arm in study.arms]
    seeds = sorted({seed for _, seed in done if all((arm, seed) in done for arm in names)})
    if not seeds:
        raise ConfigError(f"study {study.key}: no seed has finished at budget {budget.name}; run it first")
    kept = [done[arm, seed] for arm in names for seed in seeds]
    values: dict[str, dict[str, dict[int, float]]] = {arm: {} for arm in names}
    for job in kept:
        for metric, value in job["values"].items():
            values[job["arm"]].setdefault(metric, {})[job["seed"]] = value
    measured = Measured(values)
    judgements = study.judge(measured)
    command = f"moestro study {study.key} --seeds {len(seeds)}"
    return {
        "schema": SCHEMA,
        "paper": study.paper,
        "part": study.part,
        "title": study.title,
        "setting": study.setting,
        "budget": budget.name,
        "command": command if budget.name == "full" else f"{command} --{budget.name}",
        "verdict": merge([judgement.verdict for judgement in judgements.values()]),
        "claims": [
            {
                "key": claim.key, "text": claim.text, "where": claim.where, "claimed": claim.claimed,
                "metric": claim.metric, "rule": claim.judge.rule, "verdict": judgement.verdict,
                "measured": judgement.measured, "interval": judgement.interval, "note": judgement.note,
                "tells": "" if judgement.verdict == "shown" else claim.explain(measured),
            }
            for claim in study.claims for judgement in [judgements[claim.key]]
        ],
        "arms": [{"name": arm.name, "text": arm.text, "role": arm.role} for arm in study.arms],
        "units": dict(study.units),
        "measured": {arm: {name: _statistics(by_seed) for name, by_seed in values[arm].items()} for arm in names},
        "seeds": seeds,
        "seconds": {arm: {str(seed): done[arm, seed]["seconds"] for seed in seeds} for arm in names},
        "wall_seconds": round(sum(job["seconds"] for job in kept), 3),
        "commit": ", ".join(sorted({job["commit"] for job in kept if job["commit"]})) or None,
        "dirty": any(job["dirty"] for job in kept),
        "date": max(job["finished"] for job in kept),
        "machine": _machine(),
        "versions": _versions(),
    }  # fmt: skip


def fingerprint(study: Study) -> str:
    """Changes when the source of the study, of a bench it imports, or of a method it names does."""
    source = inspect.getsource(inspect.getmodule(study.run) or study.run)
    root = Path(__file__).resolve().parents[1]
    sources = [source, *_benches(source, root / "studies")]
    for method in study.methods:
        path = root.joinpath("methods", *method.split(".")).with_suffix(".py")
        sources.append(path.read_text() if path.exists() else method)
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()[:16]


def _benches(source: str, folder: Path) -> list[str]:
    """Sources of the modules of `moestro.studies` that a source imports, and of those that they import, by name.

    The framework is left out: it judges what was measured, and finished jobs may be judged anew.
    """
    found: dict[str, str] = {}
    todo = _imported(source)
    while todo:
        name = todo.pop()
        path = folder / f"{name}.py"
        if name in found or name == "_framework" or not path.exists():
            continue
        found[name] = path.read_text()
        todo |= _imported(found[name])
    return [found[name] for name in sorted(found)]


def _imported(source: str) -> set[str]:
    """Names of modules of `moestro.studies` that a source imports, inside functions too."""
    package = "moestro.studies"
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        found |= {module.split(".")[2] for module in modules if module.startswith(f"{package}.")}
    return found


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    temporary.replace(path)


def _job_path(work: Path, study: Study, budget: Budget, arm: str, seed: int) -> Path:
    return work / study.key / budget.name / f"{arm}.{seed}.json"


def _finished(path: Path, mark: str) -> bool:
    if not path.exists():
        return False
    try:
        return bool(json.loads(path.read_text())["fingerprint"] == mark)
    except (ValueError, KeyError):
        return False


def _checked(study: Study, arm: str, seed: int, values: Mapping[str, float]) -> dict[str, float]:
    where = f"study {study.key}, arm {arm}, seed {seed}"
    if not isinstance(values, Mapping) or not values:
        raise ConfigError(f"{where}: run returned {type(values).__name__}; return a mapping of metric to number")
    needed = {claim.metric for claim in study.claims if arm in claim.judge.arms}
    absent = sorted(needed - set(values))
    if absent:
        raise ConfigError(f"{where}: a claim needs {absent[0]!r}; run returned {', '.join(sorted(values))}")
    checked = {}
    for name, value in values.items():
        checked[name] = float(value)
        if not math.isfinite(checked[name]):
            raise NonFiniteError(f"{where}: {name} is {checked[name]}; measure divergence as a number of its own")
    return checked


def _seed_everything(seed: int) -> None:
    """Global generators, so that a job gives the same numbers whatever ran before it."""
    random.seed(seed)
    np.random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


def _statistics(by_seed: Mapping[int, float]) -> dict[str, Any]:
    values = list(by_seed.values())
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {
        "seeds": {str(seed): value for seed, value in sorted(by_seed.items())},
        "mean": float(np.mean(values)),
        "std": spread,
        "interval": interval(values),
    }


def _commit() -> tuple[str | None, bool]:
    """(commit of the code that runs, whether the package differs from it); (None, False) outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None, False

    def git(*arguments: str) -> str:
        answer = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
        return answer.stdout.strip()

    return git("rev-parse", "--short=12", "HEAD") or None, bool(git("status", "--porcelain", "--", "moestro"))


def _machine() -> dict[str, Any]:
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
