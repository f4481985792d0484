"""`moestro compare`: runs and studies side by side, at equal operations and equal time."""

import json
from pathlib import Path

import typer


__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command()
    def compare(
        results: list[Path] = typer.Argument(
            help="Run folders of `moestro train`, and records of studies (results/*.json)."
        ),
        out: Path | None = typer.Option(
            None, "-o", "--out", help="The figure, .svg or .png. Default: compare.svg, none with --json."
        ),
        as_json: bool = typer.Option(False, "--json", help="Print the table and the curves as JSON."),
    ) -> None:
        """Compare losses with what they took: operations, wall time, parameters.

        Runs whose recipes differ in the seed alone are put together. Besides the loss at the end, the table has the
        loss at the operations and at the time that every run reached: of runs that differ in cost, these are the fair
        figures. Operations are those that ran, counted with the experts that tokens really used. Runs with another
        tokenizer, objective or held-out text are refused: their losses are no two numbers of one kind.
        """
        from moestro.report.compare import draw, summary, table
        from moestro.report.results import read_entries

        entries = read_entries(results)
        found = summary(entries)
        if out is not None or not as_json:
            out = draw(entries, out or Path("compare.svg"))
        if as_json:
            print(json.dumps(found, indent=1))
        else:
            _show(table(found))
            for line in found["notes"]:
                print(f"note: {line}")
            print(f"\ndrawn in {out}")


def _show(lines: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
