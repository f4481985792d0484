"""`moestro study`: put a paper's claim to the test and record the verdict."""

from pathlib import Path
from typing import Any

import typer


__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command()
    def study(
        key: str = typer.Argument(help="A study's key (see `moestro papers`), or `all`."),
        micro: bool = typer.Option(False, "--micro", help="At most a minute; written under runs/, not to results/."),
        seeds: int | None = typer.Option(None, "--seeds", min=1, help="How many seeds: 0, 1, ... N-1."),
        seed: int | None = typer.Option(None, "--seed", min=0, help="Only this seed, as a job of its own."),
        fresh: bool = typer.Option(False, "--fresh", help="Run finished seeds again."),
        out: Path = typer.Option(Path("results"), "--out", help="Where the record and the figure go."),
        work: Path = typer.Option(Path("runs/studies"), "--work", help="Where finished seeds are kept."),
    ) -> None:
        """Measure a paper's claim against its control, seed by seed.

        Finished seeds are kept, so an interrupted run goes on where it stopped. The record `<out>/<key>.json` holds
        every number per seed, the statistics, the verdict (shown, partly, not_shown), the commit and the machine; the
        figure lies beside it.
        """
        from moestro.studies._framework import BUDGETS
        from moestro.studies._results import study as find
        from moestro.studies._results import study_keys

        budget = BUDGETS["micro" if micro else "full"]
        chosen = [seed] if seed is not None else list(range(seeds or budget.seeds))
        for name in study_keys() if key == "all" else [key]:
            _run(find(name), budget, chosen, out if not micro else work / name.replace("-", "_"), work, fresh)


def _run(study: Any, budget: Any, seeds: list[int], out: Path, work: Path, fresh: bool) -> None:
    from moestro.studies._figure import draw
    from moestro.studies._runner import compile_record, run_jobs, write_json

    print(f"{study.key}: {study.title} ({len(study.arms)} arms x {len(seeds)} seeds, budget {budget.name})")
    run_jobs(study, budget, seeds, work=work, fresh=fresh, report=lambda line: print(f"  {line}", flush=True))
    record = compile_record(study, budget, work=work)
    target = out / f"{study.key}{'' if budget.name == 'full' else '.' + budget.name}.json"
    write_json(target, record)
    draw(record, target.with_suffix(".svg"))
    for claim in record["claims"]:
        between = claim["interval"]
        spread = f" [{between[0]:.4g}, {between[1]:.4g}]" if between else ""
        print(f"  {claim['verdict']:9}  {claim['text']} Claimed {claim['claimed']}; measured "
              f"{claim['metric']} {claim['measured']:.4g}{spread}: {claim['note']}.")  # fmt: skip
        if claim["tells"]:
            print(f"             {claim['tells']}")
    if record["dirty"]:
        print("  note: the code had uncommitted changes; commit and run with --fresh before you keep this record")
    print(f"  verdict: {record['verdict']} -> {target}")
