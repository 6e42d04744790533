"""Chromium without a window, spoken to over its pipe of debugging messages: nothing to install."""

from __future__ import annotations

import base64
import json
import os
import re
import select
import shutil
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open the page with")

KEYS = {"Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39}
KEYS |= {"ArrowDown": 40, "Tab": 9}


def data_of(page: str):
    """What a page of :mod:`dcp.report` holds of data."""
    return json.loads(re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page)[1])


class BrowserError(Exception):
    """What the browser could not do."""


class Page:
    """One page of a browser: opened, measured, typed at and photographed."""

    def __init__(self, process: subprocess.Popen, write: int, read: int) -> None:
        self._process, self._write, self._read = process, write, read
        self._pending, self._number, self._session = b"", 0, None
        self.errors: list[str] = []  # of the console, and what was thrown
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.requests: list[str] = []  # addresses asked for

    def call(self, method: str, **params):
        """One command, and its answer; events that come before it are noted."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self._note(answer)
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def _next(self, seconds: float = 60):
        while b"\0" not in self._pending:
            ready, _, _ = select.select([self._read], [], [], seconds)
            assert ready, "the browser does not answer"
            more = os.read(self._read, 1 << 20)
            assert more, "the browser is gone"
            self._pending += more
        message, self._pending = self._pending.split(b"\0", 1)
        return json.loads(message)

    def _note(self, event) -> None:
        method, params = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.errors.append(json.dumps(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def open(self, path: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Show a file in a window of ``width`` x ``height``, and wait until it is drawn."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media="", features=[scheme])
        self.call("Page.navigate", url=path.as_uri())
        self.wait("document.readyState === 'complete'")
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def run(self, code: str):
        """The value of an expression in the page; a promise is waited for. Where the page is just
        reading itself again, that of the new one."""
        for attempt in range(20):
            try:
                found = self.call(
                    "Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True
                )
                break
            except BrowserError:
                if attempt == 19:
                    raise
                time.sleep(0.05)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def text(self, name: str) -> str:
        """What the element with this id says."""
        return self.run(f"document.getElementById({name!r}).textContent")

    def focus(self, name: str) -> None:
        self.run(f"document.getElementById({name!r}).focus()")

    def wait(self, code: str, seconds: float = 20) -> None:
        """Until an expression is true; one that throws is not."""
        end = time.monotonic() + seconds
        tried = f"(() => {{ try {{ return Boolean({code}); }} catch {{ return false; }} }})()"
        while not self.run(tried):
            assert time.monotonic() < end, f"never true: {code}"
            time.sleep(0.02)

    def press(self, key: str) -> None:
        text = {"text": "\r"} if key == "Enter" else {"text": key} if len(key) == 1 else {}
        code = KEYS.get(key, ord(key[0].upper()))
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code,
                **(text if kind == "keyDown" else {}),
            )  # fmt: skip

    def mouse(self, kind: str, x: float, y: float, **more) -> None:
        """``kind``: moved, pressed, released or wheel; places are of the window."""
        name = {"wheel": "mouseWheel"}.get(kind, f"mouse{kind.capitalize()}")
        button = "left" if kind in ("pressed", "released") else "none"
        self.call(
            "Input.dispatchMouseEvent", type=name, x=x, y=y, button=button,
            clickCount=int(button == "left"), **more,
        )  # fmt: skip

    def click(self, x: float, y: float) -> None:
        for kind in ("moved", "pressed", "released"):
            self.mouse(kind, x, y)

    def picture(self, path: Path, *, whole: bool = True) -> Path:
        """A PNG of the whole page, or of what the window shows."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))
        return path

    def print(self, path: Path) -> Path:
        """The page as a PDF, as it would be printed on A4."""
        made = self.call(
            "Page.printToPDF", printBackground=True, paperWidth=8.27, paperHeight=11.69
        )
        path.write_bytes(base64.b64decode(made["data"]))
        return path


@contextmanager
def browser(folder: Path):
    """A browser with a profile of its own in ``folder``; ended at the end."""
    to_browser, from_us = os.pipe()
    to_us, from_browser = os.pipe()

    def as_three_and_four() -> None:  # where a browser expects its pipe
        read, write = os.dup(to_browser), os.dup(from_browser)
        os.dup2(read, 3)
        os.dup2(write, 4)

    words = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    words += ["--disable-background-networking", "--hide-scrollbars", "--disable-dev-shm-usage"]
    process = subprocess.Popen(
        [str(CHROMIUM), *words, "--remote-debugging-pipe", f"--user-data-dir={folder / 'profile'}"],
        preexec_fn=as_three_and_four, pass_fds=(3, 4),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(to_browser)
    os.close(from_browser)
    try:
        yield Page(process, from_us, to_us)
    finally:
        os.close(from_us)
        os.close(to_us)
        process.terminate()
        process.wait(20)
