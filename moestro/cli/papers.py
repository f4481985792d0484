"""`moestro papers`: the fifty papers, what is built from each, and what its study found."""

import json
from typing import Any

import typer


__all__ = ["register", "rows"]


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command()
    def papers(as_json: bool = typer.Option(False, "--json", help="Print the papers as JSON.")) -> None:
        """List the papers Moestro builds from, their methods, and the verdicts of their studies.

        A paper without a method yet shows as open.
        """
        found = rows()
        if as_json:
            print(json.dumps(found, indent=1, ensure_ascii=False))
        else:
            _show(found)


def rows() -> list[dict[str, Any]]:
    """One row a paper: key, title, arxiv, methods, study.

    `methods` are the methods that exist; `study` is None until a result is recorded.
    """
    from moestro.core.papers import load_papers
    from moestro.core.registry import cards
    from moestro.studies._results import load, summary

    of_paper: dict[str | None, list[str]] = {}
    for method_id, card in cards().items():
        of_paper.setdefault(card.paper, []).append(method_id)
    records = load()
    return [
        {
            "key": paper.key,
            "title": paper.title,
            "arxiv": paper.arxiv,
            "methods": of_paper.get(paper.key, []),
            "study": summary(paper.key, records),
        }
        for paper in load_papers()
    ]


def _show(found: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("key", "title", "arXiv", "methods", "study", box=None, pad_edge=False)
    for row in found:
        study = row["study"]
        verdict = f"{study['verdict'].replace('_', ' ')}, {study['seeds']} seeds" if study else ""
        methods = ", ".join(row["methods"]) or "[dim]open[/]"
        table.add_row(row["key"], escape(row["title"]), row["arxiv"] or "", methods, verdict)
    Console().print(table)
    built = sum(bool(row["methods"]) for row in found)
    print(f"{len(found)} papers, {built} with a method, {sum(bool(row['study']) for row in found)} with a study")
