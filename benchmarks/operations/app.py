"""The application of these benchmarks: bare ASGI, and every answer names the process that gave it."""

from __future__ import annotations

import asyncio
import gc
import json
import mmap
import os
import struct
import threading
import time
from urllib.parse import parse_qs

from benchmarks.operations.journal import ENTRY, JOURNAL_VARIABLE

_JOURNAL = os.environ.get(JOURNAL_VARIABLE)
_BLOCK = bytes(65536)
_opened: list[mmap.mmap] = []


def _note(number):
    """Write down that this process has begun request `number`: in shared memory, which outlives a SIGKILL."""
    if not _opened:
        with open(_JOURNAL, "r+b") as file:
            _opened.append(mmap.mmap(file.fileno(), 0))
    _, times = struct.unpack_from(ENTRY, _opened[0], number * struct.calcsize(ENTRY))
    struct.pack_into(ENTRY, _opened[0], number * struct.calcsize(ENTRY), os.getpid(), times + 1)


async def _answer(send, body, kind=b"text/plain"):
    headers = [
        (b"content-type", kind), (b"content-length", b"%d" % len(body)), (b"x-pid", b"%d" % os.getpid()),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _body(receive):
    """The whole body; None when the client has gone."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


async def pid(query, receive, send):
    """The process alone."""
    await _answer(send, b"%d" % os.getpid())


async def block(query, receive, send):
    """?ms=N of sleep that holds the loop, as a call to an accelerator does."""
    time.sleep(int(query["ms"]) / 1000)
    await _answer(send, b"%d" % os.getpid())


async def burn(query, receive, send):
    """?ms=N of CPU time."""
    end = time.thread_time() + int(query["ms"]) / 1000
    while time.thread_time() < end:
        pass
    await _answer(send, b"%d" % os.getpid())


async def wait(query, receive, send):
    """?ms=N of sleep that leaves the loop to others."""
    await asyncio.sleep(int(query["ms"]) / 1000)
    await _answer(send, b"%d" % os.getpid())


async def work(query, receive, send):
    """?id=N&ms=M, a POST: noted in the journal, then its own body goes back M ms later."""
    if _JOURNAL:
        _note(int(query["id"]))
    body = await _body(receive)
    if body is not None:
        await asyncio.sleep(int(query["ms"]) / 1000)
        await _answer(send, body)


async def sums(query, receive, send):
    """JSON in, JSON out: the sum of `numbers`."""
    body = await _body(receive)
    if body is not None:
        found = {"sum": sum(json.loads(body)["numbers"])}
        await _answer(send, json.dumps(found).encode(), b"application/json")


async def upload(query, receive, send):
    """The length of the body."""
    count, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        count += len(message["body"])
        more = message.get("more_body", False)
    await _answer(send, b"%d" % count)


async def events(query, receive, send):
    """?count=N events, one per 5 ms."""
    headers = [(b"content-type", b"text/event-stream"), (b"x-pid", b"%d" % os.getpid())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for number in range(int(query["count"])):
        await send({"type": "http.response.body", "body": b"data: %d\n\n" % number, "more_body": True})
        await asyncio.sleep(0.005)
    await send({"type": "http.response.body", "body": b""})


async def download(query, receive, send):
    """?bytes=N zeros."""
    left = int(query["bytes"])
    headers = [(b"content-length", b"%d" % left), (b"x-pid", b"%d" % os.getpid())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    while left > 0:
        part = _BLOCK[:left]
        left -= len(part)
        await send({"type": "http.response.body", "body": part, "more_body": left > 0})


async def state(query, receive, send):
    """What this process holds, as its interpreter knows it."""
    found = {
        "pid": os.getpid(), "tasks": len(asyncio.all_tasks()), "threads": threading.active_count(),
        "objects": len(gc.get_objects()),
    }
    await _answer(send, json.dumps(found).encode(), b"application/json")


async def websocket(receive, send):
    """Every message goes back."""
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        if message.get("text") is not None:
            await send({"type": "websocket.send", "text": message["text"]})
        else:
            await send({"type": "websocket.send", "bytes": message["bytes"]})


async def lifespan(receive, send):
    """Start and stop."""
    while True:
        message = await receive()
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return


_ROUTES = {
    "/block": block, "/burn": burn, "/wait": wait, "/work": work, "/sums": sums, "/upload": upload,
    "/events": events, "/download": download, "/state": state,
}


async def app(scope, receive, send):
    """By kind of scope, then by path."""
    kind = scope["type"]
    if kind == "http":
        query = {name: values[0] for name, values in parse_qs(scope["query_string"].decode()).items()}
        await _ROUTES.get(scope["path"], pid)(query, receive, send)
    elif kind == "websocket":
        await websocket(receive, send)
    else:
        await lifespan(receive, send)
