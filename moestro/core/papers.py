"""The fifty papers: what each is called, where it stands on the map, which methods are planned for it."""

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from moestro.core.card import STAGES
from moestro.core.datafiles import check_keys, read_yaml
from moestro.core.errors import ConfigError
from moestro.core.taxonomy import check_path


NUM_PAPERS = 50
FIELDS = {"key", "title", "year", "arxiv", "venue", "taxonomy", "stages", "methods"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Paper:
    """One paper that Moestro builds from.

    Attributes:
        key: short name, the one used in commands and in file names of studies.
        title: the paper's title.
        year: year of its first public version.
        arxiv: arXiv id without version, or None.
        venue: where it appeared, or None.
        taxonomy: path on the map of the field (``moestro.core.taxonomy``) of its main idea.
        stages: life stages it belongs to, whether or not a method of it exists yet.
        methods: method ids planned for it; empty while the paper is open.
    """

    key: str
    title: str
    year: int
    arxiv: str | None
    venue: str | None
    taxonomy: str
    stages: tuple[str, ...]
    methods: tuple[str, ...]


@cache
def load_papers() -> tuple[Paper, ...]:
    """All papers, sorted by key.

    Raises:
        ConfigError: the data file breaks one of its rules; the message names the paper and the field.
    """
    return parse_papers(read_yaml("moestro.core", "papers.yaml"))


def parse_papers(rows: Any) -> tuple[Paper, ...]:
    """Check the rows of a papers file and build the papers.

    Raises:
        ConfigError: not exactly fifty rows, a key or a method that appears twice, keys out of order, an
            unknown stage or place on the map, a method of a stage the paper does not list, a year that
            contradicts the arXiv id.
    """
    if not isinstance(rows, list):
        raise ConfigError(f"papers.yaml: expected a list of papers, got {type(rows).__name__}")
    papers = tuple(_paper(row, index) for index, row in enumerate(rows))
    if len(papers) != NUM_PAPERS:
        raise ConfigError(f"papers.yaml: {len(papers)} papers, expected {NUM_PAPERS}")
    _refuse_twice("key", [paper.key for paper in papers])
    _refuse_twice("method", [method for paper in papers for method in paper.methods])
    keys = [paper.key for paper in papers]
    if keys != sorted(keys):
        late = next(key for key, right in zip(keys, sorted(keys), strict=True) if key != right)
        raise ConfigError(f"papers.yaml: {late} stands out of alphabetical order")
    return papers


def _paper(row: Any, index: int) -> Paper:
    where = f"papers.yaml: {row.get('key', index)}" if isinstance(row, dict) else f"papers.yaml: row {index}"
    fields = check_keys(row, where, FIELDS)
    for name in ("key", "title", "taxonomy"):
        if not isinstance(fields[name], str) or not fields[name].strip():
            raise ConfigError(f"{where}: {name}={fields[name]!r}: expected text")
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", fields["key"]):
        raise ConfigError(f"{where}: key must be lower-case words joined by hyphens")
    check_path(fields["taxonomy"], where)
    paper = Paper(**{**fields, "stages": _texts(fields, "stages", where), "methods": _texts(fields, "methods", where)})
    _check_date(paper, where)
    _check_stages(paper, where)
    return paper


def _texts(fields: dict[str, Any], name: str, where: str) -> tuple[str, ...]:
    value = fields[name]
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ConfigError(f"{where}: {name}={value!r}: expected a list of names")
    return tuple(value)


def _check_date(paper: Paper, where: str) -> None:
    if not isinstance(paper.year, int) or isinstance(paper.year, bool):
        raise ConfigError(f"{where}: year={paper.year!r}: expected a whole number")
    if paper.arxiv is None:
        return
    if not isinstance(paper.arxiv, str) or not re.fullmatch(r"\d{4}\.\d{4,5}", paper.arxiv):
        raise ConfigError(f"{where}: arxiv={paper.arxiv!r}: expected a quoted id such as '2401.06066'")
    if paper.year != 2000 + int(paper.arxiv[:2]):
        raise ConfigError(f"{where}: year={paper.year} contradicts arXiv id {paper.arxiv}")


def _check_stages(paper: Paper, where: str) -> None:
    if not paper.stages:
        raise ConfigError(f"{where}: stages is empty; known: {', '.join(STAGES)}")
    for stage in paper.stages:
        if stage not in STAGES:
            raise ConfigError(f"{where}: stage {stage!r} is unknown; known: {', '.join(STAGES)}")
    for method in paper.methods:
        if not re.fullmatch(r"[a-z]+\.[a-z][a-z0-9_]*", method):
            raise ConfigError(f"{where}: method {method!r}: expected stage.name, for example train.rmoe")
        stage = method.partition(".")[0]
        if stage not in paper.stages:
            raise ConfigError(f"{where}: method {method} needs stage {stage!r} among {', '.join(paper.stages)}")


def _refuse_twice(what: str, names: list[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ConfigError(f"papers.yaml: {what} {name} appears twice")
        seen.add(name)
