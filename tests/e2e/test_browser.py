"""A page in headless Chromium: fetch, server-sent events and WebSocket from a real browser."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from browser import browsing
from harness import Serving, wait_until


def test_page(serve: Callable[..., Serving], tmp_path: Path) -> None:
    report = tmp_path / "report"
    server = serve(
        "fastapi_app:app", "--workers", "4", environment={"LEANSERVE_TEST_REPORT": str(report)}
    )
    with browsing(server.base_url + "/", tmp_path / "profile"):
        wait_until(lambda: report.exists() and report.read_bytes(), 40, "the page's report")
    assert json.loads(report.read_bytes()) == {"rest": 6, "tokens": 5, "socket": 14}
