"""leanserve.worker.hangups: who has gone unseen, and who has not."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest

from leanserve.worker.hangups import find_hangups
from served import GET, Client, eventually, listener, run, serving


@pytest.fixture(params=["asyncio", "uvloop"])
def loop(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def holds(scope: Any, receive: Any, send: Any) -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize("family", ["tcp", "unix"])
def test_resets_and_no_half_closes(loop: str, family: str, tmp_path: Path) -> None:
    async def main() -> None:
        own = listener() if family == "tcp" else listener(socket.AF_UNIX, str(tmp_path / "s"))
        async with serving(holds, own, lifespan="off") as worker:
            assert find_hangups(worker.connections) == []
            clients = []
            for number in range(4):
                clients.append(await Client.open(worker))
                await clients[-1].send(GET)
                await eventually(lambda count=number + 1: len(worker.running) == count)
            for client in clients:
                client.shut()
            await eventually(lambda: all(connection.codec.eof for connection in worker.connections))
            assert find_hangups(worker.connections) == []
            clients[0].reset()
            clients[1].reset()
            await eventually(lambda: len(find_hangups(worker.connections)) == 2)
            gone = find_hangups(worker.connections)
            for connection in gone:
                connection.abort()
            await eventually(lambda: not worker.connections & set(gone))
            assert find_hangups(worker.connections) == []
            assert len(worker.connections) == 2
            for client in clients[2:]:
                client.sock.close()

    run(loop, main)
