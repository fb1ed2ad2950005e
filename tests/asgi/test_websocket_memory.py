"""A closed WebSocket is gone at once, without the cycle collector."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest
import websockets

from leanserve.asgi.websocket import WebSocketExchange
from leanserve.transport.connection import Connection
from served import run, serving


async def echo(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        return
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] != "websocket.disconnect":
        await send({"type": "websocket.send", "text": message["text"]})


def _alive() -> set[int]:
    return {id(it) for it in gc.get_objects() if type(it) in (Connection, WebSocketExchange)}


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_closed_and_aborted_websockets_leave_nothing(loop: str) -> None:
    async def main() -> None:
        async with serving(echo) as worker:
            gc.collect()
            older = _alive()
            gc.disable()
            try:
                for number in range(20):
                    port = worker.addresses[0][1]
                    client = await websockets.connect(f"ws://127.0.0.1:{port}/")
                    await client.send("x")
                    assert await client.recv() == "x"
                    if number % 2:
                        await client.close()
                    else:
                        client.transport.abort()
                for _ in range(200):
                    if not worker.connections and not worker.running:
                        break
                    await asyncio.sleep(0.01)
                assert _alive() <= older
            finally:
                gc.enable()

    run(loop, main)
