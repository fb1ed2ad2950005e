"""A plain ASGI application that tells what reached it."""

import asyncio
import json
import os

# One JSON line per request begun and per request complete, when the test asks for it.
JOURNAL = os.environ.get("LEANSERVE_TEST_JOURNAL")


def note(**facts):
    if JOURNAL:
        descriptor = os.open(JOURNAL, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, json.dumps(facts).encode() + b"\n")
        os.close(descriptor)


async def read_body(receive):
    """The body, or None when the client left first."""
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return body


async def answer(send, body, content_type=b"text/plain"):
    headers = [(b"content-type", content_type), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def two_writes(send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"8")]})
    await send({"type": "http.response.body", "body": b"half", "more_body": True})
    await send({"type": "http.response.body", "body": b"full"})


async def stream(send, pause, count):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for number in range(count):
        await send({"type": "http.response.body", "body": b"%d\n" % number, "more_body": True})
        await asyncio.sleep(pause)
    await send({"type": "http.response.body", "body": b""})


async def lifespan(receive, send):
    while True:
        message = await receive()
        await send({"type": message["type"] + ".complete"})
        note(event=message["type"], pid=os.getpid())
        if message["type"] == "lifespan.shutdown":
            return


async def websocket(receive, send):
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        reply = {name: message[name] for name in ("text", "bytes") if message.get(name) is not None}
        await send({"type": "websocket.send", **reply})


async def http(scope, receive, send):
    path = scope["path"]
    if path == "/pid":
        await answer(send, b"%d" % os.getpid())
    elif path == "/two-writes":
        await two_writes(send)
    elif path == "/stream":
        await stream(send, 0.05, 5)
    elif path == "/endless":
        await stream(send, 0.05, 1_000_000)
    elif path == "/slow":
        await asyncio.sleep(1.0)
        await answer(send, b"slow")
    elif path == "/raise":
        raise RuntimeError("as asked")
    else:
        await echo(scope, receive, send)


async def echo(scope, receive, send):
    query = scope["query_string"]
    target = scope["raw_path"] + (b"?" + query if query else b"")
    facts = {
        "client": scope["client"][1] if scope["client"] else None,
        "method": scope["method"], "target": target.decode("latin-1"),
    }
    note(event="begin", **facts)
    body = await read_body(receive)
    if body is None:
        note(event="cut", **facts)
        return
    note(event="end", body=body.decode("latin-1"), pid=os.getpid(), **facts)
    await answer(send, json.dumps({**facts, "bytes": len(body)}).encode(), b"application/json")


async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await lifespan(receive, send)
    elif scope["type"] == "websocket":
        await websocket(receive, send)
    else:
        await http(scope, receive, send)
