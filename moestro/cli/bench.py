"""`moestro bench`: our speed and memory against others', measured in one run."""

import json
from pathlib import Path
from typing import Any

import typer


__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command()
    def bench(
        name: str = typer.Argument(help="A benchmark, such as train-model or methods; `list` names them all."),
        as_json: bool = typer.Option(False, "--json", help="Print the figures as JSON."),
        rounds: int = typer.Option(5, "--rounds", min=1, help="Timed rounds; figures are medians over them."),
        model: Path | None = typer.Option(
            None,
            "--model",
            help="Folder of the reference model of decode, prefill, offload and cache; built when missing.",
        ),
        threads: int | None = typer.Option(None, "--threads", min=1, help="Torch threads; all cores when not given."),
    ) -> None:
        """Measure Moestro against its peers in one run.

        All arms take turns, in rotating order. A ratio over 1 means that Moestro is better. The reference model stands
        in the folder of --model, else of the environment's MOESTRO_BENCH_MODEL, else in the user's cache.
        """
        import torch

        from moestro.testing.bench import harness

        if name == "list":
            print("\n".join(harness.names()))
            return
        if threads is not None:
            torch.set_num_threads(threads)
        report = harness.run(name, rounds, model)
        if as_json:
            print(json.dumps(report, indent=1))
        else:
            _show(report)


def _show(report: dict[str, Any]) -> None:
    print(f"{report['name']}  {report['date']}  {report['machine']}")
    case = None
    for row in report["rows"]:
        if (row["case"], row["metric"]) != case:
            case = (row["case"], row["metric"])
            print(f"\n{row['case']}: {row['metric']}\n  ours {row['ours']:10.4g} {row['unit']}")
        if row["peer"] is None:
            print(f"  {row['peer_name']:24} {'-':>10}")
        else:
            ratio = f"x{row['ratio']:.2f}  (spread {row['spread']:.0%})"
            print(f"  {row['peer_name']:24} {row['peer']:10.4g} {row['unit']}   {ratio}")
        if row["note"]:
            print(f"    {row['note']}")
