"""Read what studies recorded: by the command line, the generated pages and the tests. Imports nothing heavy."""

import difflib
import importlib
import json
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moestro.core.errors import DataError, RegistryError


if TYPE_CHECKING:
    from moestro.studies._framework import Study

__all__ = ["load", "results_folder", "study", "study_keys", "summary"]


def study_keys() -> list[str]:
    """Every study, in order of file name; nothing is imported."""
    import moestro.studies

    return sorted(
        module.name for module in pkgutil.iter_modules(moestro.studies.__path__) if not module.name.startswith("_")
    )


def study(key: str) -> "Study":
    """The study of that file name (dashes and underscores are the same).

    Raises:
        RegistryError: there is none; the nearest are named.
    """
    name = key.replace("-", "_")
    known = study_keys()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        parts = [other for other in known if other.startswith(f"{name}_")]
        hint = ", ".join(parts or near or known) or "none yet"
        raise RegistryError(f"no study {key!r}; {'its parts are' if parts else 'there is'}: {hint}")
    found: Study = importlib.import_module(f"moestro.studies.{name}").STUDY
    return found


def results_folder() -> Path:
    """Where recorded results lie: in the checkout, or beside the installed package."""
    package = Path(__file__).resolve().parents[1]
    checkout = package.parent / "results"
    return checkout if checkout.is_dir() else package / "results"


def load(folder: Path | None = None) -> dict[str, dict[str, Any]]:
    """Study key to record.

    Raises:
        DataError: a file is not a record of a known schema.
    """
    records = {}
    for path in sorted((folder or results_folder()).glob("*.json")):
        try:
            record = json.loads(path.read_text())
            known = record["schema"] == 1 and {"paper", "claims", "verdict"} <= set(record)
        except (ValueError, KeyError, TypeError):
            known = False
        if not known:
            raise DataError(f"{path}: not a study record of schema 1; write it with `moestro study {path.stem}`")
        records[path.stem] = record
    return records


def summary(paper: str, records: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The studies of one paper as one: the merged verdict, and the first claim of the first part as headline.

    `seeds` is the smallest number of any part, `date` the latest, `commit` that of the headline.
    """
    parts = {key: record for key, record in records.items() if record["paper"] == paper}
    if not parts:
        return None
    head = parts[min(parts, key=lambda key: (parts[key]["part"], key))]
    claim = head["claims"][0]
    verdicts = {record["verdict"] for record in parts.values()}
    return {
        "verdict": verdicts.pop() if len(verdicts) == 1 else "partly",
        "metric": claim["metric"],
        "claimed": claim["claimed"],
        "measured": claim["measured"],
        "seeds": min(len(record["seeds"]) for record in parts.values()),
        "date": max(record["date"] for record in parts.values()),
        "commit": head["commit"],
        "parts": sorted(parts),
    }
