"""The corpus through a proxy: proxy and server agree where each request ends.

The proxy gives every request that it forwards a number of its own. A request without one, or with one that
the proxy has not noted with the same method and target, was made by the server of bytes that the proxy took
for something else: it was smuggled.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import corpus_reader
from harness import Serving, descendants, wait_until
from proxies import Forwarded, Haproxy, Nginx, connect

SUITE = Path(
    os.environ.get("LEANSERVE_CONFORMANCE", Path(__file__).parents[3] / "shared" / "conformance")
)
MARKER = "/sentinel"
SENTINEL = f"GET {MARKER} HTTP/1.1\r\nhost: a.example\r\nconnection: close\r\n\r\n".encode()
QUIET_S = 0.5  # without a byte from the proxy, which waits for more of the request
PROXIES: dict[str, Any] = {
    "nginx": (Nginx, {}),
    "nginx-streaming": (Nginx, {"streams_bodies": True}),
    "nginx-websocket": (Nginx, {"streams_bodies": True, "websocket": True}),
    "haproxy": (Haproxy, {}),
}
_FIRST_LINE = re.compile(rb"(?:\r\n)*[^\r\n]* HTTP/1\.1\r\n")


@dataclass(frozen=True, slots=True)
class Case:
    """Bytes to send."""

    name: str
    raw: bytes

    @property
    def most(self) -> int:
        """The most requests that anybody could see in them."""
        return max(self.raw.count(b" HTTP/1."), 1)


def own() -> Iterator[Case]:
    """tests/corpus."""
    for case in corpus_reader.load():
        yield Case(case.name, case.raw)


def foreign() -> Iterator[Case]:
    """What others wrote, where it lies beside this checkout; with the host that a request must have."""
    for path in sorted((SUITE / "data" / "corpus").glob("*.json")):
        for case in json.loads(path.read_text()):
            raw = case["raw"].encode("latin-1", "replace")
            first = _FIRST_LINE.match(raw)
            if first and b"\nhost" not in raw.lower():
                raw = first[0] + b"Host: a.example\r\n" + raw[first.end() :]
            yield Case(case["id"], raw)


def play(connection: socket.socket, case: Case) -> int:
    """Send a case with the marker behind it, and wait for the end or for silence; the client's port."""
    port: int = connection.getsockname()[1]
    connection.settimeout(QUIET_S)
    try:
        connection.sendall(case.raw + SENTINEL)
        while connection.recv(65536):
            pass
    except OSError:
        pass  # refused by the proxy, or it waits for more: either is its own affair
    return port


def origin_form(target: str) -> str:
    """A target as ASGI tells it: path and query of an absolute one, an empty path as "/", no empty query."""
    path, _, query = re.sub(r"^[A-Za-z]+://[^/?]*", "", target).partition("?")
    return (path or "/") + (f"?{query}" if query else "")


def read(journal: Path) -> list[dict[str, Any]]:
    """What reached the application."""
    return [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []


def complaints(
    calls: list[dict[str, Any]], sent: dict[str, Forwarded], cases: dict[int, Case]
) -> Iterator[str]:
    """What reached the application and was not sent, not so, or more than once."""
    seen: set[str] = set()
    per_case: dict[int, list[str]] = {}
    for call in calls:
        name = call["ids"][0] if len(call["ids"]) == 1 else None
        request = sent.get(name or "")
        if request is None:
            yield f"not sent by the proxy: {call}"
            continue
        case = cases.get(request.port)
        title = case.name if case else "(none)"
        if request.id in seen:
            yield f"{title}: came twice: {call}"
        seen.add(request.id)
        if (call["method"], call["target"]) != (request.method, origin_form(request.target)):
            yield f"{title}: the proxy sent {request}, and this came: {call}"
        per_case.setdefault(request.port, []).append(call["target"])
    for port, targets in per_case.items():
        if port in cases and (len(targets) > cases[port].most + 1 or targets.count(MARKER) > 1):
            yield f"{cases[port].name}: {targets}"


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", PROXIES)
def test_every_case(name: str, tmp_path: Path) -> None:
    kind, facts = PROXIES[name]
    journal, cases = tmp_path / "journal", [*own(), *foreign()]
    # Few connections to the server, which all cases share: what one leaves behind would meet the next.
    with (
        Serving(
            "behind_app:app", tmp_path / "log", environment={"LEANSERVE_TEST_JOURNAL": str(journal)}
        ) as server,
        kind(tmp_path / "proxy", [server.port], pool=2, **facts) as proxy,
    ):
        workers = descendants(server.pid)
        journal.unlink()  # the questions whether they are ready
        with ExitStack() as clients, ThreadPoolExecutor(32) as pool:

            def one(case: Case) -> tuple[int, Case]:
                # Open until all are done, so that no port is used twice.
                return play(clients.enter_context(connect(proxy.port)), case), case

            ports = dict(pool.map(one, cases))
        assert len(ports) == len(cases)
        # A proxy notes a request when it is done with it.
        wait_until(
            lambda: {one for call in read(journal) for one in call["ids"]}
            <= {one.id for one in proxy.forwarded()},
            5, "the proxy has noted all that it sent",
        )
        calls = read(journal)
        sent = {one.id: one for one in proxy.forwarded() if one.sent}
        assert proxy.answers()
        assert descendants(server.pid) == workers
        assert "Traceback" not in server.output
    wrong = list(complaints(calls, sent, ports))
    assert not wrong, "\n".join(wrong)
    assert "upstream sent" not in proxy.complaints()
    # A proxy that lets nothing through proves nothing.
    assert len({sent[call["ids"][0]].port for call in calls}) > len(cases) // 3


def test_what_is_found() -> None:
    """The comparison sees what it is for."""
    case = Case("case", b"")
    one = Forwarded(7, "a", "POST", "/", True)
    good = {"method": "POST", "target": "/", "ids": ["a"]}

    def found(*calls: dict[str, Any]) -> list[str]:
        return list(complaints(list(calls), {"a": one, "m": second}, {7: case}))

    second = Forwarded(7, "m", "GET", MARKER, True)
    marker = {"method": "GET", "target": MARKER, "ids": ["m"]}
    assert found(good, marker) == []
    assert "not sent" in found({**good, "ids": []})[0]
    assert "not sent" in found({**good, "ids": ["b"]})[0]
    assert "not sent" in found({**good, "ids": ["a", "a"]})[0]
    assert "twice" in found(good, good)[0]
    assert "this came" in found({**good, "method": "GPOST"})[0]
    assert "case: [" in found(marker, marker, marker)[-1]
