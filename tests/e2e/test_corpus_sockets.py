"""The corpus over real sockets: whole and byte by byte, plain and TLS, on both event loops.

A second request stands behind every one. It must be answered where the connection stays usable, and nowhere
else; the application's journal shows what really reached it.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

import corpus_reader
from corpus_reader import Case
from harness import AnswerReader, Certificates, Serving, fetch

# An unfinished request has no verdict that a socket could show soon; the codec tests have those.
CASES = [case for case in corpus_reader.load() if case.verdict != "wait"]
SENTINEL = b"GET /sentinel HTTP/1.1\r\nhost: a.example\r\nconnection: close\r\n\r\n"
_SINGLE_BYTES = 400


class Journal:
    """What the application noted, by client port."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def clear(self) -> None:
        self._path.unlink(missing_ok=True)

    def of(self, port: int) -> list[dict[str, str]]:
        if not self._path.exists():
            return []
        entries = map(json.loads, self._path.read_text().splitlines())
        return [entry for entry in entries if entry.get("client") == port]


@pytest.fixture(scope="module", params=["plain-asyncio", "plain-uvloop", "tls-asyncio", "tls-uvloop"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, certificates: Certificates
) -> Iterator[tuple[Serving, Journal]]:
    transport, loop = request.param.split("-")
    folder = tmp_path_factory.mktemp("corpus")
    with Serving(
        "raw_app:app", folder / "log", ["--loop", loop],
        certificates=certificates if transport == "tls" else None,
        environment={"LEANSERVE_TEST_JOURNAL": str(folder / "journal")},
    ) as serving:
        yield serving, Journal(folder / "journal")


def _send(connection: socket.socket, raw: bytes, whole: bool) -> None:
    try:
        if not whole:
            for at in range(min(len(raw), _SINGLE_BYTES)):
                connection.sendall(raw[at : at + 1])
            raw = raw[_SINGLE_BYTES:]
        connection.sendall(raw)
    except OSError:
        pass  # refused and closed before all of it was sent: the answer may be read all the same


def _statuses(connection: socket.socket, case: Case) -> list[int]:
    """The statuses of all answers until the server closes."""
    methods = [expected.method.decode("latin-1") for expected in case.requests]
    reader, statuses = AnswerReader(connection), []
    try:
        while (answer := reader.read(methods.pop(0) if methods else "GET")) is not None:
            statuses.append(answer.status)
    except ConnectionResetError:
        # What a client sends after both sides agreed to close may be answered with a reset (RFC 9112 section
        # 9.6); a refusal, which no client expects, must be readable to its end.
        if case.verdict == "refuse" or case.after != "close":
            raise
    return statuses


def play(connection: socket.socket, case: Case, whole: bool) -> tuple[int, list[int] | str]:
    """Send one case and the sentinel; the client's port, and the statuses or what went wrong."""
    port: int = connection.getsockname()[1]
    _send(connection, case.raw + SENTINEL, whole)
    try:
        return port, _statuses(connection, case)
    except (OSError, AssertionError, ValueError) as error:
        return port, repr(error)


def complaint(case: Case, statuses: list[int] | str, entries: list[dict[str, str]]) -> str | None:
    """What differs from the verdict, or None."""
    if isinstance(statuses, str):
        return statuses
    seen = [
        (entry["method"], entry["target"], entry["body"]) for entry in entries if entry["event"] == "end"
    ]
    wanted = [
        (one.method.decode("latin-1"), one.target.decode("latin-1"), one.body.decode("latin-1"))
        for one in case.requests
    ]
    good = [200] * len(wanted)
    if case.verdict == "refuse":
        if statuses[:-1] != good or statuses[-1] not in case.statuses:
            return f"answered {statuses}, wanted {[*good, case.statuses]}"
    elif case.after == "keep":
        wanted.append(("GET", "/sentinel", ""))
        good.append(200)
    if case.verdict == "accept" and statuses != good:
        return f"answered {statuses}, wanted {good}"
    if seen != wanted:
        return f"the application got {seen!r:.300}, wanted {wanted!r:.300}"
    begun = [entry["target"] for entry in entries if entry["event"] == "begin"]
    limit = len(wanted) + (case.begins is not None)
    return f"the application was called for {begun}" if len(begun) > limit else None


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "byte-by-byte"])
def test_corpus(served: tuple[Serving, Journal], whole: bool) -> None:
    server, journal = served
    worker = fetch(server, "/pid").body
    journal.clear()
    with ExitStack() as sockets, ThreadPoolExecutor(4) as pool:

        def one(case: Case) -> tuple[Case, int, list[int] | str]:
            # Open until the end of the test, so that no port is used twice.
            return case, *play(sockets.enter_context(server.connect(own_port=True)), case, whole)

        played = list(pool.map(one, CASES))
    wrong = [
        f"{case.name}: {said}"
        for case, port, statuses in played
        if (said := complaint(case, statuses, journal.of(port))) is not None
    ]
    assert not wrong, "\n".join(wrong)
    assert fetch(server, "/pid").body == worker
    assert "Traceback" not in server.output
