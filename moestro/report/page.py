"""The page: facts and figures into one HTML file that asks for nothing from anywhere."""

import base64
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from moestro.core.errors import ConfigError, DataError
from moestro.core.trace import RoutingTrace
from moestro.core.version import VERSION
from moestro.report import scale
from moestro.report.curves import curves, read_metrics
from moestro.report.plots import HeatMap, LineChart
from moestro.report.routing import RoutingFigures, routing_figures
from moestro.report.text import Node, nodes, number, plain
from moestro.report.tokens import TokenView, token_view


Record = Mapping[str, Any]
DEEPEST = 32  # levels of nested facts that a page shows


def write(
    path: str | Path,
    *,
    title: str,
    trace: RoutingTrace | str | Path | None = None,
    tokenizer: Any = None,
    metrics: Sequence[Record] | str | Path | None = None,
    receipt: Record | str | Path | None = None,
    comparisons: Sequence[Record] | Record | str | Path | None = None,
    samples: Sequence[Record] | None = None,
) -> Path:
    """Write the report.

    Args:
        path: the file to write; an existing one is replaced in one step.
        title: heading of the page.
        trace: an open trace or its folder. tokenizer: a Transformers tokenizer that turns its ids into text.
        metrics: rows of a run, its folder, or its ``metrics.jsonl``.
        receipt: nested facts, or a JSON file of them.
        comparisons: rows such as ``{"model": "dense parent", "perplexity": 23.1}``, or ``{"title": ..., "note": ...,
            "better": {"perplexity": "lower"}, "rows": [...]}``, or a JSON file of either.
        samples: texts the model wrote: ``{"model": ..., "prompt": ..., "text": ...}``.

    Returns:
        The path.

    Raises:
        ConfigError: nothing to report, or a folder or a device stands at the path. DataError: a file that is missing or
            not what it should be. TraceError: the trace cannot be read.
    """
    check_target(path)
    if all(part is None for part in (trace, metrics, receipt, comparisons, samples)):
        raise ConfigError("nothing to report: give a trace, metrics, a receipt, comparisons or samples")
    opened = RoutingTrace.open(trace) if isinstance(trace, (str, Path)) else trace
    rows = read_metrics(metrics) if isinstance(metrics, (str, Path)) else metrics
    facts, compared = read_json(receipt), read_json(comparisons)
    for name, value in (("receipt", facts), ("comparisons", compared), ("samples", samples)):
        _check_depth(name, value)
    if not isinstance(facts, Mapping | None):
        raise DataError("receipt: expected an object of facts")
    figures = routing_figures(opened) if opened is not None else None
    tokens = token_view(opened, tokenizer) if opened is not None else None
    charts = curves(rows) if rows else []
    html = _render(
        title=title,
        header=opened.header if opened is not None else None,
        figures=figures,
        tokens=tokens,
        curves=charts,
        receipt=nodes(facts or {}),
        comparison=_comparison(compared),
        samples=[{str(key): plain(value) for key, value in sample.items()} for sample in samples or ()],
        payload=_payload(figures, tokens, charts),
    )
    return _replace(Path(path), html)


def check_target(path: str | Path) -> None:
    """Raise ConfigError where a folder, a pipe or a device stands: a page is renamed into place, and would end it."""
    if Path(path).exists() and not Path(path).is_file():
        raise ConfigError(f"{path}: exists and is not a file; give the report another name")


def _check_depth(name: str, value: Any) -> None:
    """Raise DataError for facts nested deeper than a page can show."""
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [part for item in level for part in _parts(item)]
    if level:
        raise DataError(f"{name}: nested more than {DEEPEST} levels deep; give flatter facts")


def _parts(value: Any) -> Iterable[Any]:
    """What the page takes apart, as ``nodes`` and ``plain`` do."""
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else ()


def read_json(source: Any) -> Any:
    """A value as it is, or what a JSON file holds. Raises DataError for a file that is missing or no JSON."""
    if not isinstance(source, (str, Path)):
        return source
    try:
        return json.loads(Path(source).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{source}: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise DataError(f"{source}: not a JSON file") from None


def _comparison(source: Any) -> dict[str, Any] | None:
    """Title, note, head and rows of (text, is the best of its column, is a number)."""
    if not source:
        return None
    whole = source if isinstance(source, Mapping) else {"rows": source}
    rows, sense = whole.get("rows"), whole.get("better", {})
    if not rows or not isinstance(rows, Sequence) or not all(isinstance(row, Mapping) for row in rows):
        raise DataError("comparisons: expected a list of objects, one a row")
    if not isinstance(sense, Mapping) or not all(better in ("higher", "lower") for better in sense.values()):
        raise DataError('comparisons: "better" maps columns to "higher" or "lower"')
    head = list(dict.fromkeys(str(key) for row in rows for key in row))
    best = {}
    for column, better in sense.items():
        values = [row[column] for row in rows if isinstance(row.get(column), (int, float))]
        if values:
            best[column] = max(values) if better == "higher" else min(values)
    cells = [
        [(plain(row.get(key)), key in best and row.get(key) == best[key], _is_number(row.get(key))) for key in head]
        for row in rows
    ]
    return {"title": whole.get("title", ""), "note": whole.get("note", ""), "head": head, "rows": cells}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _payload(figures: RoutingFigures | None, tokens: TokenView | None, charts: Sequence[LineChart]) -> dict[str, Any]:
    """What the script reads: every figure's numbers by id."""
    heat: dict[str, Any] = {}
    lines = {chart.name: chart.data() for chart in charts}
    choosers: dict[str, Any] = {}
    if figures is not None:
        maps: list[HeatMap] = [heat_map for _, _, heat_map in figures.by_tag]
        heat = {item.name: item.data() for item in ([figures.load] if figures.load else []) + maps}
        for chooser in (figures.pairs, figures.affinity):
            if chooser is not None:
                choosers[chooser.name] = chooser.data
        many = figures.per_token
        if many is not None:
            heat[many.counts.name] = many.counts.data()
        for chart in (many and many.means, figures.entropy, figures.tag_information, figures.affinity_chart):
            if chart is not None:
                lines[chart.name] = chart.data()
    return {
        "edges": scale.EDGES,
        "labels": scale.LABELS,
        "heat": heat,
        "choosers": choosers,
        "lines": lines,
        "tokens": tokens.data if tokens is not None else None,
    }


def script_json(value: Any) -> Markup:
    """JSON that cannot end the script element it stands in, nor open a comment or another element."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    for mark in "<>&":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return Markup(text)


def _visible(text: str) -> str:
    """Token text with line ends and other control characters made visible; escaping is the template's."""
    out = []
    for char in text:
        if char == "\n":
            out.append("↵\n")
        elif char == "\t":
            out.append("→\t")
        elif ord(char) < 32:
            out.append(chr(0x2400 + ord(char)))
        else:
            out.append(char)
    return "".join(out)


def _render(**values: Any) -> str:
    folder = resources.files("moestro.report") / "templates"
    style = (folder / "report.css").read_text(encoding="utf-8")
    script = (folder / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(number=number, visible=_visible, script_json=script_json)
    environment.tests["group"] = lambda node: isinstance(node, Node) and bool(node.children)
    template = environment.from_string((folder / "report.html.j2").read_text(encoding="utf-8"))
    return template.render(
        **values,
        style=Markup(style),
        script=Markup(script),
        script_hash=digest,
        version=VERSION,
        scale_labels=scale.LABELS,
    )


def _replace(path: Path, html: str) -> Path:
    """Write beside the target and rename, so that a reader never meets half a page."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
                file.write(html)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o644)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; the report was not written") from None
    return path
