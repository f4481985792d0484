"""`moestro methods`: every method, read from the cards without importing one."""

import json
from typing import Any

import typer


__all__ = ["register", "rows"]


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command()
    def methods(
        as_json: bool = typer.Option(False, "--json", help="Print the methods as JSON."),
        stage: str | None = typer.Option(None, "--stage", help="Only this stage, for example convert."),
        under: str | None = typer.Option(None, "--under", help="Only this branch of the map, e.g. gating/sparse."),
    ) -> None:
        """List the methods: id, shape, paper, one line on each.

        `moestro <stage> <name> --help` shows a method's settings.
        """
        found = rows(stage=stage, under=under)
        if as_json:
            print(json.dumps(found, indent=1, ensure_ascii=False))
        else:
            _show(found)


def rows(*, stage: str | None = None, under: str | None = None) -> list[dict[str, Any]]:
    """One row a method: id, stage, shape, paper, summary, status, taxonomy.

    Args:
        under: a path of the taxonomy; methods that stand there or below it are kept.

    Raises:
        ConfigError: the stage or the path does not exist.
    """
    from moestro.core.card import STAGES
    from moestro.core.errors import ConfigError
    from moestro.core.registry import infos
    from moestro.core.taxonomy import check_path

    if stage is not None and stage not in STAGES:
        raise ConfigError(f"--stage {stage!r} is no stage; known: {', '.join(STAGES)}")
    if under is not None:
        under = check_path(under.strip("/"), "--under")
    return [
        {
            "id": info.id,
            "stage": info.stage,
            "shape": info.shape,
            "paper": info.card.paper,
            "summary": info.card.summary,
            "status": info.card.status,
            "taxonomy": info.card.taxonomy,
        }
        for info in infos().values()
        if (stage is None or info.stage == stage)
        and (under is None or f"{info.card.taxonomy}/".startswith(f"{under}/"))
    ]


def _show(found: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("id", "shape", "paper", "summary", box=None, pad_edge=False)
    for row in found:
        mark = "" if row["status"] == "stable" else " [yellow](experimental)[/]"
        table.add_row(row["id"], row["shape"], row["paper"] or "", escape(row["summary"]) + mark)
    Console().print(table)
    print(f"{len(found)} methods")
