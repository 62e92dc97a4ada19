"""Pages in Debian's Chromium without a window, driven over its pipe (Chrome DevTools Protocol): real keys, any width.

`Browser.page` opens a local file in a tab of its own. All its requests over the network, its console and errors
of its scripts are kept in `Page.requests` and `Page.complaints`. Names resolve to nowhere, so nothing can be fetched.
"""

import base64
import contextlib
import json
import os
import select
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --hide-scrollbars --no-first-run --disable-background-networking "
    '--disable-component-update --disable-extensions --host-resolver-rules="MAP * ~NOTFOUND" --remote-debugging-pipe'
)
KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Home": 36, "End": 35, "Tab": 9, "Enter": 13}
"""Names of keys -> their Windows codes, which is what moves native controls."""

PATIENCE = 60

AXE = Path(os.environ.get("AXE_CORE", "/tmp/axe/node_modules/axe-core/axe.min.js"))
needs_axe = pytest.mark.skipif(
    not AXE.exists(), reason="no axe-core: npm install --prefix /tmp/axe axe-core, or AXE_CORE=FILE"
)
needs_browser = pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="no chromium here: apt-get install chromium")


class Browser:
    """One Chromium; messages are JSON that ends in a zero byte."""

    def __init__(self, profile: Path) -> None:
        theirs_in, mine_out = os.pipe()
        mine_in, theirs_out = os.pipe()
        line = f"exec {shlex.quote(CHROMIUM)} {FLAGS} --user-data-dir={shlex.quote(str(profile))}"
        self.process = subprocess.Popen(
            ["bash", "-c", f"{line} about:blank 3<&{theirs_in} 4>&{theirs_out}"],
            pass_fds=(theirs_in, theirs_out),
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.into, self.out = os.fdopen(mine_out, "wb", buffering=0), os.fdopen(mine_in, "rb")
        self.count, self.rest = 0, b""
        self.events: list[dict[str, Any]] = []

    def send(self, method: str, session: str | None = None, **parameters: object) -> dict[str, Any]:
        """The answer to one command; events that come meanwhile are kept."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters} | (
            {"sessionId": session} if session else {}
        )
        self.into.write(json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self.count:
            self.events.append(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def wait(self, method: str, session: str) -> None:
        """Until this event has come."""
        while not any(event.get("method") == method and event.get("sessionId") == session for event in self.events):
            self.events.append(self._read())

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            assert select.select([self.out], [], [], PATIENCE)[0], f"the browser wrote nothing for {PATIENCE} s"
            part = os.read(self.out.fileno(), 1 << 20)
            assert part, "the browser ended"
            self.rest += part
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def page(
        self, path: Path, width: int = 1200, height: int = 1000, dark: bool = False, javascript: bool = True
    ) -> "Page":
        """The loaded page, in a viewport of `width` x `height` CSS pixels."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.send(f"{domain}.enable")
        page.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.send("Emulation.setEmulatedMedia", features=[scheme])
        page.send("Emulation.setScriptExecutionDisabled", value=not javascript)
        page.send("Page.navigate", url=path.resolve().as_uri())
        self.wait("Page.loadEventFired", session)
        return page

    def close(self) -> None:
        """End it."""
        with contextlib.suppress(AssertionError, OSError):
            self.send("Browser.close")
        self.into.close()
        self.out.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()


class Page:
    """A tab."""

    def __init__(self, browser: Browser, session: str) -> None:
        self.browser, self.session = browser, session

    def send(self, method: str, **parameters: object) -> dict[str, Any]:
        return self.browser.send(method, self.session, **parameters)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page; works also where the page's own scripts are off."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, *keys: str) -> None:
        """Press and release, as a keyboard would; a single letter types itself."""
        for key in keys:
            code = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS.get(key, ord(key[0].upper()))}
            text = key if len(key) == 1 else "\r" if key == "Enter" else ""
            self.send("Input.dispatchKeyEvent", type="keyDown", text=text, **code)
            self.send("Input.dispatchKeyEvent", type="keyUp", **code)

    def media(self, medium: str) -> None:
        """Look like "screen" or "print"."""
        self.send("Emulation.setEmulatedMedia", media=medium)

    def screenshot(self, whole: bool = False) -> bytes:
        """A PNG of the viewport, or of the whole page."""
        return base64.b64decode(self.send("Page.captureScreenshot", captureBeyondViewport=whole)["data"])

    def pdf(self) -> bytes:
        """The page as it prints."""
        return base64.b64decode(self.send("Page.printToPDF", printBackground=True)["data"])

    def faults(self) -> list[str]:
        """Serious and critical faults of accessibility that axe-core finds."""
        self.evaluate(AXE.read_text())
        found = self.evaluate("axe.run({resultTypes: ['violations']}).then(found => found.violations)")
        return [
            f"{fault['id']}: {node['html']}"
            for fault in found
            if fault["impact"] in ("serious", "critical")
            for node in fault["nodes"]
        ]

    def _events(self, method: str) -> Iterator[dict[str, Any]]:
        for event in self.browser.events:
            if event.get("sessionId") == self.session and event["method"] == method:
                yield event["params"]

    @property
    def requests(self) -> list[str]:
        """Addresses asked for, the page's own and data: aside."""
        self.evaluate("0")  # events so far come before the answer
        asked = [event["request"]["url"] for event in self._events("Network.requestWillBeSent")]
        return [url for url in asked if not url.startswith("data:")][1:]

    @property
    def complaints(self) -> list[str]:
        """Uncaught errors, and all that the console or the log say."""
        self.evaluate("0")
        names = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [json.dumps(event) for name in names for event in self._events(name)]
