"""leanserve.server: in a loop, in a thread, in processes; and nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import ssl
import subprocess
import sys
import textwrap
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import anyio
import flask
import httpx
import pytest
import trustme

from leanserve import BootFailed, Server, SettingsError
from leanserve.server import check_early


async def hello(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        raise RuntimeError("no lifespan")
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"hello"})


class Living:
    """An application that counts its lives."""

    def __init__(self) -> None:
        self.lives: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await hello(scope, receive, send)
            return
        await receive()
        self.lives.append("up")
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await asyncio.sleep(0.05)  # whoever waits for the end has to wait for real
        self.lives.append("down")
        await send({"type": "lifespan.shutdown.complete"})


def get(server: Server) -> bytes:
    with urllib.request.urlopen(server.urls[0], timeout=20) as answer:
        body: bytes = answer.read()
        return body


@pytest.mark.fastpath
def test_in_a_running_loop() -> None:
    app = Living()
    logging_before = list(logging.getLogger("leanserve").handlers)

    async def scenario() -> None:
        handlers = (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
        async with Server(app, port=0).running() as server:
            assert server.addresses[0][1] != 0
            assert repr(server).startswith("<Server http://127.0.0.1:")
            async with httpx.AsyncClient() as client:
                assert (await client.get(server.urls[0])).text == "hello"
            assert server.statistics()["heads_recognised"] == 1
            with pytest.raises(RuntimeError, match="runs already"):
                async with server.running():
                    pass
            assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
            assert logging.getLogger("leanserve").handlers == logging_before
        assert server.addresses == ()
        assert server.statistics() == {}
        assert repr(server) == "<Server stopped>"

    asyncio.run(scenario())
    assert app.lives == ["up", "down"]


def test_lifespan_shutdown_runs_when_the_block_is_cancelled() -> None:
    app = Living()

    async def scenario() -> None:
        started = asyncio.Event()

        async def serve() -> None:
            async with Server(app, port=0).running():
                started.set()
                await asyncio.sleep(50)

        task = asyncio.create_task(serve())
        await started.wait()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    asyncio.run(scenario())
    assert app.lives == ["up", "down"]


def test_lifespan_shutdown_runs_in_a_cancelled_scope() -> None:
    app = Living()

    async def scenario() -> None:
        # anyio cancels at every await until the scope is left, not once as a task's cancel() does
        with anyio.CancelScope() as scope:
            async with Server(app, port=0).running():
                scope.cancel()
                await anyio.sleep(50)

    asyncio.run(scenario())
    assert app.lives == ["up", "down"]


def test_lifespan_shutdown_runs_when_the_block_fails() -> None:
    app = Living()

    async def scenario() -> None:
        async with Server(app, port=0).running():
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        asyncio.run(scenario())
    assert app.lives == ["up", "down"]


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_in_a_thread(loop: str) -> None:
    app = Living()
    server = Server(app, port=0, loop=loop)
    for _ in range(2):  # it may be started again
        with server:
            assert get(server) == b"hello"
            assert server.start() is server
    server.stop()
    assert app.lives == ["up", "down"] * 2


def test_wsgi_application() -> None:
    app = flask.Flask(__name__)
    app.add_url_rule("/", view_func=lambda: "from flask")
    app.add_url_rule("/echo", "echo", methods=["POST"], view_func=lambda: flask.request.get_data())
    with Server(app, port=0) as server:
        assert get(server) == b"from flask"
        body = os.urandom(1 << 20)
        request = urllib.request.Request(server.urls[0] + "/echo", data=body, method="POST")
        with urllib.request.urlopen(request, timeout=20) as answer:
            assert answer.read() == body


def test_unix_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with Server(hello, uds=path) as server:
        assert server.urls == (f"unix:{path}",)
        with httpx.Client(transport=httpx.HTTPTransport(uds=path)) as client:
            assert client.get("http://x/").text == "hello"
    assert not os.path.exists(path)


def test_tls(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / "both.pem")
    context = ssl.create_default_context()
    authority.configure_trust(context)
    with Server(hello, port=0, ssl_certfile=str(tmp_path / "both.pem")) as server:
        assert server.urls[0].startswith("https://")
        with httpx.Client(verify=context) as client:
            assert client.get(server.urls[0]).text == "hello"


def test_bind_failure_reaches_the_caller() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        async def scenario() -> None:
            async with Server(hello, port=port).running():
                raise AssertionError

        with pytest.raises(OSError, match=f"127.0.0.1:{port}.*taken"):
            asyncio.run(scenario())
        with pytest.raises(OSError, match="taken"):
            Server(hello, port=port).start()
        with pytest.raises(OSError, match="taken"):
            Server(hello, port=port).serve()


@pytest.mark.parametrize(
    ("app", "settings", "error", "message"),
    [
        (hello, {"prt": 1}, SettingsError, "unknown setting"),
        (hello, {"workers": 2}, SettingsError, "need serve"),
        (hello, {"reload": True}, SettingsError, "need serve"),
        ("nosuch_module:app", {}, BootFailed, "cannot import"),
        ("nocolon", {}, SettingsError, "MODULE:ATTRIBUTE"),
        (hello, {"lifespan": "on"}, BootFailed, "no lifespan"),
        (hello, {"env_file": "/nonexistent"}, SettingsError, "cannot read env_file"),
        (hello, {"ssl_certfile": "/nonexistent"}, SettingsError, "/nonexistent"),
    ],
)
def test_failures_reach_the_caller_of_start(app: Any, settings: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        Server(app, **{"port": 0, **settings}).start()


def test_early_check_of_objects() -> None:
    with pytest.raises(SettingsError, match="by name"):
        check_early(hello, Server(hello, start_method="spawn").settings)
    with pytest.raises(SettingsError, match="by name"):
        check_early(hello, Server(hello, reload=True).settings)


def test_serve_needs_the_main_thread() -> None:
    caught: list[BaseException] = []

    def run() -> None:
        try:
            Server(hello, port=0).serve()
        except RuntimeError as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert "main thread" in str(caught[0])


def _descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors in /proc")
@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_many_cycles_leak_nothing(loop: str) -> None:
    def cycle() -> None:
        with Server(hello, port=0, loop=loop, drain_idle_timeout=0) as server:
            with socket.create_connection(server.addresses[0], timeout=20) as client:
                client.sendall(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
                while client.recv(65536):
                    pass

    cycle()
    descriptors, threads = _descriptors(), threading.active_count()
    for _ in range(50):
        cycle()
    assert _descriptors() <= descriptors
    assert threading.active_count() <= threads


SCRIPT = """
import sys
from leanserve import Server

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        print("lifespan down", flush=True)
        await send({"type": "lifespan.shutdown.complete"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})
"""


def _start(tmp_path: Path, last: str) -> tuple[subprocess.Popen[str], int]:
    """Run SCRIPT with `last` as its last line on a free port."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT) + last.format(port=port))
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return process, port
        except OSError:
            time.sleep(0.05)
    process.kill()
    raise AssertionError(process.communicate()[1])


@pytest.mark.parametrize(
    "last",
    [
        "Server(app, port={port}, drain_idle_timeout=0).serve(workers=2); print('served')",
        "s = Server(app, port={port}, kill_grace=1); s._serve_in_process(s.settings); print('served')",
    ],
    ids=["supervised", "in process"],
)
def test_serve(tmp_path: Path, last: str) -> None:
    process, port = _start(tmp_path, last)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=20) as answer:
            assert answer.read() == b"hello"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=40)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, err
    assert "lifespan down" in out
    assert out.endswith("served\n")
    assert "Traceback" not in err


def test_exit_without_stop_still_ends_the_lifespan(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT + "Server(app, port=0, drain_idle_timeout=0).start()\n")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout) == (0, "lifespan down\n"), done.stderr


def test_serve_raises_when_the_application_cannot_start(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from leanserve import Server, BootFailed\n"
        "try:\n    Server('nosuch_module:app', port=0).serve()\n"
        "except BootFailed as error:\n    print('caught', error)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=50)
    assert done.stdout.startswith("caught"), done.stderr
    assert "no module named 'nosuch_module'" in done.stderr
    assert "Traceback" not in done.stderr


def test_whom_a_star_trusts_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "leanserve")
    with Server(hello, port=0, forwarded_allow_ips="10.0.0.1, *", proxy_protocol_allow_ips="*") as server:
        assert get(server) == get(server) == b"hello"
    assert [record.getMessage().partition(" ")[0] for record in caplog.records] == ["forwarded_allow_ips"]
    caplog.clear()
    with Server(hello, port=0, proxy_headers=False, forwarded_allow_ips="*"):
        pass
    assert not caplog.records
