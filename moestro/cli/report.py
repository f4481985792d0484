"""`moestro report`: one HTML page of a trace, a run and a receipt."""

import sys
from pathlib import Path
from typing import Any

import typer

from moestro.core.errors import ConfigError, DataError


__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command()
    def report(
        inputs: list[Path] = typer.Argument(
            help="Trace folders, and model or run folders (receipt.json, metrics.jsonl, comparisons.json, samples.json "
            "and a *.trace in them are taken)."
        ),
        out: Path = typer.Option(..., "-o", "--out", help="The HTML file; an existing one is replaced."),
        title: str | None = typer.Option(None, "--title", help="Heading; the model's name when left out."),
        tokenizer: str | None = typer.Option(None, "--tokenizer", help="Where the tokenizer is, if not beside these."),
        metrics: Path | None = typer.Option(None, "--metrics", help="metrics.jsonl of a training run."),
        receipt: Path | None = typer.Option(None, "--receipt", help="JSON file of nested facts."),
        comparisons: Path | None = typer.Option(None, "--comparisons", help="JSON file of rows to compare."),
        samples: Path | None = typer.Option(None, "--samples", help="JSON file of texts the model wrote."),
    ) -> None:
        """Write a self-contained report: loads, labels, pairs, transitions, entropy, tokens, training, receipt."""
        found = collect(inputs)
        given = {"metrics": metrics, "receipt": receipt, "comparisons": comparisons, "samples": samples}
        found |= {name: path for name, path in given.items() if path is not None}
        _run(found, out, title, tokenizer, inputs)


NAMES = {
    "metrics": "metrics.jsonl",
    "receipt": "receipt.json",
    "comparisons": "comparisons.json",
    "samples": "samples.json",
}


def collect(inputs: list[Path]) -> dict[str, Path]:
    """What the folders hold: part of the report -> file or folder.

    Raises:
        DataError: a folder that is missing or holds nothing to report. ConfigError: two traces.
    """
    found: dict[str, Path] = {}
    for path in inputs:
        if not path.exists():
            raise DataError(f"{path}: no such folder; give a trace, or the folder of a model or a run")
        before = len(found)
        is_trace = (path / "header.json").exists() or path.suffix == ".trace"
        traces = [path] if is_trace else sorted(path.glob("*.trace"))
        if len(traces) + ("trace" in found) > 1:
            raise ConfigError(
                f"{path}: a report shows one trace, there are {len(traces) + ('trace' in found)}; name it"
            )
        for trace in traces:
            found["trace"] = trace
        for part, name in NAMES.items():
            if (path / name).is_file():
                found[part] = path / name
        if len(found) == before:
            raise DataError(
                f"{path}: nothing to report there; expected header.json of a trace, {', '.join(NAMES.values())}"
            )
    return found


def _run(found: dict[str, Path], out: Path, title: str | None, tokenizer: str | None, inputs: list[Path]) -> None:
    from moestro.core.trace import RoutingTrace
    from moestro.report import write
    from moestro.report.page import check_target, read_json

    check_target(out)
    trace = RoutingTrace.open(found["trace"]) if "trace" in found else None
    samples = read_json(found["samples"]) if "samples" in found else None
    if samples is not None and not (isinstance(samples, list) and all(isinstance(one, dict) for one in samples)):
        raise DataError(f"{found['samples']}: expected a list of objects")
    named = trace.header.model if trace is not None else ""
    write(
        out,
        title=title or named or inputs[0].resolve().name,
        trace=trace,
        tokenizer=_tokenizer(tokenizer, trace, inputs),
        metrics=found.get("metrics"),
        receipt=found.get("receipt"),
        comparisons=found.get("comparisons"),
        samples=samples,
    )
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, {', '.join(sorted(found))}")


def _tokenizer(asked: str | None, trace: Any, inputs: list[Path]) -> Any:
    """The tokenizer that was asked for; else the trace's or one beside the inputs, if it opens; else None."""
    if trace is None:
        return None
    from moestro.cli.trace import load_tokenizer
    from moestro.models.refs import resolve

    if asked is not None:
        return load_tokenizer(Path(asked) if Path(asked).is_dir() else resolve(asked).folder)
    for folder in inputs:
        if (folder / "tokenizer.json").is_file() or (folder / "tokenizer_config.json").is_file():
            return load_tokenizer(folder)
    from moestro.core.errors import MoestroError

    if trace.header.tokenizer:
        try:
            return load_tokenizer(resolve(trace.header.tokenizer).folder)
        except MoestroError as error:
            print(f"note: tokens are shown as ids: {error}; give --tokenizer", file=sys.stderr)
    return None
