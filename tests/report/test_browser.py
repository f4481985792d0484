"""The page in a real browser, driven over a pipe: no complaint, no request, no sideways scrolling, keys that work."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest

from moestro import report


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe",
]  # fmt: skip
# The browser reads from descriptor 3 and writes to 4.
START = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
for end, place in zip(ends, (3, 4)):
    os.dup2(end, place)
os.execvp(sys.argv[3], sys.argv[3:])
"""

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine; install it with: apt-get install -y chromium"
)


class Browser:
    """Chromium over the DevTools protocol on a pipe: messages are JSON ended by a zero byte."""

    def __init__(self, profile):
        read_ours, write_theirs = os.pipe()
        read_theirs, write_ours = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, str(read_theirs), str(write_theirs), CHROMIUM, *FLAGS,
             f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(read_theirs, write_theirs), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(read_theirs)
        os.close(write_theirs)
        self._in, self._out = os.fdopen(read_ours, "rb"), os.fdopen(write_ours, "wb")
        self._number, self.events, self._session = 0, [], None

    def start(self):
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, name, **parameters):
        self._number += 1
        message = {"id": self._number, "method": name, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        self._out.flush()
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            self.events.append(answer)

    def _read(self):
        found = bytearray()
        while (byte := self._in.read(1)) != b"\0":
            assert byte, "the browser is gone"
            found += byte
        return json.loads(found)

    def open(self, path, width=1280, height=900, dark=False):
        self.events.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media="", features=[scheme])
        self.call("Page.navigate", url=path.as_uri())
        for _ in range(200):
            if self.js("document.readyState === 'complete' && location.protocol === 'file:'"):
                return
            time.sleep(0.05)
        raise AssertionError("the page did not load in 10 seconds")

    def js(self, code):
        answer = self.call("Runtime.evaluate", expression=code, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def key(self, name):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name)

    def mouse(self, x, y):
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def complaints(self):
        bad = []
        for event in self.events:
            kind, what = event.get("method"), event.get("params", {})
            if kind == "Runtime.exceptionThrown" or (kind == "Runtime.consoleAPICalled" and what["type"] != "log"):
                bad.append(what)
            if kind == "Log.entryAdded" and what["entry"]["level"] in ("error", "warning"):
                bad.append(what["entry"])
        return bad

    def requests(self):
        urls = [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [url for url in urls if not url.startswith(("file:", "data:"))]

    def close(self):
        self._out.close()  # the end of its input ends the browser
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._in.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    opened = Browser(tmp_path_factory.mktemp("profile"))
    try:
        opened.start()
        yield opened
    finally:
        opened.close()


@pytest.fixture(scope="module")
def path(recorded, tokenizer, parts, tmp_path_factory):
    target = tmp_path_factory.mktemp("page") / "report.html"
    return report.write(target, title="A toy mixture", trace=recorded, tokenizer=tokenizer, **parts)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 390, 768, 1280])
def test_no_complaint_no_request_no_sideways_scrolling(browser, path, width, dark):
    browser.open(path, width=width, dark=dark)
    assert browser.js("document.documentElement.classList.contains('live')"), "the script did not run"
    too_wide = browser.js(
        "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth"
        " && !e.closest('.scroll, .skip')).map(e => e.outerHTML.slice(0, 90))"
    )
    assert too_wide == []
    assert browser.js("document.documentElement.scrollWidth") <= width
    assert browser.complaints() == []
    assert browser.requests() == []


@pytest.fixture(scope="module")
def ragged(tokenizer, make_trace, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ragged")
    trace = make_trace(folder / "x.trace", tokenizer, layers=6, experts=16, sequences=2, length=96, p=0.5, nulls=2)
    return report.write(folder / "report.html", title="Top-p", trace=trace, tokenizer=tokenizer), trace


@pytest.mark.parametrize("width", [360, 1280])
def test_experts_a_token_fit_every_width_and_can_be_read(browser, ragged, width):
    path, trace = ragged
    browser.open(path, width=width)
    assert browser.js("document.documentElement.scrollWidth") <= width
    browser.js("document.getElementById('per-token-map').focus()")
    browser.key("ArrowDown")
    browser.key("ArrowRight")
    told = browser.js("document.getElementById('per-token-map-read').textContent")
    experts, counts = trace.layer(5).num_experts, [0, 0]
    for number in range(trace.header.num_sequences):
        for row in trace.tokens(number).expert[5][0].tolist():
            used = sum(0 <= expert < experts for expert in row)
            counts[used == 1] += used < 2
    assert told.startswith(f"layer 5, experts 1: {counts[1]} tokens, "), told
    browser.js("document.getElementById('per-token').focus()")
    browser.key("End")
    told = browser.js("document.getElementById('per-token-read').textContent")
    assert told.startswith("layer 9: all tokens "), told
    assert browser.complaints() == []


def test_the_script_draws_what_was_written(browser, path):
    """Choosing another map and coming back redraws the first one from the numbers: the same shapes as Python's."""
    browser.open(path)
    for name in ("pairs", "affinity"):
        before = browser.js(f"document.querySelector('#{name} svg').outerHTML.replace(/><\\/path>/g, '/>')")
        labels = browser.js(f"document.querySelector('#{name}').parentElement.innerText")
        order = "[...one.options].map((o) => o.value)"
        changed = browser.js(
            f"""(() => {{ const one = document.getElementById('{name}-choice'), first = one.value, seen = [];
            for (const value of [...{order}.filter((v) => v !== first), first]) {{
              one.value = value; one.dispatchEvent(new Event('change'));
              seen.push(document.querySelector('#{name} .cells').innerHTML); }}
            return new Set(seen).size === seen.length; }})()"""
        )
        assert changed, "two layers drew the same map"
        after = browser.js(f"document.querySelector('#{name} svg').outerHTML.replace(/><\\/path>/g, '/>')")
        assert sorted_paths(after) == sorted_paths(before)
        assert browser.js(f"document.querySelector('#{name}').parentElement.innerText") == labels
    assert browser.complaints() == []


def sorted_paths(svg):
    return sorted(re.findall(r'<path class="\w+" d="[^"]*"', svg))


def test_tokens_are_coloured_again_as_they_were_written(browser, path):
    browser.open(path)
    classes = "[...document.querySelectorAll('.text span')].map((s) => s.className)"
    before, legend = browser.js(classes), browser.js("document.getElementById('tokens-key').innerText")
    choose = "(v) => { const one = document.getElementById('tokens-choice'); one.value = v;"
    choose = f"({choose} one.dispatchEvent(new Event('change')); }})"
    first = browser.js("document.getElementById('tokens-choice').value")
    browser.js(f"{choose}('4')")
    other = browser.js(classes)
    assert other != before
    browser.js(f"{choose}('{first}')")
    assert browser.js(classes) == before
    assert browser.js("document.getElementById('tokens-key').innerText") == legend


def test_an_expert_can_be_singled_out(browser, path, recorded):
    browser.open(path)
    browser.js("document.querySelector('#tokens-key button').click()")
    expert = int(browser.js("document.querySelector('#tokens-key button[aria-pressed=true]').dataset.expert"))
    lit = browser.js("[...document.querySelectorAll('.text span')].map((s) => !s.classList.contains('dim'))")
    shown = [int(text.split()[1]) for text in browser.js("[...document.querySelectorAll('h3')].map(h => h.innerText)")]
    layer = int(browser.js("document.getElementById('tokens-choice').value"))
    expected = [
        expert in row for number in shown for row in recorded.tokens(number).expert[layer][0].tolist()
    ]  # fmt: skip
    assert lit == expected
    assert 0 < sum(lit) < len(lit)


def test_readings_by_key_and_pointer(browser, path, recorded):
    browser.open(path)
    browser.js("document.getElementById('load').focus()")
    for name in ("ArrowRight", "ArrowRight", "ArrowDown"):
        browser.key(name)
    told = browser.js("document.getElementById('load-read').textContent")
    count, mean = recorded.load(5)[1].item(), recorded.load(5).float().mean().item()
    assert told == f"layer 5, expert 1: {count} assignments, {count / mean:.2f}× what was to be expected"
    browser.js("document.getElementById('load').scrollIntoView({block: 'center', behavior: 'instant'})")
    box = browser.js("JSON.stringify(document.getElementById('load').getBoundingClientRect())")
    box = json.loads(box)
    browser.mouse(box["x"] + box["width"] * 11.5 / 12, box["y"] + box["height"] * 0.5 / 5)
    told = browser.js("document.getElementById('load-read').textContent")
    assert told.startswith(f"layer 4, expert 11: {recorded.load(4)[11].item()} assignments")
    browser.js("document.getElementById('entropy').focus()")
    browser.key("End")
    told = browser.js("document.getElementById('entropy-read').textContent")
    assert told.startswith("layer 8: all tokens ")
    browser.js("document.getElementById('tokens').focus()")
    browser.key("ArrowRight")
    weights = recorded.tokens(0).weight[6][0, 0].tolist()
    experts = recorded.tokens(0).expert[6][0, 0].tolist()
    told = browser.js("document.getElementById('tokens-read').textContent")
    listed = ", ".join(f"expert {e} ({w:.3f})" for e, w in zip(experts, weights, strict=True))
    assert told.endswith(f"→ {listed}")
    assert browser.complaints() == []


def test_hostile_text_does_not_run(browser, tmp_path, make_trace, tokenizer):
    evil = "</script><script>window.pwned=1</script><img src=http://example.org/x onerror=window.pwned=1>"
    texts = {evil: evil * 5, "b": "plain words " * 9}
    trace = make_trace(tmp_path / "x.trace", tokenizer, layers=2, experts=4, sequences=1, length=64, texts=texts)
    target = report.write(
        tmp_path / "x.html",
        title=evil,
        trace=trace,
        tokenizer=tokenizer,
        receipt={evil: evil},
        comparisons=[{evil: evil}],
    )
    browser.open(target)
    assert browser.js("window.pwned === undefined")
    assert browser.js("document.scripts.length") == 2
    assert browser.js("document.title") == evil
    assert browser.requests() == []
    assert browser.complaints() == []


def test_without_script_the_figures_stand(browser, path):
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(path, width=390)
        assert browser.js("document.querySelectorAll('#load .cells path').length") > 3
        assert browser.js("getComputedStyle(document.querySelector('.choose')).display") == "none"
        assert browser.js("document.documentElement.scrollWidth") <= 390
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)


def test_it_prints(browser, path):
    browser.open(path, dark=True)
    made = browser.call("Page.printToPDF", printBackground=True, preferCSSPageSize=True)
    assert base64.b64decode(made["data"]).startswith(b"%PDF")
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert browser.js("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.js("getComputedStyle(document.querySelector('nav')).display") == "none"
