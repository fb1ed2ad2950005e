"""What the admin process answers: a small ASGI application on the same HTTP core as all others."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from importlib.resources import files
from typing import Any, NamedTuple, Protocol
from urllib.parse import parse_qs

from leanserve.admin.metrics import CONTENT_TYPE, Facts, write_metrics
from leanserve.admin.status import Rates, build_status
from leanserve.admin.view import Verdict, View, judge_live, judge_ready, judge_started, look
from leanserve.scoreboard import Scoreboard
from leanserve.settings import Settings

__all__ = ["AdminApp", "Supervised"]

_TEXT, _JSON, _HTML = "text/plain; charset=utf-8", "application/json", "text/html; charset=utf-8"
# The page brings all that it needs with it.
_POLICY = (
    b"default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class _Answer(NamedTuple):
    status: int
    content_type: str
    body: str


class Supervised(Protocol):
    """What the pages ask of others than the scoreboard."""

    async def give(self, order: str, number: int) -> tuple[bool, str]:
        """Hand an order to the supervisor: whether it was obeyed, and what it says to that."""

    async def list_running(self, number: int) -> dict[int, Any]:
        """What is at work, by worker, of those among `number` that answer."""

    async def list_queues(self) -> list[dict[str, Any]]:
        """Connections that wait in the kernel, by listener, as far as that is known."""


class AdminApp:
    """The ASGI application.

    Args:
        settings: all settings of the server.
        board: what is read.
        orders: the way to the supervisor.
    """

    def __init__(self, settings: Settings, board: Scoreboard, orders: Supervised) -> None:
        self._settings = settings
        self._board = board
        self._orders = orders
        self._rates = Rates()
        self._queues: list[dict[str, Any]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request; nothing of its body is read."""
        if scope["type"] != "http":
            await receive()
            await send({"type": "websocket.close"})
            return
        path, method = scope["path"], scope["method"]
        if path.startswith("/orders/"):
            answer = await self._order(scope, path.removeprefix("/orders/"))
        elif path == "/running":
            answer = await self._running()
        elif (page := _PAGES.get(path)) is None:
            answer = _Answer(404, _TEXT, f"nothing is here; try {', '.join(_PAGES)} or /running\n")
        elif method not in ("GET", "HEAD"):
            answer = _Answer(405, _TEXT, "this is only to be read\n")
        else:
            if path in ("/metrics", "/status"):
                self._queues = await self._orders.list_queues()
            answer = page(self, scope)
        await _send(send, answer)

    def _look(self) -> View:
        return look(self._board, time.monotonic_ns())

    async def _order(self, scope: Any, order: str) -> _Answer:
        # Whoever may open the socket file may give orders; a TCP port is open to all that reach it.
        server = scope["server"]
        if server is None or server[1] is not None:
            return _Answer(403, _TEXT, "orders are taken over the unix socket only: leanserve ctl\n")
        if scope["method"] != "POST":
            return _Answer(405, _TEXT, "an order is a POST\n")
        (text,) = parse_qs(scope["query_string"].decode("latin-1")).get("number", ["0"])[:1]
        number = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else -1
        obeyed, said = await self._orders.give(order, number)
        return _Answer(200 if obeyed else 409, _JSON, json.dumps({"ok": obeyed, "text": said}) + "\n")

    async def _running(self) -> _Answer:
        """The requests at work; null for a worker that does not say, because its loop is busy."""
        workers = [each.slot + 1 for each in self._look().living if each.ready_ns]
        found = await self._orders.list_running(len(workers))
        shown = [{"worker": worker, "running": found.get(worker)} for worker in sorted(set(workers))]
        return _Answer(200, _JSON, json.dumps({"workers": shown}) + "\n")

    # Pages

    def _judge(self, judge: Callable[..., Verdict]) -> _Answer:
        verdict = judge(self._look(), self._settings.admin)
        return _Answer(200 if verdict.good else 503, _TEXT, verdict.text)

    def _live(self, _scope: Any) -> _Answer:
        return self._judge(judge_live)

    def _ready(self, _scope: Any) -> _Answer:
        return self._judge(judge_ready)

    def _started(self, _scope: Any) -> _Answer:
        return self._judge(judge_started)

    def _metrics(self, _scope: Any) -> _Answer:
        view = self._look()
        shown = [each.certificate_expiry_s for each in view.living if each.certificate_expiry_s]
        expiry = float(min(shown)) if shown else None
        facts = Facts(view, view.totals, self._settings.admin, time.time(), expiry, self._queues)
        return _Answer(200, CONTENT_TYPE, write_metrics(facts))

    def _page(self, _scope: Any) -> _Answer:
        return _Answer(200, _HTML, files("leanserve.admin").joinpath("status.html").read_text("utf-8"))

    def _status(self, scope: Any) -> _Answer:
        """The page for who asks for HTML, as browsers do; JSON for all others."""
        if any(name == b"accept" and b"text/html" in value for name, value in scope["headers"]):
            return self._page(scope)
        status = build_status(self._look(), self._settings.admin, self._rates, self._queues)
        return _Answer(200, _JSON, json.dumps(status) + "\n")


async def _send(send: Any, answer: _Answer) -> None:
    body = answer.body.encode()
    headers = [
        (b"content-type", answer.content_type.encode()),
        (b"content-length", b"%d" % len(body)),
        (b"cache-control", b"no-store"),
        (b"content-security-policy", _POLICY),
        (b"x-content-type-options", b"nosniff"),
    ]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


_PAGES: dict[str, Callable[[AdminApp, Any], _Answer]] = {
    "/livez": AdminApp._live,
    "/readyz": AdminApp._ready,
    "/startupz": AdminApp._started,
    "/metrics": AdminApp._metrics,
    "/status": AdminApp._status,
    "/": AdminApp._page,
}
