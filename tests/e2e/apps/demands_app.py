"""Application of tests/e2e/test_demands.py: streams without end, slow uploads, and what its worker holds."""

import asyncio
import gc
import json
import os

PAGE = os.sysconf("SC_PAGE_SIZE")
BLOCK = b"x" * 65536
if os.environ.get("LEANSERVE_TEST_GC") == "off":
    gc.disable()
# What applications have offered to send, and what send() has taken of it, in bytes.
sent = {"offered": 0, "taken": 0}


def note(word):
    with open(os.environ["LEANSERVE_TEST_JOURNAL"], "a") as journal:
        journal.write(f"{word}\n")


def facts():
    if gc.isenabled():
        gc.collect()
    with open("/proc/self/statm") as memory:
        resident = int(memory.read().split()[1]) * PAGE
    ours = ("Connection", "HttpExchange", "WebSocketExchange", "_SelectorSocketTransport")
    objects = sum(type(one).__name__ in ours for one in gc.get_objects())
    scheduled = getattr(asyncio.get_running_loop(), "_scheduled", ())  # uvloop keeps its own elsewhere
    return {
        "rss": resident, "objects": objects, "tasks": len(asyncio.all_tasks()), "timers": len(scheduled),
        "fds": len(os.listdir("/proc/self/fd")), **sent,
    }


async def answer(send, body, status=200):
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def events(stop, send):
    """Without end; until `stop`, when it listens to that."""
    headers = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    while not (stop and stop.is_set()):
        await send({"type": "http.response.body", "body": b"data: x\n\n", "more_body": True})
        await asyncio.sleep(0.05)
    await send({"type": "http.response.body", "body": b"data: bye\n\n"})


async def offer(count, send, message):
    """The same bytes again and again: what memory grows by is the server's."""
    for _ in range(count):
        sent["offered"] += len(BLOCK)
        await send(message)
        sent["taken"] += len(BLOCK)


async def upload(receive, send, pause):
    size, more = 0, True
    while more:
        message = await receive()
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
        await asyncio.sleep(pause)
    await answer(send, b"%d" % size)


async def lifespan(receive, send):
    await receive()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    note("shutdown begun")
    await asyncio.sleep(float(os.environ.get("LEANSERVE_TEST_SHUTDOWN_S", "0")))
    note("shutdown done")
    await send({"type": "lifespan.shutdown.complete"})


async def websocket(scope, receive, send, stop):
    await receive()
    await send({"type": "websocket.accept"})
    if scope["path"] == "/offer":
        await offer(int(scope["query_string"]), send, {"type": "websocket.send", "bytes": BLOCK})
    if scope["path"] == "/told":
        await stop.wait()
        await send({"type": "websocket.close", "code": 4000})
    while (message := await receive())["type"] == "websocket.receive":
        pass
    note(f"disconnect {message['code']}")


async def http(scope, receive, send, stop):
    path = scope["path"]
    if path == "/facts":
        await answer(send, json.dumps(facts()).encode())
    elif path == "/events":
        await events(None, send)
    elif path == "/told":
        await events(stop, send)
    elif path == "/ready":
        await answer(send, b"", 503 if stop.is_set() else 200)
    elif path == "/slow":
        await asyncio.sleep(float(scope["query_string"]))
        await answer(send, b"slow")
    elif path == "/offer":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        piece = {"type": "http.response.body", "body": BLOCK, "more_body": True}
        await offer(int(scope["query_string"]), send, piece)
        await send({"type": "http.response.body", "body": b""})
    elif path == "/upload":
        await upload(receive, send, float(scope["query_string"]))
    else:
        await answer(send, b"%d" % os.getpid())


async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await lifespan(receive, send)
        return
    stop = scope["extensions"]["leanserve.shutdown"]["event"]
    if scope["type"] == "websocket":
        await websocket(scope, receive, send, stop)
    else:
        await http(scope, receive, send, stop)
