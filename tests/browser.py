"""Headless Chromium with a page in it, and questions to that page."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

from harness import wait_until

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextmanager
def browsing(url: str, profile: Path) -> Iterator[None]:
    """A browser that has this page open, for as long as the block lasts. Skips where there is none."""
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    if browser is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--no-proxy-server", "--no-first-run", "--remote-debugging-port=0", f"--user-data-dir={profile}", url,
    ]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield
    finally:
        process.terminate()
        process.wait(10)


class Page:
    """What the debugger of the browser says about its page."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._numbers = itertools.count(1)
        #: What went wrong in the page: errors, and what its policy has blocked.
        self.complaints: list[Any] = []
        self._call("Runtime.enable")
        self._call("Log.enable")

    def _call(self, method: str, **parameters: Any) -> Any:
        number = next(self._numbers)
        self._connection.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._connection.recv(20))
            if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.complaints.append(message["params"])
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        found = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, expression: str, within_s: float = 20.0) -> None:
        """Wait until an expression is true."""
        wait_until(lambda: self.ask(expression), within_s, expression)


@contextmanager
def open_page(url: str, profile: Path) -> Iterator[Page]:
    """A browser with this page, and the page."""
    with browsing(url, profile):
        port_file = profile / "DevToolsActivePort"
        wait_until(lambda: port_file.exists() and "\n" in port_file.read_text(), 30, "the debugger's port")
        port = int(port_file.read_text().splitlines()[0])
        targets: list[dict[str, Any]] = []

        def found() -> bool:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=10) as answer:
                targets[:] = [each for each in json.load(answer) if each["type"] == "page"]
            return any(each["url"].startswith(url) for each in targets)

        wait_until(found, 30, "the page")
        with connect(targets[0]["webSocketDebuggerUrl"], max_size=None, proxy=None) as connection:
            yield Page(connection)
