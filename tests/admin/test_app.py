"""The pages of the admin process, on the same HTTP core as all others; and who may give orders."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from leanserve.admin.app import AdminApp
from leanserve.scoreboard import Scoreboard, WorkerState
from leanserve.settings import Settings
from served import fetch, listener, run, serving
from wire import Response


@pytest.fixture
def board() -> Iterator[Scoreboard]:
    board = Scoreboard.create()
    board.tell_server(pid=os.getpid(), ready_ns=1, slots=1)
    lane = board.lane(0, 0)
    lane.begin(os.getpid(), 0)
    lane.enter(WorkerState.READY, 1)
    yield board
    board.close()


class Orders:
    """A supervisor that obeys most orders; of two workers the second is stuck."""

    def __init__(self) -> None:
        self.given: list[Any] = []

    async def give(self, order: str, number: int) -> tuple[bool, str]:
        self.given.append((order, number))
        return order != "refused", "as you like"

    async def list_queues(self) -> list[dict[str, Any]]:
        return [{"listener": "127.0.0.1:80", "worker": 1, "queued": 3, "backlog": 9}]

    async def list_running(self, number: int) -> dict[int, Any]:
        return {1: [{"what": f"one of {number}", "age_s": 2.5}]}


def ask(
    board: Scoreboard, *requests: str, over: socket.socket | None = None, settings: Settings | None = None
) -> tuple[list[Response], list[Any]]:
    """The answers to requests on one connection, and the orders that were given."""
    orders = Orders()

    async def main() -> None:
        app = AdminApp(settings or Settings(), board, orders)
        async with serving(app, over or listener(), lifespan="off") as worker:
            lines = [f"{line} HTTP/1.1\r\nhost: a\r\n\r\n".encode() for line in requests]
            lines[-1] = lines[-1].replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")
            answers.extend(await fetch(worker, *lines))

    answers: list[Response] = []
    run("asyncio", main)
    return answers, orders.given


def test_verdicts(board: Scoreboard) -> None:
    paths = ("/livez", "/readyz", "/startupz")
    answers, _ = ask(board, *(f"GET {path}" for path in paths))
    assert [answer.status for answer in answers] == [200, 200, 200]
    board.tell_server(ready_ns=0)
    board.bury(0, 0, os.getpid())
    answers, _ = ask(board, *(f"GET {path}" for path in paths))
    assert [answer.status for answer in answers] == [200, 503, 503]
    assert answers[1].body == b"not ready: 0 of 1 workers ready, 1 wanted\n"


def test_status_is_json(board: Scoreboard) -> None:
    (answer,), _ = ask(board, "GET /status")
    assert json.loads(answer.body)["server"]["pid"] == os.getpid()
    headers = dict(answer.headers)
    assert headers[b"content-type"] == b"application/json"
    assert headers[b"cache-control"] == b"no-store"


def test_who_asks_for_html_gets_the_page(board: Scoreboard) -> None:
    browser = "GET /status HTTP/1.1\r\naccept: text/html,application/xhtml+xml,*/*;q=0.8\r\nx: "
    answers, _ = ask(board, "GET /", browser, "GET /status HTTP/1.1\r\naccept: */*\r\nx: ")
    kinds = [dict(answer.headers)[b"content-type"] for answer in answers]
    assert kinds == [b"text/html; charset=utf-8"] * 2 + [b"application/json"]
    assert answers[0].body == answers[1].body
    assert b"default-src 'none'" in dict(answers[0].headers)[b"content-security-policy"]
    # All that it needs is in it.
    outside = rb"""(src|href)=|url\(|@import|https?://(?!www\.w3\.org/2000/svg)"""
    assert not re.search(outside, answers[0].body)


def test_what_runs(board: Scoreboard) -> None:
    lane = board.lane(1, 0)
    lane.begin(os.getpid() + 1, 0)
    lane.enter(WorkerState.READY, 1)
    board.lane(2, 0).begin(os.getpid() + 2, 0)  # boots, and cannot be asked
    (answer,), _ = ask(board, "GET /running")
    assert json.loads(answer.body)["workers"] == [
        {"worker": 1, "running": [{"what": "one of 2", "age_s": 2.5}]}, {"worker": 2, "running": None},
    ]


@pytest.mark.parametrize("expiries", [(), (0, 0), (2_000_000_000, 0), (2_000_000_000, 1_900_000_000)])
def test_metrics(board: Scoreboard, expiries: tuple[int, ...]) -> None:
    for slot, expiry in enumerate(expiries):
        lane = board.lane(slot, 0)
        if slot:
            lane.begin(os.getpid() + slot, 0)
        lane.tell_certificate(expiry)
    (answer,), _ = ask(board, "GET /metrics")
    assert dict(answer.headers)[b"content-type"] == b"text/plain; version=0.0.4; charset=utf-8"
    lines = answer.body.decode().splitlines()
    assert 'leanserve_workers{state="ready"} 1' in lines
    expiry = [line for line in lines if line.startswith("leanserve_certificate_expiry_timestamp_seconds ")]
    assert 'leanserve_accept_queue{listener="127.0.0.1:80",worker="1"} 3' in lines
    known = list(filter(None, expiries))
    assert [float(line.split()[1]) for line in expiry] == ([min(known)] if known else [])


@pytest.mark.parametrize(
    ("line", "status"),
    [("GET /nosuch", 404), ("POST /livez", 405), ("GET /orders/reload", 403), ("POST /orders/reload", 403)],
)
def test_what_is_refused(board: Scoreboard, line: str, status: int) -> None:
    """Over TCP nobody gives orders, whatever he writes."""
    (answer,), given = ask(board, line)
    assert answer.status == status
    assert given == []


def test_orders_over_a_unix_socket(board: Scoreboard, tmp_path: Path) -> None:
    over = listener(socket.AF_UNIX, str(tmp_path / "s"))
    answers, given = ask(
        board, "POST /orders/reload", "POST /orders/workers?number=3", "POST /orders/refused?number=x",
        "GET /orders/drain", over=over,
    )  # fmt: skip
    assert [answer.status for answer in answers] == [200, 200, 409, 405]
    assert json.loads(answers[0].body) == {"ok": True, "text": "as you like"}
    assert json.loads(answers[2].body)["ok"] is False
    assert given == [("reload", 0), ("workers", 3), ("refused", -1)]


def test_a_peer_whose_address_is_unknown_gives_no_orders(board: Scoreboard) -> None:
    """A TCP peer that has left before we looked has no address; that must not make a unix socket of it."""
    sent: list[Any] = []

    async def main() -> None:
        async def send(message: Any) -> None:
            sent.append(message)

        orders = Orders()
        for server in (None, ("127.0.0.1", 80)):
            scope = {"type": "http", "method": "POST", "path": "/orders/drain", "query_string": b""}
            await AdminApp(Settings(), board, orders)({**scope, "client": None, "server": server}, None, send)
        assert orders.given == []

    asyncio.run(main())
    assert [message["status"] for message in sent if "status" in message] == [403, 403]


def test_websockets_are_refused(board: Scoreboard) -> None:
    upgrade = (
        "GET /livez HTTP/1.1\r\nhost: a\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
        "sec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )

    async def main() -> None:
        orders = Orders()
        async with serving(AdminApp(Settings(), board, orders), lifespan="off") as worker:
            (answer,) = await fetch(worker, upgrade.encode())
            assert answer.status == 403
        assert orders.given == []

    run("asyncio", main)
