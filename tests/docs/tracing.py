"""What really happens: the functions of leanserve that are called, over all processes, in their order.

Run as a program, ``tracing.py SCENE FILE``: plays one scene of docs/explain/flow.md on real sockets and
processes, and appends pid and name of each function to FILE when it is entered, and when a coroutine goes on.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, CloseConnection, Request, TextMessage

from leanserve.server import Server, run_supervised
from leanserve.settings import Settings

PREFIX = "leanserve."
_WAIT_S = 20.0


# A connection is drawn as one thing; the half of it that closes is a class of its own.
_BASE = ("transport.closing.ClosingConnection.", "transport.connection.Connection.")


def record(path: Path) -> None:
    """Write down every entered function of leanserve, in this thread and in processes forked from it."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(frame: FrameType, event: str, _arg: object) -> None:
        module = frame.f_globals.get("__name__") or ""  # None while the interpreter ends
        if event == "call" and module.startswith(PREFIX):
            name = f"{module.removeprefix(PREFIX)}.{frame.f_code.co_qualname}".replace(*_BASE)
            os.write(file, f"{os.getpid()} {name}\n".encode())

    sys.setprofile(note)


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers a GET with three bytes and echoes one WebSocket message."""
    if scope["type"] == "http":
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"abc"})
    elif scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        text = (await receive())["text"]
        await send({"type": "websocket.send", "text": text})
        assert (await receive())["type"] == "websocket.disconnect"


def _get(port: int) -> bytes:
    """The body of the answer to a GET, on a connection that would live on."""
    with socket.create_connection(("127.0.0.1", port), _WAIT_S) as client:
        client.sendall(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        answer = client.recv(65536)  # head and body are one write
        return answer.partition(b"\r\n\r\n")[2]


def _echo(port: int) -> None:
    connection = WSConnection(ConnectionType.CLIENT)
    with socket.create_connection(("127.0.0.1", port), _WAIT_S) as client:
        client.sendall(connection.send(Request(host="a", target="/")))
        while True:
            connection.receive_data(client.recv(65536) or None)
            for event in connection.events():
                if isinstance(event, AcceptConnection):
                    client.sendall(connection.send(TextMessage("hello")))
                elif isinstance(event, TextMessage):
                    client.sendall(connection.send(CloseConnection(1000)))
                elif isinstance(event, CloseConnection):
                    return


async def _in_one_loop(talk: Callable[[int], Any]) -> None:
    async with Server(app, port=0).running() as server:
        (_, port), *_ = server.addresses
        await asyncio.to_thread(talk, port)


async def tell_pid(scope: Any, receive: Any, send: Any) -> None:
    """The pid of the worker that answers."""
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"%d" % os.getpid()})


def _worker_of(port: int, *, other_than: int = 0) -> int:
    """The pid of a worker, once one answers that is not the one given."""
    end = time.monotonic() + _WAIT_S
    while time.monotonic() < end:
        try:
            pid = int(_get(port))
        except (OSError, ValueError):
            pid = 0
        if pid not in (0, other_than):
            return pid
        time.sleep(0.05)
    raise TimeoutError("no worker answers")


def _exists(pid: int) -> bool:
    """Whether the process is there, if only as a zombie: until then its death has not been dealt with."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _supervised(act: Callable[[int], None]) -> None:
    """A supervisor with one worker, to whom `act` happens; then SIGTERM."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]

    def play() -> None:
        try:
            worker = _worker_of(port)
            act(worker)
            _worker_of(port, other_than=worker)
            while _exists(worker):
                time.sleep(0.02)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    player = threading.Thread(target=play)
    player.start()
    code = run_supervised(tell_pid, Settings.build(port=port, access_log=False))
    player.join()
    if code:
        sys.exit(code)


SCENES: dict[str, Callable[[], None]] = {
    "request": lambda: asyncio.run(_in_one_loop(_get)),
    "websocket": lambda: asyncio.run(_in_one_loop(_echo)),
    "death": lambda: _supervised(lambda worker: os.kill(worker, signal.SIGKILL)),
    "roll": lambda: _supervised(lambda _worker: os.kill(os.getpid(), signal.SIGHUP)),
}


if __name__ == "__main__":
    record(Path(sys.argv[2]))
    SCENES[sys.argv[1]]()
