"""leanserve.worker.reconfigure in a worker that serves; tests/e2e/test_reconfigure.py has processes."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from leanserve.scoreboard import Lane, Scoreboard
from leanserve.transport.certificate import expiry_of
from leanserve.worker.reconfigure import reconfigure
from served import GET, LOOPS, Client, hello, run, serving, tls_client

_MADE: list[ssl.SSLContext] = []


@pytest.fixture
def board() -> Iterator[Scoreboard]:
    board = Scoreboard.create()
    yield board
    board.close()


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def issue(authority: trustme.CA, path: Path, kind: trustme.KeyType = trustme.KeyType.ECDSA) -> bytes:
    """Write certificate and key; the certificate as DER."""
    issued = authority.issue_cert("localhost", key_type=kind)
    issued.private_key_and_cert_chain_pem.write_to_path(path)
    return ssl.PEM_cert_to_DER_cert(issued.cert_chain_pems[0].bytes().decode())


def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


async def handshake(worker: Any, context: ssl.SSLContext) -> tuple[bytes, str | None]:
    """The certificate that is shown, and the protocol that is chosen."""
    context.set_alpn_protocols(["http/1.1"])
    _, writer = await tls_client(worker, context)
    found = writer.get_extra_info("ssl_object")
    writer.close()
    await writer.wait_closed()
    return found.getpeercert(binary_form=True), found.selected_alpn_protocol()


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("first", list(trustme.KeyType))
def test_the_newest_certificate_is_shown(
    loop: str, first: trustme.KeyType, authority: trustme.CA, tmp_path: Path, board: Scoreboard
) -> None:
    """Also when its key is of another kind, of which clients may like the old one better."""
    path = tmp_path / "both.pem"
    kinds = [first, *trustme.KeyType, first]

    async def main() -> None:
        ders = [issue(authority, path, kinds[0])]
        lane: Lane = board.lane(0, 0)
        async with serving(hello, ssl_certfile=str(path), lane=lane) as worker:
            assert await handshake(worker, trusting(authority)) == (ders[0], "http/1.1")
            for kind in kinds[1:]:
                ders.append(issue(authority, path, kind))
                reconfigure(worker, {})
                assert await handshake(worker, trusting(authority)) == (ders[-1], "http/1.1")
                pem = worker.server_cert
                assert pem is not None
                assert ssl.PEM_cert_to_DER_cert(pem) == ders[-1]
                assert board.read(0, 0).certificate_expiry_s == int(expiry_of(pem))

    run(loop, main)


@pytest.mark.parametrize("broken", ["junk", "missing", "mismatch"])
def test_a_broken_pair_changes_nothing(
    broken: str, authority: trustme.CA, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, other = tmp_path / "both.pem", tmp_path / "other.pem"

    async def main() -> None:
        der = issue(authority, path)
        async with serving(hello, ssl_certfile=str(path)) as worker:
            text = worker.server_cert
            issue(authority, other)
            {
                "junk": lambda: path.write_text("no PEM"),
                "missing": path.unlink,
                "mismatch": lambda: path.write_text(
                    path.read_text().partition("-----BEGIN CERTIFICATE")[0]
                    + "-----BEGIN CERTIFICATE" + other.read_text().partition("-----BEGIN CERTIFICATE")[2]
                ),
            }[broken]()  # fmt: skip
            reconfigure(worker, {"keep_alive_timeout": 7.0})
            assert (await handshake(worker, trusting(authority)))[0] == der
            assert worker.server_cert == text
            assert worker.settings.timeouts.keep_alive_timeout == 75.0

    run("asyncio", main)
    (line,) = [each.getMessage() for each in caplog.records if each.levelno == logging.ERROR]
    assert line.startswith("the old settings and certificate stay: cannot ")


def test_other_authorities_of_clients(tmp_path: Path, authority: trustme.CA) -> None:
    path, clients = tmp_path / "both.pem", tmp_path / "clients.pem"
    first, second = trustme.CA(), trustme.CA()

    async def knocks(worker: Any, by: trustme.CA) -> bool:
        context = trusting(authority)
        by.issue_cert("somebody@example.org").configure_cert(context)
        try:
            reader, writer = await tls_client(worker, context)
            writer.write(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
            answer = await reader.read()
        except OSError:
            return False
        writer.close()
        return answer.startswith(b"HTTP/1.1 200")

    async def main() -> None:
        issue(authority, path)
        first.cert_pem.write_to_path(clients)
        async with serving(
            hello, ssl_certfile=str(path), ssl_ca_certs=str(clients), ssl_cert_reqs="required"
        ) as worker:
            assert [await knocks(worker, by) for by in (first, second)] == [True, False]
            second.cert_pem.write_to_path(clients)
            reconfigure(worker, {})
            assert [await knocks(worker, by) for by in (first, second)] == [False, True]

    run("asyncio", main)


def make_context() -> ssl.SSLContext:
    """A factory that chooses by name itself."""
    ca = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("localhost").configure_cert(context)
    named: list[str | None] = []
    context.sni_callback = lambda ssl_object, name, context: named.append(name)  # type: ignore[assignment]
    context.named = named  # type: ignore[attr-defined]
    _MADE.append(context)
    return context


def test_a_factory_is_called_anew(caplog: pytest.LogCaptureFixture) -> None:
    _MADE.clear()
    anything = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anything.check_hostname, anything.verify_mode = False, ssl.CERT_NONE

    async def main() -> None:
        async with serving(hello, ssl_context_factory=make_context) as worker:
            before, _ = await handshake(worker, anything)
            reconfigure(worker, {})
            after, _ = await handshake(worker, anything)
            assert before != after
            assert [context.named for context in _MADE] == [["localhost"], ["localhost"]]  # type: ignore[attr-defined]

    run("asyncio", main)


@pytest.mark.parametrize("loop", LOOPS)
def test_limits_hold_from_the_next_request_on(loop: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["extensions"]["leanserve.cancellation"].get("timeout"))
        await hello(scope, receive, send)

    seen: list[Any] = []

    async def main() -> None:
        async with serving(app, lifespan="off") as worker, await Client.open(worker) as client:
            await client.send(GET)
            await client.read_one()
            reconfigure(worker, {"request_timeout": 9.0, "max_body_size": 3, "access_log": True})
            assert worker.keeps_records
            await client.send(GET)
            await client.read_one()
            async with await Client.open(worker) as other:
                await other.send(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\n")
                assert (await other.read_one()).status == 413
        assert seen == [None, 9.0]

    access = logging.getLogger("leanserve.access")
    disabled = access.disabled
    try:
        run(loop, main)
    finally:
        access.disabled = disabled


def test_how_long_requests_may_wait() -> None:
    async def main() -> None:
        async with serving(hello, max_concurrent_requests=1, max_queue=4) as worker:
            reconfigure(worker, {"queue_timeout": 0.5})
            assert worker.admission is not None
            assert worker.admission.longest_wait_s == 0.5

    run("asyncio", main)
