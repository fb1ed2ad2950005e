"""The application that every server serves: bare ASGI, so that the server is what is measured."""

from __future__ import annotations

import asyncio
from urllib.parse import parse_qs

BODY = b"Hello, world!"
HEAD = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/plain"), (b"content-length", b"13")],
}
EVENT = b"data: token 1234567\n"  # 20 bytes
BLOCK = bytes(65536)


async def hello(scope, receive, send):
    """13 bytes."""
    await send(HEAD)
    await send({"type": "http.response.body", "body": BODY})


async def upload(scope, receive, send):
    """Count the body; the answer is its length in 13 digits."""
    count, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        count += len(message["body"])
        more = message.get("more_body", False)
    await send(HEAD)
    await send({"type": "http.response.body", "body": b"%013d" % count})


async def events(scope, receive, send):
    """?count=N events of 20 bytes, each in a turn of the loop of its own, as tokens come from a model."""
    await send({
        "type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")],
    })
    message = {"type": "http.response.body", "body": EVENT, "more_body": True}
    for _ in range(int(_query(scope)["count"][0])):
        await send(message)
        await asyncio.sleep(0)
    await send({"type": "http.response.body", "body": b""})


async def download(scope, receive, send):
    """?bytes=N zeros in messages of 64 KiB."""
    left = int(_query(scope)["bytes"][0])
    await send(_octets(left))
    while left > 0:
        block = BLOCK if left >= len(BLOCK) else BLOCK[:left]
        left -= len(block)
        await send({"type": "http.response.body", "body": block, "more_body": left > 0})


async def file(scope, receive, send):
    """?path=P&bytes=N a file of N bytes: by pathsend where the server offers it, otherwise read in 64 KiB."""
    query = _query(scope)
    path, left = query["path"][0], int(query["bytes"][0])
    await send(_octets(left))
    if "http.response.pathsend" in (scope.get("extensions") or {}):
        await send({"type": "http.response.pathsend", "path": path})
        return
    with open(path, "rb", buffering=0) as source:
        while left > 0 and (block := source.read(65536)):
            left -= len(block)
            await send({"type": "http.response.body", "body": block, "more_body": left > 0})


async def echo(scope, receive, send):
    """Every WebSocket message goes back."""
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        text = message.get("text")
        if text is not None:
            await send({"type": "websocket.send", "text": text})
        else:
            await send({"type": "websocket.send", "bytes": message["bytes"]})


async def lifespan(scope, receive, send):
    """Start and stop."""
    while True:
        message = await receive()
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return


def _query(scope):
    return parse_qs(scope["query_string"].decode())


def _octets(size):
    headers = [(b"content-type", b"application/octet-stream"), (b"content-length", b"%d" % size)]
    return {"type": "http.response.start", "status": 200, "headers": headers}


_ROUTES = {"/upload": upload, "/events": events, "/download": download, "/file": file}
_KINDS = {"websocket": echo, "lifespan": lifespan}


async def app(scope, receive, send):
    """By kind of scope, then by path."""
    kind = scope["type"]
    if kind == "http":
        await _ROUTES.get(scope["path"], hello)(scope, receive, send)
    else:
        await _KINDS[kind](scope, receive, send)
