"""`moestro trace`: record where a model sends the tokens of some texts."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from moestro.core.errors import ConfigError


__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command()
    def trace(
        model: str = typer.Argument(help="Folder, hub id, GGUF file, or wheel:NAME."),
        data: list[str] = typer.Option(
            ..., "--data", help="Texts: a file, a folder or builtin:NAME; LABEL=SOURCE names them. May be repeated."
        ),
        out: Path = typer.Option(..., "-o", "--out", help="Folder of the trace, by custom NAME.trace."),
        tokens: int | None = typer.Option(20_000, "--tokens", min=1, help="Tokens of each source at most."),
        length: int = typer.Option(512, "--length", min=1, help="Tokens of a sequence at most."),
        rows: int = typer.Option(4, "--rows", min=1, help="Sequences of a batch."),
        dtype: str = typer.Option("float32", "--dtype", help="Compute type: float32, bfloat16, ... or auto."),
        field: str = typer.Option("text", "--field", help="Field of the text in .jsonl and .parquet files."),
    ) -> None:
        """Record the routing of a model over texts.

        The trace is a folder with trace.parquet and header.json; `moestro report` draws it, planners and simulators
        read it. It appears when it is complete; an interrupted recording leaves nothing.
        """
        sources = labelled(data)
        if out.exists():
            raise ConfigError(f"{out} exists; remove it or give another name with -o")
        _run(model, sources, out, tokens, length, rows, dtype, field)


def labelled(data: list[str]) -> dict[str, str]:
    """label -> source. A source without ``LABEL=`` is called by its name."""
    sources: dict[str, str] = {}
    for item in data:
        label, equals, source = item.partition("=")
        if not equals or Path(item).exists():
            label, source = Path(item).stem or item, item
            label = label.removeprefix("builtin:")
        if label in sources:
            raise ConfigError(f"two sources are called {label!r}; name them apart: --data LABEL=SOURCE")
        sources[label] = source
    return sources


def _run(
    model: str, sources: dict[str, str], out: Path, tokens: int | None, length: int, rows: int, dtype: str, field: str
) -> None:
    from moestro.data.sources import read_texts
    from moestro.models.load import load
    from moestro.models.refs import resolve
    from moestro.observe.record import record, tokenizer_hash

    texts = {label: read_texts(source, field=field) for label, source in sources.items()}
    folder = resolve(model).folder
    tokenizer = load_tokenizer(folder)
    loaded = load(model, dtype=dtype)
    with progress_bar("trace") as progress:
        found = record(
            loaded, tokenizer, texts, out, length=length, rows=rows, limit=tokens, progress=progress,
            model=model, tokenizer=model, tokenizer_hash=tokenizer_hash(folder),
            facts={"data": sources, "dtype": dtype},
        )  # fmt: skip
    header = found.header
    print(
        f"{out}: {header.num_tokens} tokens in {header.num_sequences} sequences, {len(header.layers)} routed layers, "
        f"{header.num_rows} assignments"
    )


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder; LoadError when there is none that opens."""
    from moestro.data.tokens import open_tokenizer

    return open_tokenizer(folder, local_files_only=True)


@contextmanager
def progress_bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, a line every tenth otherwise; the yielded function takes (done, total)."""
    if not sys.stderr.isatty():
        yield _Lines(name)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr)) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _Lines:
    """Plain progress lines."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.shown = -1

    def __call__(self, done: int, total: int) -> None:
        tenth = 10 * done // max(total, 1)
        if tenth > self.shown:
            self.shown = tenth
            print(f"{self.name}: {done} of {total} tokens", file=sys.stderr, flush=True)
