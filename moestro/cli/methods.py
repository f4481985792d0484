"""`moestro methods`: every method, read from the cards without importing one."""

import json
from typing import Any

import typer


__all__ = ["places", "register", "rows"]


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command()
    def methods(
        as_json: bool = typer.Option(False, "--json", help="Print the methods as JSON."),
        stage: str | None = typer.Option(None, "--stage", help="Only this stage, for example convert."),
        under: str | None = typer.Option(None, "--under", help="Only this branch of the map, e.g. gating/sparse."),
        as_map: bool = typer.Option(False, "--map", help="The map of the field: what stands where, what is open."),
    ) -> None:
        """List the methods: id, shape, paper, one line on each.

        `moestro <stage> <name> --help` shows a method's settings; `--map` shows every place of the field, with or
        without a method.
        """
        if as_map and stage is not None:
            from moestro.core.errors import ConfigError

            raise ConfigError("--map shows the methods of all stages; leave --stage out")
        found = places(under=under) if as_map else rows(stage=stage, under=under)
        if as_json:
            print(json.dumps(found, indent=1, ensure_ascii=False))
        elif as_map:
            _show_map(found)
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


def places(*, under: str | None = None) -> list[dict[str, Any]]:
    """One row a place of the map, parents first: path, title, source, systems, methods, papers, implemented.

    `methods` and `papers` are those whose card or entry names this very place; `implemented` looks below it too.

    Raises:
        ConfigError: `under` does not exist.
    """
    from moestro.core.papers import load_papers
    from moestro.core.registry import cards
    from moestro.core.taxonomy import check_path, taxonomy_tree

    if under is not None:
        under = check_path(under.strip("/"), "--under")
    papers: dict[str, list[str]] = {}
    for paper in load_papers():
        papers.setdefault(paper.taxonomy, []).append(paper.key)
    return [
        {
            "path": node.path,
            "title": node.title,
            "source": node.source,
            "systems": list(node.systems),
            "methods": list(node.methods),
            "papers": papers.get(node.path, []),
            "implemented": node.implemented,
        }
        for node in taxonomy_tree(cards()).walk()
        if node.path and (under is None or f"{node.path}/".startswith(f"{under}/"))
    ]


def _show_map(found: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    parents = {row["path"].rpartition("/")[0] for row in found}
    leaves = [row for row in found if row["path"] not in parents]
    table = Table("place", "what", "methods", "papers", box=None, pad_edge=False)
    for row in found:
        depth, slug = row["path"].count("/"), row["path"].rpartition("/")[2]
        methods = ", ".join(row["methods"]) or ("[dim]open[/]" if row in leaves else "")
        table.add_row("  " * depth + slug, escape(row["title"]), methods, ", ".join(row["papers"]))
    Console().print(table)
    print(f"{len(leaves)} places at the ends of the map, {sum(row['implemented'] for row in leaves)} with a method")


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
