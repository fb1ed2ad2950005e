"""A page in headless Chromium: fetch, server-sent events and WebSocket from a real browser."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness import Serving, wait_until

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextmanager
def browsing(url: str, profile: Path) -> Iterator[None]:
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


def test_page(serve: Callable[..., Serving], tmp_path: Path) -> None:
    report = tmp_path / "report"
    server = serve(
        "fastapi_app:app", "--workers", "4", environment={"LEANSERVE_TEST_REPORT": str(report)}
    )
    with browsing(server.base_url + "/", tmp_path / "profile"):
        wait_until(lambda: report.exists() and report.read_bytes(), 40, "the page's report")
    assert json.loads(report.read_bytes()) == {"rest": 6, "tokens": 5, "socket": 14}
