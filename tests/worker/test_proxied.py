"""leanserve.worker.proxied: the PROXY protocol in front of HTTP and of TLS, with both event loops."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import ssl
from pathlib import Path
from typing import Any

import pytest
import trustme

from leanserve.errors import SettingsError
from leanserve.server import check_early
from leanserve.settings import Settings
from leanserve.worker import proxied
from leanserve.worker.worker import Worker
from protocol.test_proxy_header import GOOD, V4, V6, binary, block
from served import Client, eventually, listener, run, serving

LINE = b"PROXY TCP4 203.0.113.7 192.0.2.1 56324 443\r\n"
GET = b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
WHO = {"client": ["203.0.113.7", 56324], "server": ["192.0.2.1", 443], "scheme": "http"}


@pytest.fixture(params=["asyncio", "uvloop"])
def loop(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def who(scope: Any, receive: Any, send: Any) -> None:
    """Answers with what the scope says of the peer."""
    if scope["type"] == "lifespan":
        raise RuntimeError("no lifespan")
    body = json.dumps({name: scope[name] for name in ("client", "server", "scheme")}).encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


async def ask(worker: Worker, *pieces: bytes, pause: float = 0.0) -> Any:
    """The scope that the application saw; "closed" without an answer; else the status."""
    async with await Client.open(worker) as client:
        with contextlib.suppress(ConnectionError):
            await client.send(*pieces, pause=pause)
        try:
            responses = await client.read_all()
        except ConnectionResetError:
            return "closed"
        if not responses:
            return "closed"
        return json.loads(responses[0].body) if responses[0].status == 200 else responses[0].status


def required(**flat: Any) -> Any:
    return serving(who, proxy_protocol="required", **flat)


# What the application sees


@pytest.mark.parametrize(("header", "ends"), GOOD)
def test_the_client_is_whom_the_header_names(loop: str, header: bytes, ends: Any) -> None:
    async def main() -> None:
        async with required() as worker:
            seen = await ask(worker, header + GET)
            if ends is None:
                assert seen["client"][0] == "127.0.0.1"
                assert seen["server"] == list(worker.addresses[0][:2])
            else:
                assert (seen["client"], seen["server"]) == (
                    ends.client and list(ends.client), ends.server and list(ends.server),
                )  # fmt: skip

    run(loop, main)


@pytest.mark.parametrize("mode", ["required", "optional"])
def test_a_header_in_pieces(loop: str, mode: str) -> None:
    async def main() -> None:
        async with serving(who, proxy_protocol=mode) as worker:
            for header in (LINE, binary(0x11, block(V4))):
                assert await ask(worker, header[:1], header[1:20], header[20:] + GET, pause=0.03) == WHO

    run(loop, main)


def test_optional(loop: str) -> None:
    async def main() -> None:
        async with serving(who, proxy_protocol="optional") as worker:
            assert await ask(worker, LINE + GET) == WHO
            assert (await ask(worker, GET))["client"][0] == "127.0.0.1"
            # "P", "\r\n": either may still begin a header
            for at in (1, 2):
                post = b"P" * 2 + GET
                assert (await ask(worker, post[:at], post[at:], pause=0.03))["client"][0] == "127.0.0.1"
                blank = b"\r\n" + GET
                assert (await ask(worker, blank[:at], blank[at:], pause=0.03))["client"][0] == "127.0.0.1"
            assert await ask(worker, b"PROXY / HTTP/1.1\r\n\r\n") == "closed"

    run(loop, main)


@pytest.mark.parametrize("mode", ["required", "optional"])
def test_who_is_not_trusted_is_not_believed(loop: str, mode: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "leanserve")

    async def main() -> None:
        async with serving(who, proxy_protocol=mode, proxy_protocol_allow_ips="10.0.0.0/8, unix") as worker:
            if mode == "required":
                assert await ask(worker, LINE + GET) == await ask(worker, GET) == "closed"
                assert "refused 127.0.0.1: a PROXY header is required" in caplog.text
            else:
                assert await ask(worker, LINE + GET) == 400  # it is a malformed request
                assert (await ask(worker, GET))["client"][0] == "127.0.0.1"

    run(loop, main)


def test_off_means_off(loop: str) -> None:
    async def main() -> None:
        async with serving(who) as worker:
            assert await ask(worker, LINE + GET) == 400
            assert worker._acceptor._door is None

    run(loop, main)


def test_without_a_header_or_with_a_wrong_one(loop: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "leanserve")

    async def main() -> None:
        async with required() as worker:
            hello = b"\x16\x03\x01" + b"\0" * 40  # of TLS
            for data in (GET, LINE.replace(b"\r", b"") + GET, b"PROXY TCP4 x\r\n", hello):
                assert await ask(worker, data) == "closed"
            assert await ask(worker, LINE + GET) == WHO
            for _ in range(30):
                assert await ask(worker, GET) == "closed"
            lines = [record for record in caplog.records if "refused 127.0.0.1" in record.getMessage()]
            assert len(lines) < 30  # ten a second

    run(loop, main)


def test_forwarded_headers_are_believed_of_whom_the_header_names(loop: str) -> None:
    forwarded = GET.replace(b"host: a", b"host: a\r\nx-forwarded-for: 198.51.100.9")

    async def main() -> None:
        async with required() as worker:  # forwarded_allow_ips is loopback, which the client is not
            assert (await ask(worker, LINE + forwarded))["client"] == ["203.0.113.7", 56324]
            assert (await ask(worker, b"PROXY UNKNOWN\r\n" + forwarded))["client"] == ["198.51.100.9", 0]
        async with required(forwarded_allow_ips="203.0.113.0/24") as worker:
            assert (await ask(worker, LINE + forwarded))["client"] == ["198.51.100.9", 0]

    run(loop, main)


def test_the_access_log_names_the_client(loop: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "leanserve.access")

    async def main() -> None:
        async with required(access_log=True) as worker:
            assert await ask(worker, LINE + GET) == WHO
            await eventually(lambda: "203.0.113.7" in caplog.text)

    run(loop, main)


def test_unix_sockets(loop: str, tmp_path: Path) -> None:
    async def main() -> None:
        for trusted in ("unix", "127.0.0.1"):
            path = str(tmp_path / trusted)
            flat = {"proxy_protocol": "required", "proxy_protocol_allow_ips": trusted}
            async with serving(who, listener(socket.AF_UNIX, path), **flat) as worker:
                assert await ask(worker, LINE + GET) == (WHO if trusted == "unix" else "closed")

    run(loop, main)


def test_ipv6(loop: str) -> None:
    async def main() -> None:
        with contextlib.suppress(OSError):
            sock = listener(socket.AF_INET6, ("::1", 0))
            async with serving(who, sock, proxy_protocol="required") as worker:
                assert (await ask(worker, binary(0x21, block(V6)) + GET))["client"] == ["2001:db8::7", 56324]

    run(loop, main)


# TLS


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ssl.SSLContext]:
    authority = trustme.CA()
    cert = authority.issue_cert("localhost")
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    cert.private_key_and_cert_chain_pem.write_to_path(path)
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return str(path), context


def ask_over_tls(address: Any, context: ssl.SSLContext, header: bytes) -> bytes:
    """In a thread: the header goes out by itself or together with the ClientHello."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    over = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    with socket.create_connection(address[:2], timeout=10) as sock:
        answer, asked = b"", False
        outgoing.write(b"")
        first = header
        while True:
            try:
                if not asked:
                    over.do_handshake()
                    over.write(GET)
                    asked = True
                else:
                    piece = over.read(65536)
                    if not piece:
                        return answer
                    answer += piece
            except ssl.SSLWantReadError:
                if data := outgoing.read():
                    sock.sendall(first + data)
                    first = b""
                received = sock.recv(65536)
                if not received:
                    return answer
                incoming.write(received)
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return answer
            if data := outgoing.read():
                sock.sendall(first + data)
                first = b""


@pytest.mark.parametrize("mode", ["required", "optional"])
def test_in_front_of_tls(loop: str, mode: str, tls: tuple[str, ssl.SSLContext]) -> None:
    """The header and the ClientHello come in one segment: not a byte more than the header is taken."""

    async def main() -> None:
        async with serving(who, proxy_protocol=mode, ssl_certfile=tls[0]) as worker:
            for header in (LINE, binary(0x11, block(V4) + b"\x04" * 400)):
                answer = await asyncio.to_thread(ask_over_tls, worker.addresses[0], tls[1], header)
                assert json.loads(answer.partition(b"\r\n\r\n")[2]) == {**WHO, "scheme": "https"}
            if mode == "optional":
                answer = await asyncio.to_thread(ask_over_tls, worker.addresses[0], tls[1], b"")
                assert b'"127.0.0.1"' in answer

    run(loop, main)


def test_the_handshake_is_bounded_too(loop: str, tls: tuple[str, ssl.SSLContext]) -> None:
    async def main() -> None:
        flat = {"ssl_certfile": tls[0], "tls_handshake_timeout": 0.2}
        async with required(**flat) as worker, await Client.open(worker) as client:
            await client.send(LINE)
            assert await client.closes_within(5)
            await eventually(lambda: not worker._acceptor.busy)

    run(loop, main)


# Bounds


@pytest.mark.parametrize("sent", [b"", LINE[:9], binary(0x11, block(V4))[:20]])
def test_who_does_not_send_it_in_time_is_closed(loop: str, sent: bytes) -> None:
    async def main() -> None:
        async with required(first_byte_timeout=0.2) as worker, await Client.open(worker) as client:
            await client.send(sent)
            assert await client.closes_within(5)
            await eventually(lambda: not worker._acceptor.busy)
            assert await ask(worker, LINE + GET) == WHO

    run(loop, main)


def test_who_leaves_before_the_header_leaves_nothing(loop: str) -> None:
    async def main() -> None:
        async with required(first_byte_timeout=1.0) as worker:
            for sent in (b"", LINE[:9]):  # who leaves behind a part of one is noticed at the deadline
                async with await Client.open(worker) as client:
                    await client.send(sent)
                    client.reset()
            await eventually(lambda: not worker._acceptor.busy)

    run(loop, main)


def test_the_number_of_those_who_wait_is_bounded(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Further connections wait in the kernel, and are taken when one of the others is done."""
    monkeypatch.setattr(proxied, "_MOST_AWAITED", 3)

    async def main() -> None:
        async with required(first_byte_timeout=30) as worker, contextlib.AsyncExitStack() as stack:
            door = worker._acceptor._door
            assert door is not None
            silent = [await stack.enter_async_context(await Client.open(worker)) for _ in range(9)]
            await eventually(lambda: len(door._awaited) >= 3)
            answer = asyncio.ensure_future(ask(worker, LINE + GET))
            await asyncio.sleep(0.1)
            assert not answer.done()
            assert not door._reading
            for client in silent:
                client.sock.close()
            assert await answer == WHO
            assert door._reading

    run(loop, main)


def test_a_failing_accept_is_tried_again_later(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxied, "_REST_S", 0.3)

    async def main() -> None:
        async with required() as worker, await Client.open(worker) as client:
            await eventually(lambda: worker._acceptor.busy)
            door = worker._acceptor._door
            assert door is not None
            calls = []

            class Full:
                def accept(self) -> Any:
                    calls.append(1)
                    raise OSError(24, "Too many open files")

            door._accept(Full())  # type: ignore[arg-type]
            await client.send(LINE + GET)
            assert len(await client.read_all()) == 1
            assert not door._reading  # who is done does not end the rest
            await eventually(lambda: door._reading)
            assert len(calls) == 1
            assert await ask(worker, LINE + GET) == WHO

    run(loop, main)


# Ceasing


def test_a_drain_waits_for_those_whose_header_is_under_way(loop: str) -> None:
    async def main() -> None:
        async with required(drain_idle_timeout=5.0) as worker, contextlib.AsyncExitStack() as stack:
            silent = await stack.enter_async_context(await Client.open(worker))
            begun = await stack.enter_async_context(await Client.open(worker))
            queued = await stack.enter_async_context(await Client.open(worker))
            await begun.send(LINE[:9])
            draining = asyncio.ensure_future(worker.drain())
            await asyncio.sleep(0.1)
            await begun.send(LINE[9:] + GET)
            await queued.send(LINE + GET)
            await asyncio.sleep(1.3)  # longer than the drain waits for handshakes by itself
            assert not draining.done()
            await silent.send(LINE + GET)
            for client in (begun, queued, silent):
                (response,) = await client.read_all()
                assert json.loads(response.body) == WHO
            worker.hurry()
            await draining

    run(loop, main)


def test_a_drain_does_not_wait_for_the_silent(loop: str) -> None:
    async def main() -> None:
        async with required(drain_idle_timeout=0.2, first_byte_timeout=60) as worker:
            async with await Client.open(worker) as client:
                await eventually(lambda: worker._acceptor.busy)
                await worker.drain()
                assert await client.closes_within(5)
                assert not worker._acceptor.busy

    run(loop, main)


# Settings


def test_settings() -> None:
    with pytest.raises(SettingsError, match="proxy_protocol_allow_ips"):
        check_early(who, Settings.build(proxy_protocol="required", proxy_protocol_allow_ips="localhost"))
    check_early(who, Settings.build(proxy_protocol_allow_ips="localhost"))  # off: not looked at
