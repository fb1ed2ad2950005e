"""leanserve.compat.wsgi: PEP 3333, sentence by sentence, and a real Flask application."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator
from typing import Any
from wsgiref.validate import validator

import flask
import httpx
import pytest

from leanserve.compat.wsgi import WsgiAdapter, build_environ
from leanserve.errors import AppProtocolError, ClientDisconnected


def scope(**changes: Any) -> dict[str, Any]:
    return {
        "type": "http",
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": "/",
        "raw_path": b"/",
        "query_string": b"",
        "root_path": "",
        "headers": [],
        "client": ("192.0.2.1", 4321),
        "server": ("127.0.0.1", 8000),
        **changes,
    }


class Peer:
    """Both ends of one exchange: body pieces in, messages out."""

    def __init__(self, *pieces: bytes, ends: bool = True) -> None:
        self.pieces = list(pieces)
        self.ends = ends
        self.received = 0
        self.sent: list[Any] = []
        self.gone = False

    async def receive(self) -> dict[str, Any]:
        self.received += 1
        if self.pieces:
            piece = self.pieces.pop(0)
            return {"type": "http.request", "body": piece, "more_body": bool(self.pieces) or not self.ends}
        return {"type": "http.disconnect"} if not self.ends else {"type": "http.request", "body": b""}

    async def send(self, message: Any) -> None:
        if self.gone:
            raise ClientDisconnected("gone")
        self.sent.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(m["body"] for m in self.sent[1:])

    def run(self, app: Any, **changes: Any) -> Peer:
        asyncio.run(WsgiAdapter(app)(scope(**changes), self.receive, self.send))
        return self


def test_environ() -> None:
    environ = build_environ(
        scope(
            method="POST", path="/api/a b/ü", raw_path=b"/api/a%20b/%C3%BC", query_string=b"x=1&y=%20",
            root_path="/api", scheme="https", http_version="1.0",
            headers=[
                (b"host", b"example.org"), (b"content-type", b"text/plain"), (b"content-length", b"3"),
                (b"x-a", b"1"), (b"x-a", b"2"), (b"cookie", b"a=1"), (b"cookie", b"b=2"),
                (b"x_forwarded_for", b"spoof"), (b"x-latin", b"\xe9"),
            ],
        )
    )
    assert {key: value for key, value in environ.items() if not key.startswith("wsgi.")} == {
        "REQUEST_METHOD": "POST",
        "SCRIPT_NAME": "/api",
        "PATH_INFO": "/a b/\xc3\xbc",
        "QUERY_STRING": "x=1&y=%20",
        "REQUEST_URI": "/api/a%20b/%C3%BC?x=1&y=%20",
        "SERVER_NAME": "127.0.0.1",
        "SERVER_PORT": "8000",
        "SERVER_PROTOCOL": "HTTP/1.0",
        "REMOTE_ADDR": "192.0.2.1",
        "REMOTE_PORT": "4321",
        "HTTPS": "on",
        "CONTENT_TYPE": "text/plain",
        "CONTENT_LENGTH": "3",
        "HTTP_HOST": "example.org",
        "HTTP_X_A": "1,2",
        "HTTP_COOKIE": "a=1; b=2",
        "HTTP_X_LATIN": "\xe9",
    }
    assert environ["wsgi.url_scheme"] == "https"
    assert environ["wsgi.version"] == (1, 0)


@pytest.mark.parametrize(
    ("path", "root", "script", "info"),
    [
        ("/a", "", "", "/a"),
        ("/api", "/api", "/api", ""),
        ("/apix", "/api", "/api", "/apix"),
        ("/x", "/p", "/p", "/x"),
    ],
)
def test_script_name_and_path_info(path: str, root: str, script: str, info: str) -> None:
    environ = build_environ(scope(path=path, raw_path=path.encode(), root_path=root))
    assert (environ["SCRIPT_NAME"], environ["PATH_INFO"]) == (script, info)


def test_unix_socket_has_no_addresses() -> None:
    environ = build_environ(scope(client=None, server=("/tmp/s", None)))
    assert (environ["SERVER_NAME"], environ["SERVER_PORT"], environ["REMOTE_ADDR"]) == ("/tmp/s", "80", "")


def test_reference_validator_finds_no_fault() -> None:
    def app(environ: Any, start_response: Any) -> Any:
        body = environ["wsgi.input"].read(5) + environ["wsgi.input"].read(100)
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [body, b"!"]

    peer = Peer(b"hel", b"lo wo", b"rld").run(validator(app), method="POST")
    assert peer.body == b"hello world!"


def test_blocks_are_passed_on_one_by_one() -> None:
    seen: list[int] = []
    peer = Peer(b"")

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [("X-A", "b"), ("Connection", "close")])
        for number in range(3):
            seen.append(len(peer.sent))
            yield b"%d" % number

    peer.run(app)
    assert seen == [0, 2, 3]
    assert peer.sent[0] == {"type": "http.response.start", "status": 200, "headers": [(b"x-a", b"b")]}
    assert [m["more_body"] for m in peer.sent[1:]] == [True, True, True, False]


def test_known_length_needs_no_closing_message() -> None:
    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [("Content-Length", "4")])
        return [b"ab", b"cd"]

    assert [m["more_body"] for m in Peer(b"").run(app).sent[1:]] == [True, False]
    assert [m["more_body"] for m in Peer(b"").run(app, method="HEAD").sent[1:]] == [True, True, False]


def test_back_pressure_stops_the_application() -> None:
    produced: list[int] = []
    release = asyncio.Event()

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        for number in range(50):
            produced.append(number)
            yield b"x"

    class Slow(Peer):
        async def send(self, message: Any) -> None:
            await release.wait()
            await super().send(message)

    async def scenario() -> None:
        peer = Slow(b"")
        task = asyncio.create_task(WsgiAdapter(app)(scope(), peer.receive, peer.send))
        while not produced:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        assert produced == [0]
        release.set()
        await task
        assert peer.body == b"x" * 50

    asyncio.run(scenario())


def test_input_is_taken_only_as_it_is_read() -> None:
    peer = Peer(*[b"line\n"] * 100)

    def app(environ: Any, start_response: Any) -> Any:
        assert peer.received == 0
        assert environ["wsgi.input"].readline() == b"line\n"
        assert peer.received == 1
        assert sum(len(line) for line in environ["wsgi.input"]) == 99 * 5
        assert environ["wsgi.input"].read() == b""
        start_response("204 No Content", [])
        return []

    assert peer.run(app).sent[0]["status"] == 204


def test_client_gone_while_reading() -> None:
    def app(environ: Any, start_response: Any) -> Any:
        environ["wsgi.input"].read()
        raise AssertionError("a cut body must not look complete")

    with pytest.raises(ClientDisconnected):
        Peer(b"half", ends=False).run(app)


def test_close_is_called_when_the_client_is_gone() -> None:
    closed: list[bool] = []
    peer = Peer(b"")

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        try:
            yield b"a"
            peer.gone = True
            yield b"b"
        finally:
            closed.append(True)

    with pytest.raises(ClientDisconnected):
        peer.run(app)
    assert closed == [True]


def test_write_callable() -> None:
    def app(environ: Any, start_response: Any) -> Any:
        write = start_response("200 OK", [])
        write(b"a")
        write(b"b")
        return [b"c"]

    assert Peer(b"").run(app).body == b"abc"


def test_exc_info_replaces_the_head_while_it_is_unsent() -> None:
    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        try:
            raise ValueError("late")
        except ValueError:
            start_response("500 Oops", [], sys.exc_info())
        return [b"error page"]

    assert Peer(b"").run(app).sent[0]["status"] == 500


def test_exc_info_raises_once_the_head_is_out() -> None:
    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        yield b"a"
        try:
            raise ValueError("late")
        except ValueError:
            start_response("500 Oops", [], sys.exc_info())

    with pytest.raises(ValueError, match="late"):
        Peer(b"").run(app)


def _twice(environ: Any, start_response: Any) -> Any:
    start_response("200 OK", [])
    start_response("200 OK", [])
    return []


def _never(environ: Any, start_response: Any) -> Any:
    return []


def _early(environ: Any, start_response: Any) -> Any:
    return [b"a"]


def _text(environ: Any, start_response: Any) -> Any:
    start_response("200 OK", [])
    return ["text"]


def _status(environ: Any, start_response: Any) -> Any:
    start_response("OK", [])
    return []


@pytest.mark.parametrize(
    ("app", "message"),
    [
        (_twice, "called twice"),
        (_never, "without calling start_response"),
        (_early, "before it called start_response"),
        (_text, "must be bytes, not str"),
        (_status, "must look like '200 OK'"),
    ],
)
def test_broken_applications(app: Any, message: str) -> None:
    with pytest.raises(AppProtocolError, match=message):
        Peer(b"").run(app)


def test_threads_are_limited() -> None:
    running, most, lock = 0, 0, threading.Lock()
    barrier = threading.Barrier(2, timeout=20)

    def app(environ: Any, start_response: Any) -> Any:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        barrier.wait()  # two at a time, or nothing moves
        with lock:
            running -= 1
        start_response("200 OK", [])
        return []

    async def scenario() -> None:
        adapter = WsgiAdapter(app, threads=2)
        peers = [Peer(b"") for _ in range(6)]
        await asyncio.gather(*(adapter(scope(), peer.receive, peer.send) for peer in peers))

    asyncio.run(scenario())
    assert most == 2


def test_other_scopes() -> None:
    peer = Peer()
    asyncio.run(WsgiAdapter(_never)({"type": "websocket"}, peer.receive, peer.send))
    assert peer.sent == [{"type": "websocket.close"}]
    asyncio.run(WsgiAdapter(_never)({"type": "lifespan"}, peer.receive, peer.send))
    assert len(peer.sent) == 1


def test_flask() -> None:
    app = flask.Flask(__name__)

    @app.post("/echo/<name>")
    def echo(name: str) -> Any:
        return {"name": name, "json": flask.request.get_json(), "q": flask.request.args["q"]}

    @app.get("/stream")
    def stream() -> Any:
        return flask.Response((f"{n}\n" for n in range(3)), mimetype="text/plain")

    async def scenario() -> None:
        transport = httpx.ASGITransport(app=WsgiAdapter(app))  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            answer = await client.post("/echo/jürgen?q=1", json={"a": [1]})
            assert answer.json() == {"name": "jürgen", "json": {"a": [1]}, "q": "1"}
            assert (await client.get("/stream")).text == "0\n1\n2\n"
            assert (await client.get("/none")).status_code == 404

    asyncio.run(scenario())
