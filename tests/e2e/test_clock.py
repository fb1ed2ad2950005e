"""The wall clock is stepped by a day, forth and back: nothing that is supervised takes notice."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import AnswerReader, descendants, fetch, free_port, wait_until
from upgraded import Upgradable

LIBRARY = next(iter(Path("/usr/lib").glob("*/faketime/libfaketime.so.1")), None)
DAY_S = 86_400

APP = """
import asyncio, os, time
async def app(scope, receive, send):
    if scope["type"] == "http":
        if scope["path"] == "/wait":
            await asyncio.sleep(float(scope["query_string"]))
        text = str(time.time()) if scope["path"] == "/clock" else str(os.getpid())
        headers = [(b"content-length", b"%d" % len(text))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": text.encode()})
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Upgradable]:
    if LIBRARY is None:
        pytest.skip("no libfaketime (Debian: faketime)")
    (tmp_path / "clock_app.py").write_text(APP)
    (tmp_path / "clock").write_text("+0d\n")
    port = free_port()
    line = ["-m", "leanserve", "clock_app:app", "--app-dir", str(tmp_path), "--port", str(port)]
    line += ["--workers", "2"]
    environment = {
        "LD_PRELOAD": str(LIBRARY), "FAKETIME_TIMESTAMP_FILE": str(tmp_path / "clock"),
        "FAKETIME_NO_CACHE": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }  # fmt: skip
    it = Upgradable("", tmp_path / "log", line=line, port=port, environment=environment)
    with it:
        it.wait_output(" ready in ", 2)
        yield it


def test_steps_of_the_wall_clock(server: Upgradable, tmp_path: Path) -> None:
    workers = descendants(server.pid)
    with server.connect() as kept, server.connect() as waiting:
        reader = AnswerReader(kept)
        waiting.sendall(b"GET /wait?4 HTTP/1.1\r\nhost: a\r\n\r\n")
        for days in (1, -1, 0):
            (tmp_path / "clock").write_text(f"{days:+d}d\n")

            def stepped(days: int = days) -> bool:
                return abs(float(fetch(server, "/clock").body) - time.time() - days * DAY_S) < DAY_S / 2

            wait_until(stepped, 20, f"a clock that is {days} days wrong")
            kept.sendall(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
            answer = reader.read()
            assert answer is not None
            assert answer.status == 200  # the idle timer of the connection has not fired
            time.sleep(1.2)  # a tick of the workers, and of the admin process, happens under this clock
        answer = AnswerReader(waiting).read()
        assert answer is not None
        assert answer.status == 200
    assert descendants(server.pid) == workers  # nobody was taken for dead, stalled or late
    assert not [line for line in server.output.splitlines() if " WARNING " in line or " ERROR " in line]
    server.upgrade()
    server.end()
