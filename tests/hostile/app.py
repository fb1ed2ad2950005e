"""The application under attack: it takes what is sent, and tells how its worker feels."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import os
import time
from typing import Any

_PAGE = os.sysconf("SC_PAGE_SIZE")
_BLOCK = bytes(65536)
_BLOCKS = 1024
_TICK_S = 0.001


class Stalls:
    """How long the loop did not come round, since the last ask.

    Attributes:
        wall_ms: by the clock; what else the machine had to do is in it.
        busy_ms: CPU time of the loop's thread between two rounds: what the server itself did at one stretch.
    """

    wall_ms = busy_ms = 0.0
    ticker: asyncio.Task[None] | None = None

    async def tick(self) -> None:
        """Look at both clocks every millisecond."""
        while True:
            wall, busy = time.perf_counter(), time.thread_time()
            await asyncio.sleep(_TICK_S)
            self.wall_ms = max(self.wall_ms, (time.perf_counter() - wall - _TICK_S) * 1000)
            self.busy_ms = max(self.busy_ms, (time.thread_time() - busy) * 1000)

    def take(self) -> dict[str, float]:
        """Both, and begin anew."""
        told = {"stall_ms": self.wall_ms, "busy_ms": self.busy_ms}
        self.wall_ms = self.busy_ms = 0.0
        return told


stalls = Stalls()
if os.environ.get("HOSTILE_GC") == "0":
    gc.disable()


def _trim() -> None:
    """Have the allocator give back what is free: what it would have kept is not held by the server."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc
    if trim is not None:
        trim(0)


def _probe(collect: bool) -> dict[str, Any]:
    facts: dict[str, Any] = {"pid": os.getpid(), **stalls.take()}
    if collect:  # which takes long, so the stalls are read before
        if gc.isenabled():
            gc.collect()
        _trim()
        facts["protocols"] = sum(isinstance(one, asyncio.BaseProtocol) for one in gc.get_objects())
    with open("/proc/self/statm") as memory:
        facts["rss"] = int(memory.read().split()[1]) * _PAGE
    return {**facts, "fds": len(os.listdir("/proc/self/fd")), "tasks": len(asyncio.all_tasks())}


async def _answer(send: Any, body: bytes) -> None:
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _upload(receive: Any, send: Any) -> None:
    count, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        count += len(message.get("body", b""))
        more = message.get("more_body", False)
    await _answer(send, b"%d" % count)


async def _large(send: Any) -> None:
    headers = [(b"content-length", b"%d" % (len(_BLOCK) * _BLOCKS))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for left in reversed(range(_BLOCKS)):
        await send({"type": "http.response.body", "body": _BLOCK, "more_body": left > 0})


async def _websocket(receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "websocket.accept"})
    count = 0
    while (message := await receive())["type"] == "websocket.receive":
        if message.get("text") == "count":
            await send({"type": "websocket.send", "text": str(count)})
        count += 1


async def _lifespan(receive: Any, send: Any) -> None:
    while True:
        message = await receive()
        if message["type"] == "lifespan.startup":
            stalls.ticker = asyncio.ensure_future(stalls.tick())
        else:
            assert stalls.ticker is not None
            stalls.ticker.cancel()
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return


async def app(scope: Any, receive: Any, send: Any) -> None:
    """/probe, /upload, /large; a WebSocket that counts; everything else is a short answer."""
    if scope["type"] == "lifespan":
        await _lifespan(receive, send)
    elif scope["type"] == "websocket":
        await _websocket(receive, send)
    elif scope["path"] == "/probe":
        await _answer(send, json.dumps(_probe(scope["query_string"] == b"collect")).encode())
    elif scope["path"] == "/upload":
        await _upload(receive, send)
    elif scope["path"] == "/large":
        await _large(send)
    else:
        await _answer(send, b"Hello, world!")
