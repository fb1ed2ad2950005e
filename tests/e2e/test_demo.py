"""What a newcomer sees: the built-in demo, started without an application."""

from __future__ import annotations

import json
from collections.abc import Callable

from websockets.sync.client import connect

from harness import Serving, fetch


def test_demo(serve: Callable[..., Serving]) -> None:
    server = serve("", "--workers", "2")
    page = fetch(server, "/")
    assert page.status == 200
    assert page.headers["content-type"].startswith("text/html")
    assert b"WebSocket" in page.body
    assert fetch(server, "/health").status == 200
    answer = fetch(server, "/predict", "POST", json.dumps({"text": "a lovely day"}).encode())
    assert json.loads(answer.body)["label"] == "positive"
    stream = fetch(server, "/stream?tokens=5")
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert stream.body.count(b"data:") > 1
    assert f"http://127.0.0.1:{server.port}" in server.output
    with connect(server.base_url.replace("http", "ws", 1) + "/ws", proxy=None) as socket:
        socket.send(json.dumps({"text": "a terrible day"}))
        assert json.loads(socket.recv(timeout=10))["label"] == "negative"
