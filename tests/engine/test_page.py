"""The web page in a real browser: chat, gauges, experts; narrow and wide, by keyboard alone."""

from collections.abc import Iterator

import pytest

from tests.engine.browser import Browser, browsing, chromium
from tests.engine.serving import Running, serving


pytestmark = pytest.mark.skipif(chromium() is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Browser, Running]]:
    with serving(delay=0.002) as running, browsing(tmp_path_factory.mktemp("profile")) as browser:
        browser.size(1280, 800)
        browser.open(running.url)
        browser.until("document.getElementById('model').textContent.startsWith('stub')")
        yield browser, running


def said(browser: Browser) -> list[list[str]]:
    found: list[list[str]] = browser.value(
        "[...document.querySelectorAll('#log li')].map(li => [li.className, li.lastChild.textContent])"
    )
    return found


def test_a_chat_by_keyboard(page: tuple[Browser, Running]) -> None:
    browser, running = page
    assert browser.value("document.activeElement.id") == "text"
    browser.value("document.getElementById('max_tokens').value = '20'; document.getElementById('seed').value = '3'")
    browser.type("<b>hello</b>")
    browser.key("Enter", 13, "\r", modifiers=8)  # with shift: a new line, not a message
    browser.type("there")
    browser.key("Enter", 13, "\r")
    browser.until("document.querySelectorAll('#log li').length == 2 && document.getElementById('stop').disabled")
    assert said(browser)[0] == ["user", "<b>hello</b>\nthere"]
    assert said(browser)[1][0] == "assistant"
    assert said(browser)[1][1]
    assert "first word after" in browser.value("document.getElementById('status').textContent")
    assert browser.value("document.activeElement.id") == "text"
    browser.type("again")
    browser.key("Enter", 13, "\r")
    browser.until("document.querySelectorAll('#log li').length == 4 && document.getElementById('stop').disabled")
    assert running.engine.scheduler.stats.cached_tokens > 0  # the second turn begins like the first
    assert browser.errors == []


def test_stopping_frees_the_engine(page: tuple[Browser, Running]) -> None:
    browser, running = page
    before = running.engine.scheduler.stats.requests["cancelled"]
    browser.value("document.getElementById('max_tokens').value = '400'")
    browser.value("document.getElementById('clear').click()")
    # The end token of the stub could come first: ask until one answer is long enough to be stopped.
    for attempt in range(10):
        browser.value(f"document.getElementById('seed').value = '{attempt}'")
        browser.type("write a lot")
        browser.key("Enter", 13, "\r")
        browser.until("document.querySelectorAll('#log li').length > 0")
        browser.key("Escape", 27)
        browser.until("document.getElementById('stop').disabled")
        running.idle()
        if running.engine.scheduler.stats.requests["cancelled"] > before:
            break
    assert running.engine.scheduler.stats.requests["cancelled"] > before


def test_gauges_and_experts_are_shown(page: tuple[Browser, Running]) -> None:
    browser, _ = page
    browser.until("document.querySelectorAll('#gauges dt').length >= 4")
    browser.value("document.getElementById('heat').focus()")
    browser.key("ArrowRight", 39)
    assert browser.value("document.getElementById('heat-cell').textContent").startswith("layer 1, expert 1:")
    browser.until(
        "(() => { const c = document.getElementById('heat'), p = c.getContext('2d');"
        "const at = i => [...p.getImageData((i + .5) * c.width / 4, 3, 1, 1).data].join();"
        "return new Set([0, 1, 2, 3].map(at)).size > 1 })()"
    )


@pytest.mark.parametrize(("width", "height"), [(320, 640), (390, 844), (768, 1024), (1440, 900)])
def test_it_fits_every_screen(page: tuple[Browser, Running], width: int, height: int) -> None:
    browser, _ = page
    browser.size(width, height)
    assert browser.value("document.documentElement.scrollWidth") <= width
    small = browser.value(
        "[...document.querySelectorAll('button, textarea')].filter(e => e.getBoundingClientRect().height < 40).length"
    )
    assert small == 0
    assert browser.value("parseFloat(getComputedStyle(document.getElementById('text')).fontSize)") >= 16
    browser.size(1280, 800)


def test_everything_can_be_reached_with_the_tab_key(page: tuple[Browser, Running]) -> None:
    browser, _ = page
    browser.value("document.getElementById('log').focus()")
    seen = []
    for _step in range(8):
        browser.key("Tab", 9)
        seen.append(browser.value("document.activeElement.id || document.activeElement.tagName"))
    assert [name for name in ("text", "send", "clear", "SUMMARY", "heat") if name in seen] == [
        "text", "send", "clear", "SUMMARY", "heat",
    ]  # fmt: skip


def test_nothing_is_loaded_from_elsewhere(page: tuple[Browser, Running]) -> None:
    browser, running = page
    assert browser.requested
    assert all(url.startswith((running.url, "data:")) for url in browser.requested)
