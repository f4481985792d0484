"""The page without a browser: well-formed, complete, safe against hostile text, its numbers those of the trace."""

import base64
import json
import math
import os
import re
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from moestro import report
from moestro.core.errors import ConfigError, DataError, TraceError
from moestro.core.trace import RoutingTrace
from moestro.report import scale


VOID = {"meta", "link", "br", "img", "input", "hr"}
HOSTILE = "</script><script>window.pwned=1</script><img src=x onerror=window.pwned=1>\"'>{{ 7*7 }}<!--\u202e\u2028"


class Page(HTMLParser):
    """A strict reader: every element closed in order; collects text, ids, attributes and scripts."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.scripts, self.texts = [], [], [], {}
        self.feed(html)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"an attribute twice on {tag}"
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append([dict(attrs), ""])

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> without a start"
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1][1] += data
        for place, tag in enumerate(self.open):
            self.texts.setdefault((place, tag), []).append(data)

    def ids(self):
        return [attrs["id"] for _, attrs in self.elements if "id" in attrs]

    def by_id(self, name):
        return next(attrs for _, attrs in self.elements if attrs.get("id") == name)

    def payload(self):
        return json.loads(next(text for attrs, text in self.scripts if attrs.get("id") == "data"))


@pytest.fixture(scope="session")
def html(recorded, tokenizer, parts, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    assert report.write(path, title="A toy mixture", trace=recorded, tokenizer=tokenizer, **parts) == path
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def page(html):
    return Page(html)


def unpack(packed):
    kind = {8: "u1", 16: "<u2", 32: "<u4"}[packed["bits"]]
    return np.frombuffer(base64.b64decode(packed["data"]), dtype=kind).astype(np.int64) * packed["scale"]


def words(html, start, stop="</section>"):
    part = html[html.index(start) :]
    part = part[: part.index(stop)]
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", part))


# -- structure --------------------------------------------------------------------------------------------------


def test_every_figure_is_there_once(page):
    ids = page.ids()
    assert len(ids) == len(set(ids)), [name for name, count in Counter(ids).items() if count > 1]
    for section in ("load", "label", "entropy", "pairs", "affinity", "tokens", "training", "comparison", "samples",
                    "receipt"):  # fmt: skip
        assert f"{section}-section" in ids
    for figure in ("load", "tag-0", "tag-1", "tag-2", "tag-information", "entropy", "pairs", "affinity", "hops",
                   "tokens", "run-loss", "run-losses", "run-evenness", "run-violation", "run-idle", "run-certainty",
                   "run-grad", "run-lr", "run-speed"):  # fmt: skip
        assert figure in ids


def test_links_and_labels_lead_somewhere(page):
    ids = set(page.ids())
    for tag, attrs in page.elements:
        if tag == "a":
            assert attrs["href"].removeprefix("#") in ids
        for name in ("for", "aria-labelledby", "aria-describedby", "data-for"):
            if name in attrs:
                assert attrs[name] in ids, f"{name}={attrs[name]}"
        if attrs.get("role") == "img":
            assert attrs["aria-label"].strip()
            assert attrs["tabindex"] == "0"


def test_nothing_is_asked_from_anywhere(html, page):
    without_namespace = html.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|//[a-z]|@import|url\(", without_namespace.split("<script")[0])
    assert "http" not in re.sub(r"</?a[^>]*>", "", without_namespace[without_namespace.rindex("<script>") :])
    for tag, attrs in page.elements:
        assert "src" not in attrs
        assert tag != "link" or attrs["href"] == "data:,"
    policy = next(attrs["content"] for tag, attrs in page.elements if attrs.get("http-equiv"))
    assert policy.startswith("default-src 'none'")


def test_the_policy_allows_the_one_script(page):
    import hashlib

    code = next(text for attrs, text in page.scripts if not attrs)
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    policy = next(attrs["content"] for tag, attrs in page.elements if attrs.get("http-equiv"))
    assert f"script-src 'sha256-{digest}'" in policy
    assert len(page.scripts) == 2


def test_hostile_text_stays_text(tmp_path, recorded):
    class Tokenizer:
        def decode(self, ids, **_):
            return HOSTILE * len(ids)

    header = recorded.header.model_copy(update={"model": HOSTILE, "model_hash": HOSTILE})
    trace = RoutingTrace.open(recorded.path)
    trace.header = header.model_copy(update={"tags": (*header.tags[:2], header.tags[2])})
    facts = {HOSTILE: {HOSTILE: [HOSTILE, {HOSTILE: HOSTILE}], "rows": [{HOSTILE: HOSTILE}]}}
    path = report.write(
        tmp_path / "x.html", title=HOSTILE, trace=trace, tokenizer=Tokenizer(), receipt=facts,
        comparisons={"title": HOSTILE, "note": HOSTILE, "rows": [{HOSTILE: HOSTILE, "n": 1}]},
        samples=[{"model": HOSTILE, "prompt": HOSTILE, "text": HOSTILE}],
        metrics=[{"step": 1, "loss": 1.0, "losses": {HOSTILE: 1.0, "b": 2.0}}, {"step": 2, "loss": 1.0}],
    )  # fmt: skip
    page = Page(path.read_text(encoding="utf-8"))
    assert len(page.scripts) == 2
    assert not [tag for tag, _ in page.elements if tag in {"img", "iframe", "object", "embed", "form", "base"}]
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    assert HOSTILE in "".join(page.texts[(1, "head")])
    page.payload()


def test_hostile_labels_stay_text(tmp_path, tokenizer, make_trace):
    from pathlib import Path

    texts = {HOSTILE: "some words " * 20, "b<b>": "other words " * 20}
    trace = make_trace(tmp_path / "x.trace", tokenizer, layers=2, experts=4, sequences=1, length=16, texts=texts)
    page = Page(report.write(tmp_path / "x.html", title="t", trace=trace).read_text(encoding="utf-8"))
    assert len(page.scripts) == 2
    assert not [tag for tag, _ in page.elements if tag in {"img", "b<b"}]
    assert HOSTILE in "".join(page.texts[(1, "body")])
    assert Path(tmp_path / "x.html").stat().st_mode & 0o444 == 0o444


# -- numbers ----------------------------------------------------------------------------------------------------


def test_loads_in_the_page_are_the_traces(page, recorded):
    found = page.payload()["heat"]
    table = unpack(found["load"]["counts"]).reshape(5, 12)
    assert table.tolist() == [recorded.load(layer).tolist() for layer in recorded.layers]
    for place, tag in enumerate(("code", "prose", "German")):
        mine = unpack(found[f"tag-{place}"]["counts"]).reshape(5, 12)
        assert mine.tolist() == [recorded.load(layer, tag).tolist() for layer in recorded.layers]


def test_matrices_in_the_page_are_the_traces(page, recorded):
    choosers = page.payload()["choosers"]
    for layer in recorded.layers:
        found = unpack(choosers["pairs"]["maps"][str(layer)]["counts"]).reshape(12, 12)
        assert found.tolist() == recorded.coactivation(layer).tolist()
    for a, b in zip(recorded.layers, recorded.layers[1:], strict=False):
        found = unpack(choosers["affinity"]["maps"][f"{a}-{b}"]["counts"]).reshape(12, 12)
        assert found.tolist() == recorded.affinity(a, b).tolist()


def test_tokens_in_the_page_are_the_traces(page, recorded, html, tokenizer):
    data = page.payload()["tokens"]
    shown = [int(number) for number in re.findall(r"<h3>Sequence (\d+)", html)]
    assert len(shown) == 6
    assert {recorded.tokens(number).tags[0][0] for number in shown} == {"code", "prose", "German"}
    for layer in recorded.layers:
        view = data[str(layer)]
        ids = unpack(view["ids"]).reshape(-1, view["k"]) - 1
        weights = unpack(view["weights"]).reshape(-1, view["k"]) / 65535 * view["top"]
        expected = torch.cat([recorded.tokens(number).expert[layer][0] for number in shown])
        assert ids.tolist() == expected.tolist()
        expected = torch.cat([recorded.tokens(number).weight[layer][0] for number in shown])
        assert np.abs(weights - expected.numpy()).max() < 1e-4
    texts = re.findall(r'<p class="text">(.*?)</p>', html, flags=re.S)
    import html as entities

    for number, text in zip(shown, texts, strict=True):
        plain = entities.unescape(re.sub(r"<[^>]+>", "", text)).replace("↵\n", "\n")
        assert plain == tokenizer.decode(recorded.tokens(number).token_BS[0])


def test_the_coloured_tokens_are_those_of_the_busiest_experts(html, recorded, page):
    layer = recorded.layers[2]
    legend = re.findall(r'<button type="button" class="(t\d)" data-expert="(\d+)" [^>]*>\d+ <span>(\d+)</span>', html)
    colour = {int(expert): cls for cls, expert, _ in legend}
    shown = [int(number) for number in re.findall(r"<h3>Sequence (\d+)", html)]
    first = torch.cat([recorded.tokens(number).expert[layer][0, :, 0] for number in shown]).tolist()
    classes = re.findall(r'<span class="(t\w)">', "".join(re.findall(r'<p class="text">(.*?)</p>', html, flags=re.S)))
    assert classes == [colour.get(expert, "tr") for expert in first]
    counts = Counter(first)
    assert {int(expert): int(count) for _, expert, count in legend} == dict(counts.most_common(8))


def test_tables_and_tiles_say_what_the_trace_says(html, recorded):
    text = words(html, 'id="load-section"')
    for layer in recorded.layers:
        load = recorded.load(layer)
        part = f"{100 * load.max().item() / load.sum().item():.1f}"
        assert f"{load.argmax()} ({part}" in text
        assert f"{math.exp(recorded.entropy(layer)):.4g}" in text
        assert f"{recorded.entropy(layer) / math.log(12):.4g}" in text
    tiles = words(html, '<dl class="tiles">', "</dl>")
    idle = sum(int((recorded.load(layer) == 0).sum()) for layer in recorded.layers)
    peak = max((recorded.load(layer) / recorded.load(layer).float().mean()).max().item() for layer in recorded.layers)
    for figure in (f"tokens traced {recorded.header.num_tokens}", f"idle experts {idle}", f"highest load {peak:.2f}×"):
        assert figure in tiles
    assert idle >= 2


def test_drawn_cells_are_the_steps_of_the_ratios(html, recorded):
    drawn = cells_of(html, "load", 5, 12)
    for row, layer in enumerate(recorded.layers):
        load = recorded.load(layer).tolist()
        mean = sum(load) / len(load)
        for expert, count in enumerate(load):
            ratio = count / mean
            step = "z" if count == 0 else f"b{sum(ratio >= edge for edge in (0.25, 0.5, 0.8, 1.25, 2, 4))}"
            assert drawn[row][expert] == (None if step == "z" else step)
    strokes = re.search(r'id="load".*?class="strokes" d="([^"]*)"', html, flags=re.S).group(1)
    struck = [(int(r) - 1, int(c)) for c, r in re.findall(r"M(\d+) (\d+)l1-1", strokes)]
    loads = torch.stack([recorded.load(layer) for layer in recorded.layers])
    assert struck == [tuple(place) for place in (loads == 0).nonzero().tolist()]


def cells_of(html, name, rows, columns):
    """The class that covers each cell of a drawn map; None for cells never chosen or not drawn."""
    svg = re.search(rf'id="{name}".*?<g class="cells">(.*?)</g>', html, flags=re.S).group(1)
    grid = [[None] * columns for _ in range(rows)]
    for cls, path in re.findall(r'<path class="(\w+)" d="([^"]*)"/>', svg):
        for start, row, width, back in re.findall(r"M(\d+) (\d+)h(\d+)v1H(\d+)z", path):
            assert start == back
            for column in range(int(start), int(start) + int(width)):
                assert grid[int(row)][column] is None, "two rectangles on one cell"
                grid[int(row)][column] = None if cls == "z" else cls
    return grid


def test_comparisons_mark_the_best(html):
    text = html[html.index('id="comparison-section"') :]
    best = re.findall(r'<td class="n best">([^<]*)<', text)
    assert best == ["2\u202f140", "14.61"]


def test_the_receipt_shows_every_fact(html):
    text = words(html, 'id="receipt-section"')
    for fact in ("convert.upcycle", "2.384e-06", "yes", "4, 5, 6, 7", "538 090 408", "and 32 more"):
        assert fact in text.replace("\u202f", " ")


# -- parts left out, and errors ---------------------------------------------------------------------------------


def test_each_part_alone_makes_a_page(tmp_path, recorded, parts):
    for name, value in {"trace": recorded, **parts}.items():
        page = Page(report.write(tmp_path / f"{name}.html", title=name, **{name: value}).read_text(encoding="utf-8"))
        assert page.payload()["tokens"] is None or name == "trace"


def test_files_and_folders_do_as_well(tmp_path, recorded, parts, html, tokenizer):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in parts["metrics"]) + '{"step": 9')
    for name in ("receipt", "comparisons"):
        (tmp_path / f"{name}.json").write_text(json.dumps(parts[name]))
    path = report.write(
        tmp_path / "x.html", title="A toy mixture", trace=recorded.path, tokenizer=tokenizer, metrics=tmp_path,
        receipt=tmp_path / "receipt.json", comparisons=tmp_path / "comparisons.json", samples=parts["samples"],
    )  # fmt: skip
    assert path.read_text(encoding="utf-8") == html


def test_top_one_ragged_and_empty_traces(tmp_path, tokenizer, make_trace):
    one = make_trace(tmp_path / "one.trace", tokenizer, layers=1, experts=3, top_k=1, sequences=1, length=8,
                       texts={"a": "words " * 9})  # fmt: skip
    page = Page(report.write(tmp_path / "one.html", title="one", trace=one).read_text(encoding="utf-8"))
    assert "pairs-section" not in page.ids()
    assert "affinity-section" not in page.ids()
    assert "label-section" not in page.ids()
    assert "per-token-section" not in page.ids()
    from moestro.core.trace_writer import TraceWriter

    TraceWriter(tmp_path / "none.trace").close()
    empty = RoutingTrace.open(tmp_path / "none.trace")
    Page(report.write(tmp_path / "none.html", title="none", trace=empty).read_text(encoding="utf-8"))


def by_hand(trace, layer, tag=None):
    """Tokens by number of real experts, counted row by row from the sequences."""
    counts = Counter()
    for number in range(trace.header.num_sequences):
        view = trace.tokens(number)
        if tag is None or view.tags[0][0] == tag:
            rows = view.expert[layer][0].tolist()
            counts.update(sum(0 <= expert < trace.layer(layer).num_experts for expert in row) for row in rows)
    return counts


@pytest.mark.parametrize("how", [{"p": 0.5}, {"p": 0.5, "nulls": 3}, {"top_k": 3, "nulls": 5}])
def test_experts_a_token_where_their_number_varies(tmp_path, tokenizer, make_trace, how):
    trace = make_trace(tmp_path / "x.trace", tokenizer, layers=3, experts=9, sequences=2, length=64, **how)
    html = report.write(tmp_path / "x.html", title="x", trace=trace).read_text(encoding="utf-8")
    page = Page(html)
    ids = page.ids()
    assert {"per-token-section", "per-token", "per-token-map"} <= set(ids)
    assert len(ids) == len(set(ids))
    expected = [by_hand(trace, layer) for layer in trace.layers]
    assert max(len(counts) for counts in expected) >= 3
    drawn = page.payload()["heat"]["per-token-map"]
    table = unpack(drawn["counts"]).reshape(3, -1)
    assert table.tolist() == [[counts[number] for number in range(len(drawn["columns"]))] for counts in expected]
    assert table[:, -1].any()
    lines = {line["name"]: line["y"] for line in page.payload()["lines"]["per-token"]["series"]}
    assert next(iter(lines)) == "all tokens"
    assert set(lines) == {"all tokens", "code", "prose", "German"}
    for tag, means in lines.items():
        for layer, found in zip(trace.layers, means, strict=True):
            counts = by_hand(trace, layer, None if tag == "all tokens" else tag)
            assert found == pytest.approx(sum(k * n for k, n in counts.items()) / counts.total())
    total = sum(expected, Counter())
    tiles = words(html, '<dl class="tiles">', "</dl>")
    average = sum(k * n for k, n in total.items()) / total.total()
    assert f"{round(average, 2):.4g} a token, {min(total)} to {max(total)} " in tiles
    text = words(html, 'id="per-token-section"')
    for tag in ("code", "prose", "German"):
        mine = sum((by_hand(trace, layer, tag) for layer in trace.layers), Counter())
        none = f"{100 * mine[0] / mine.total():.1f} %"
        said = f"{tag} {round(sum(k * n for k, n in mine.items()) / mine.total(), 3):.4g}"
        assert re.search(rf"{said} [\d.]+× {none} {max(mine)}\b", text), (said, none, text)


def recorded_once(path, routing, **session):
    """A trace of one forward of one layer over four tokens of one row."""
    from moestro.core.context import RoutingContext
    from moestro.core.session import Session
    from moestro.core.tokens import Tokens
    from moestro.core.trace_writer import TraceWriter

    tokens = Tokens(torch.zeros(4, dtype=torch.int64), torch.arange(4), torch.tensor([True] * 4), None, 1, 4)
    with TraceWriter(path) as writer:
        writer.record("layers.0.mlp", routing, RoutingContext("model", Session(**session), tokens))
    return Page(report.write(path.with_suffix(".html"), title="x", trace=path).read_text(encoding="utf-8"))


def test_experts_a_token_where_capacity_drops_some(tmp_path):
    """Two of four tokens lose their one expert: a regular top-1 then has a number that varies."""
    from moestro.core.routing import Routing

    routing = Routing.from_topk(torch.tensor([[0], [1], [0], [1]]), torch.ones(4, 1), num_experts=2)
    assert "per-token-section" not in recorded_once(tmp_path / "all.trace", routing).ids()
    dropped = routing.replace(kept_N=torch.tensor([True, True, False, False]))
    page = recorded_once(tmp_path / "some.trace", dropped)
    assert unpack(page.payload()["heat"]["per-token-map"]["counts"]).tolist() == [2, 2]


def test_experts_a_token_by_a_label_of_single_tokens(tmp_path):
    """Labels such as a token's difficulty: 3 and 1 experts where it is 1, 2 and 0 where it is 0."""
    from moestro.core.routing import Routing

    used = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 1], [0, 0, 0]]).bool()
    routing = Routing.from_mask(used, torch.ones(4, 3), num_experts=3)
    page = recorded_once(tmp_path / "x.trace", routing, tags={"tag": torch.tensor([[1, 0, 1, 0]])})
    lines = {line["name"]: line["y"] for line in page.payload()["lines"]["per-token"]["series"]}
    assert lines == {"all tokens": [1.5], "1": [2.0], "0": [1.0]}
    assert unpack(page.payload()["heat"]["per-token-map"]["counts"]).tolist() == [1, 1, 1, 1]


def test_large_layers_show_their_busiest_experts(tmp_path, tokenizer, make_trace):
    trace = make_trace(tmp_path / "x.trace", tokenizer, layers=2, experts=100, top_k=4, sequences=1, length=128)
    html = report.write(tmp_path / "x.html", title="large", trace=trace).read_text(encoding="utf-8")
    found = Page(html).payload()["choosers"]["pairs"]["maps"]["4"]
    load = trace.load(4)
    busiest = sorted(torch.sort(load, descending=True, stable=True).indices[:64].tolist())
    assert found["rows"] == [str(expert) for expert in busiest]
    assert unpack(found["counts"]).reshape(64, 64).tolist() == trace.coactivation(4)[busiest][:, busiest].tolist()
    assert "the 64 busiest of 100 experts" in html


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, recorded):
    target = tmp_path / "out" / "x.html"
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "bad.jsonl").write_text('{"step": 1}\n[]\n{"step": 2}\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "deep.json").write_text('{"a":' * 600 + "1" + "}" * 600)
    deep = json.loads("[" * 600 + "]" * 600)
    for error, message, given in (
        (ConfigError, "nothing to report", {}),
        (DataError, "not a JSON file", {"receipt": tmp_path / "bad.json"}),
        (DataError, "No such file", {"receipt": tmp_path / "none.json"}),
        (DataError, "line 2 is no JSON object", {"metrics": tmp_path / "bad.jsonl"}),
        (DataError, "no line in it", {"metrics": tmp_path / "empty.jsonl"}),
        (DataError, "No such file", {"metrics": tmp_path / "none.jsonl"}),
        (DataError, "expected a list of objects", {"comparisons": [1, 2]}),
        (DataError, "expected a list of objects", {"comparisons": {"rows": 3}}),
        (DataError, "expected a list of objects", {"comparisons": {"rows": {"a": 1}}}),
        (DataError, "expected a list of objects", {"comparisons": 3}),
        (DataError, '"better" maps columns', {"comparisons": {"rows": [{"a": 1}], "better": 5}}),
        (DataError, '"better" maps columns', {"comparisons": {"rows": [{"a": 1}], "better": {"a": "up"}}}),
        (DataError, "receipt: expected an object", {"receipt": tmp_path / "list.json"}),
        (DataError, "receipt: nested more than 32 levels", {"receipt": tmp_path / "deep.json"}),
        (DataError, "comparisons: nested more than 32 levels", {"comparisons": [{"a": deep}]}),
        (DataError, "samples: nested more than 32 levels", {"samples": [{"text": deep}]}),
        (TraceError, "no such trace", {"trace": tmp_path / "none.trace"}),
    ):
        with pytest.raises(error, match=message) as caught:
            report.write(target, title="x", **given)
        assert "\n" not in str(caught.value)
    assert not target.exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="the report was not written"):
        report.write(tmp_path / "file" / "x.html", title="x", receipt={"a": 1})


def test_facts_as_deep_as_allowed_are_shown(tmp_path):
    facts = json.loads('{"a":' * 32 + '"the end"' + "}" * 32)
    assert "the end" in report.write(tmp_path / "x.html", title="x", receipt=facts).read_text(encoding="utf-8")
    with pytest.raises(DataError, match="nested more than 32 levels"):
        report.write(tmp_path / "x.html", title="x", receipt={"a": facts})


def test_a_page_does_not_take_the_place_of_a_pipe_or_a_folder(tmp_path):
    """It is renamed into place: what stands there must be a page, or a link to one."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "folder", "link"):
        with pytest.raises(ConfigError, match=f"{name}: exists and is not a file"):
            report.write(tmp_path / name, title="x", receipt={"a": 1})
    assert (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "link").is_symlink()
    assert sorted(item.name for item in tmp_path.iterdir()) == ["folder", "link", "pipe"]


def test_a_failed_write_keeps_the_old_page(tmp_path, monkeypatch):
    path = report.write(tmp_path / "x.html", title="first", receipt={"a": 1})
    before = path.read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DataError, match="No space left on device; the report was not written"):
        report.write(path, title="second", receipt={"a": 1})
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["x.html"]


def test_scale_rules_against_written_out_cases():
    assert scale.row_ratio(np.array([[1, 3], [0, 0]])).tolist()[0] == [0.5, 1.5]
    assert np.isnan(scale.row_ratio(np.array([[0, 0]]))).all()
    independent = np.outer([1, 2, 3], [4, 5])
    assert np.allclose(scale.transition_ratio(independent), 1)
    assert scale.information(independent * 1000) == 0
    assert scale.information(np.eye(4, dtype=np.int64) * 10**6) == pytest.approx(2, abs=1e-5)
    load = np.array([1, 2, 3, 14])  # an expert that most tokens use has no more pairs than there are partners
    together = np.outer(load, load) * 1000
    off = ~np.eye(4, dtype=bool)
    assert np.allclose(scale.pair_ratio(together)[off], 1)
    assert np.isnan(np.diag(scale.pair_ratio(together))).all()
    together = np.array([[9, 5, 3, 1], [5, 9, 0, 4], [3, 0, 9, 6], [1, 4, 6, 9]])
    factors = scale.pair_factors(together)
    due = np.outer(factors, factors) * off
    assert np.allclose(due.sum(1), (together * off).sum(1))
    assert np.allclose(scale.pair_ratio(together)[off], together[off] / due[off])
    part, whole = np.array([[2, 0, 0]]), np.array([[2, 2, 0]])
    assert np.allclose(scale.share_ratio(part, whole), [[2, 0, np.nan]], equal_nan=True)
    assert scale.steps(np.array([0, 0.1, 0.25, 0.8, 1, 1.25, 4, 99, np.nan])).tolist() == [7, 0, 1, 3, 3, 4, 6, 6, -1]
