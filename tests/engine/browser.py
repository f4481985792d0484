"""A headless Chromium, spoken to over a pipe."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def chromium() -> str | None:
    """Where a Chromium is, None when there is none."""
    return next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )


class Browser:
    """One page."""

    def __init__(self, out: int, into: int) -> None:
        self.out, self.into = out, into
        self.number = 0
        self.buffer = b""
        self.errors: list[str] = []
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target for target in targets if target["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.on_page(f"{domain}.enable")
        self.requested: list[str] = []

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def on_page(self, method: str, **params: Any) -> dict[str, Any]:
        return self.call(method, self.session, **params)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            part = os.read(self.into, 1 << 20)
            assert part, "the browser is gone"
            self.buffer += part
        found, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(found)
        method, params = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(str(params["exceptionDetails"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requested.append(params["request"]["url"])
        return message

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives."""
        found = self.on_page("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, expression: str, seconds: float = 20.0) -> Any:
        """Wait for it to be true."""
        end = time.monotonic() + seconds
        while not (value := self.value(expression)):
            assert time.monotonic() < end, f"never true: {expression}; {self.errors}"
            time.sleep(0.05)
        return value

    def size(self, width: int, height: int) -> None:
        self.on_page(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    def open(self, url: str) -> None:
        self.on_page("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def key(self, name: str, code: int, text: str = "", modifiers: int = 0) -> None:
        """Press a key."""
        common = {"key": name, "code": name, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.on_page("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self.on_page("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text: str) -> None:
        self.on_page("Input.insertText", text=text)

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.on_page("Page.captureScreenshot", format="png")["data"]))


@contextlib.contextmanager
def browsing(folder: Path) -> Iterator[Browser]:
    """A browser with a fresh profile in ``folder``."""
    binary = chromium()
    assert binary is not None
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    # The browser reads commands from descriptor 3 and answers on 4.
    shell = f"exec 3<&{theirs_in} 4>&{theirs_out}; exec \"$0\" \"$@\""  # fmt: skip
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                 "--disable-background-networking", f"--user-data-dir={folder}", "--remote-debugging-pipe",
                 "about:blank"]  # fmt: skip
    process = subprocess.Popen(
        ["bash", "-c", shell, binary, *arguments],
        pass_fds=(theirs_in, theirs_out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "HOME": str(folder)},
    )
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        yield Browser(ours_out, ours_in)
    finally:
        process.kill()
        process.wait()
        os.close(ours_out)
        os.close(ours_in)
