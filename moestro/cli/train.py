"""`moestro train`: run a recipe, go on with an interrupted run, or say what it would cost."""

from pathlib import Path
from typing import Any

import typer


__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command()
    def train(
        recipe: Path = typer.Argument(..., help="A YAML recipe; see recipes/ for examples."),
        out: Path | None = typer.Option(None, "--out", "-o", help="Folder of the run. Default: runs/<name>."),
        dry_run: bool = typer.Option(False, "--dry-run", help="Only print sizes; nothing is read or allocated."),
        baseline: str | None = typer.Option(
            None,
            help="Train an equal-cost baseline of the recipe instead: dense, topk, equal_flops or equal_parameters.",
        ),
        measured: Path | None = typer.Option(
            None, help="With --baseline: a run of the recipe whose measured assignments a token count."
        ),
        fresh: bool = typer.Option(False, "--fresh", help="Refuse a folder that already holds a run."),
        as_json: bool = typer.Option(False, "--json", help="Print the result as JSON."),
    ) -> None:
        """Train what a recipe describes; the same command resumes an interrupted run.

        Under torchrun the step is shared by all ranks. Ctrl-C finishes the step, saves and stops.

        Baselines differ from the recipe in the feed-forwards alone, with sizes from counted costs: dense is as dear as
        the experts that a token uses, topk has a softmax top-k router with as many real assignments, equal_flops and
        equal_parameters are dense with the operations or the parameters of the whole model. The derived recipe.yaml
        lies in the folder of the run, runs/<name>-<baseline>.
        """
        from moestro.core.errors import ConfigError
        from moestro.training.baseline import baseline as derive
        from moestro.training.baseline import kind_of
        from moestro.training.recipe import load_recipe

        settings = load_recipe(recipe)
        if measured is not None and baseline is None:
            raise ConfigError("--measured says what a baseline costs; give --baseline too")
        made = None if baseline is None else derive(settings, kind_of(baseline), measured=measured)
        settings = settings if made is None else made.recipe
        if dry_run:
            _dry_run(settings, as_json, () if made is None else made.notes)
            return
        _train(settings, out or Path("runs") / settings.name, fresh, as_json, made)


def _dry_run(settings: Any, as_json: bool, notes: tuple[str, ...]) -> None:
    import json

    from moestro.training.run import dry_run

    size = dry_run(settings)
    tokens = settings.total_steps * settings.batch_size * settings.data.sequence_length
    if as_json:
        said = {"baseline": list(notes)} if notes else {}
        print(json.dumps({**size.json(), "steps": settings.total_steps, "tokens": tokens, **said}, indent=1))
        return
    rows = [
        ("parameters", f"{size.parameters:,}"),
        ("active per token", f"{size.active:,} ({size.active / size.parameters:.0%})"),
        ("trainable", f"{size.trainable:,}"),
        ("weights", _mebibytes(size.weight_bytes)),
        ("gradients", _mebibytes(size.gradient_bytes)),
        ("optimiser", _mebibytes(size.optimizer_bytes)),
        ("forward", f"{size.forward_flops / 1e6:,.1f} MFLOP a token"),
        ("training", f"{size.train_flops / 1e6:,.1f} MFLOP a token"),
        ("run", f"{settings.total_steps:,} steps, {tokens:,} tokens, {size.train_flops * tokens / 1e12:,.2f} TFLOP"),
    ]
    for line in notes:
        print(line)
    for name, value in rows:
        print(f"{name:<18}{value}")
    if size.experts_vary:
        print("data decide how many experts some layers use; counted at an even load, all where there is no top-k")


def _train(settings: Any, out: Path, fresh: bool, as_json: bool, made: Any) -> None:
    import json
    import os
    import signal

    from moestro.training.run import train

    result = train(settings, out, fresh=fresh, baseline=made)
    if os.environ.get("RANK", "0") != "0":  # under torchrun one rank speaks for all
        pass
    elif as_json:
        print(
            json.dumps({"out": str(out), "steps": result.steps, "loss": result.loss, "stopped_by": result.stopped_by})
        )
    elif result.stopped_by is None:
        print(f"trained {result.steps} steps, last loss {result.loss:.4f}; the model is in {out / 'model'}")
    else:
        name = signal.Signals(result.stopped_by).name
        print(f"stopped by {name} after step {result.steps}; the same command goes on from there")
    if result.stopped_by is not None:
        raise typer.Exit(128 + result.stopped_by)


def _mebibytes(count: int) -> str:
    """Bytes in words."""
    return f"{count / 2**20:,.1f} MiB"
