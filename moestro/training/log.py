"""What a run says: JSON lines always, a progress bar or plain lines on screen, TensorBoard when asked."""

import contextlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from moestro.core.errors import ConfigError, SaveError
from moestro.training.monitor import RouterReport


METRICS = "metrics.jsonl"
RUN = "run.json"


class Log:
    """Writes one JSON object a step to ``OUT/metrics.jsonl`` and tells the screen.

    Args:
        out: folder of the run. total: steps of the run. start: steps done when it (re)starts; lines of later steps,
            which a killed run may have left, are removed. every: steps between two lines on a screen that is no
            terminal. silent: nothing on screen (ranks other than the first). stream: the screen.

    Raises:
        ConfigError: TensorBoard was asked for but is not installed.
    """

    def __init__(
        self,
        out: Path,
        total: int,
        *,
        start: int = 0,
        every: int = 10,
        tensorboard: bool = False,
        silent: bool = False,
        stream: TextIO | None = None,
    ) -> None:
        self.path = out / METRICS
        self.total, self.every, self.silent = total, every, silent
        self.stream = sys.stderr if stream is None else stream
        self.done = start
        self.board = _board(out / "tensorboard", start) if tensorboard else None
        self.bar: Any = None
        self.routers = ""
        out.mkdir(parents=True, exist_ok=True)
        _cut(self.path, start)
        self.file = self.path.open("a", encoding="utf-8")

    def __enter__(self) -> Self:
        if not self.silent and self.stream.isatty():
            self.bar = _progress(self.stream)
            self.bar.start()
            self.task = self.bar.add_task("train", total=self.total, completed=self.done, note="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
        if self.board is not None:
            self.board.close()
        with contextlib.suppress(OSError):  # what could not be written was told where it was written
            self.file.close()
        if self.path.exists() and not self.path.stat().st_size:
            self.path.unlink()  # no step came to its end

    def say(self, line: str) -> None:
        """One line on screen, above the bar."""
        if self.silent:
            return
        if self.bar is not None:
            self.bar.console.print(line, highlight=False, markup=False)
        else:
            print(line, file=self.stream, flush=True)

    @staticmethod
    def announce(line: str) -> None:
        """One line on stderr, outside a run."""
        print(line, file=sys.stderr, flush=True)

    def write(self, row: Mapping[str, Any]) -> None:
        """One object into the JSON lines; numbers at its top level into TensorBoard."""
        try:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        except OSError as error:
            raise SaveError(f"{self.path}: cannot be written ({error.strerror})") from None
        if self.board is not None:
            for name, value in _numbers(row):
                self.board.add_scalar(name, value, row["step"])

    def step(self, row: Mapping[str, Any]) -> None:
        """A training step: written, and shown by the bar, or every N steps as a line."""
        self.write(row)
        self.done = int(row["step"])
        if "router" in row:
            self.routers = worst_violation(row["router"])
        parts = [f"loss {row['loss']:.4f}", f"{row['tokens_per_second']:.0f} tok/s", self.routers]
        parts += [f"lr {row['lr']:.1e}", f"grad {row['grad_norm']:.2f}"]
        note = "  ".join(part for part in parts if part)
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, note=note)
        elif self.done % self.every == 0 or self.done == self.total:
            self.say(f"step {self.done}/{self.total}  {note}")


def router_rows(reports: Mapping[str, RouterReport]) -> dict[str, dict[str, Any]]:
    """Router reports as JSON values."""
    return {
        site: {
            "load": [round(share, 6) for share in found.load],
            "assignments": found.assignments,
            "max_violation": found.max_violation,
            "load_entropy": found.load_entropy,
            "dead": found.dead,
            "token_entropy": found.token_entropy,
            "real_per_token": found.real_per_token,
        }
        for site, found in reports.items()
    }


def worst_violation(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Short words on the least even layer, empty without routers."""
    if not rows:
        return ""
    dead = sum(len(row["dead"]) for row in rows.values())
    worst = max(rows.values(), key=lambda row: row["max_violation"])
    return f"maxvio {worst['max_violation']:.2f}" + (f"  {dead} dead experts" if dead else "")


def read_metrics(out: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's JSON lines; an incomplete last line, left by a kill, is passed over."""
    path = Path(out) / METRICS
    rows = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _cut(path: Path, start: int) -> None:
    if path.exists():
        kept = [row for row in read_metrics(path.parent) if row.get("step", 0) <= start]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept), "utf-8")


def _numbers(row: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for key, value in row.items():
        if isinstance(value, Mapping):
            found += _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and key != "step":
            found.append((f"{prefix}{key}", float(value)))
    return found


def _board(folder: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError("monitor.tensorboard needs the package tensorboard: pip install tensorboard") from None
    return SummaryWriter(str(folder), purge_step=start + 1 if start else None)


def _progress(stream: TextIO) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")  # what does not fit is cut, the bar never is
    return Progress(
        BarColumn(bar_width=12, table_column=Column(min_width=12)),
        MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=7)),
        TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
        TextColumn("{task.fields[note]}", table_column=rest),
        console=Console(file=stream),
        expand=True,
    )
