"""An ASGI application behind a proxy: answers with what it was sent, and notes all that reached it."""

import json
import os

# One JSON line per call, when the test asks for it.
JOURNAL = os.environ.get("LEANSERVE_TEST_JOURNAL")


def note(scope):
    if not JOURNAL:
        return
    query = scope["query_string"]
    facts = {
        "kind": scope["type"],
        "method": scope.get("method", "GET"),
        "target": (scope["raw_path"] + (b"?" + query if query else b"")).decode("latin-1"),
        "ids": [value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id"],
    }
    descriptor = os.open(JOURNAL, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, json.dumps(facts).encode() + b"\n")
    os.close(descriptor)


async def lifespan(receive, send):
    while True:
        message = await receive()
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return


async def websocket(receive, send):
    await receive()
    await send({"type": "websocket.accept"})
    while (await receive())["type"] == "websocket.receive":
        pass


async def http(scope, receive, send):
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body += message.get("body", b"")
        more = message.get("more_body", False)
    headers = [
        (b"content-length", b"%d" % len(body)),
        (b"x-connection", b"%d/%d" % (os.getpid(), scope["client"][1])),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await lifespan(receive, send)
        return
    note(scope)
    if scope["type"] == "websocket":
        await websocket(receive, send)
    else:
        await http(scope, receive, send)
