"""leanserve.transport.tls: settings that work, settings that fail with one line, and the tls extension."""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from leanserve.errors import SettingsError
from leanserve.settings import Settings, TlsSettings, uses_tls
from leanserve.transport.tls import build_context, describe_tls
from leanserve.worker.worker import Worker
from served import GET, Client, eventually, hello, listener, run, serving, tls_client


@pytest.fixture(params=["asyncio", "uvloop"])
def loop(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def folder(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    for name in ("one", "two"):
        cert = authority.issue_cert("localhost", "127.0.0.1", common_name=f"{name}.example")
        cert.private_key_pem.write_to_path(folder / f"{name}.key")
        cert.private_key_and_cert_chain_pem.write_to_path(folder / f"{name}.both")
        for pem in cert.cert_chain_pems:
            pem.write_to_path(folder / f"{name}.pem", append=True)
    key = serialization.load_pem_private_key((folder / "one.key").read_bytes(), None)
    (folder / "locked.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    authority.cert_pem.write_to_path(folder / "ca.pem")
    (folder / "junk").write_bytes(b"no PEM at all\n")
    (folder / "empty").write_bytes(b"")
    return folder


def build(folder: Path, **names: Any) -> ssl.SSLContext | None:
    files = ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs")
    flat = {name: str(folder / value) if name in files else value for name, value in names.items()}
    return build_context(TlsSettings(**flat))


# Settings


def shake_hands(server: ssl.SSLContext, client: ssl.SSLContext, session: Any = None) -> tuple[bool, Any]:
    """One connection in memory: whether it resumed the session, and the session it leaves."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    here = server.wrap_bio(up, down, server_side=True)
    there = client.wrap_bio(down, up, server_hostname="localhost", session=session)
    for _ in range(3):
        for side in (there, here):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
    here.write(b"an answer, and what is sent in front of it")
    assert there.read(100)
    return bool(there.session_reused), there.session


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_sessions_are_resumed_one_after_the_other(
    folder: Path, authority: trustme.CA, version: ssl.TLSVersion
) -> None:
    server = build(folder, ssl_certfile="one.both")
    assert server is not None
    client = ssl.create_default_context()
    client.maximum_version = version
    authority.configure_trust(client)
    resumed, session = shake_hands(server, client)
    assert not resumed
    for _ in range(3):  # each connection gives what the next one needs
        resumed, session = shake_hands(server, client, session)
        assert resumed
    assert server.num_tickets == 1


def test_no_certificate_no_tls() -> None:
    assert build_context(TlsSettings()) is None
    assert not uses_tls(TlsSettings())
    assert uses_tls(TlsSettings(ssl_certfile="x"))
    assert uses_tls(TlsSettings(ssl_context_factory=lambda: None))


@pytest.mark.parametrize(
    "names",
    [
        {"ssl_certfile": "one.both"},
        {"ssl_certfile": "one.pem", "ssl_keyfile": "one.key"},
        {"ssl_certfile": "one.pem", "ssl_keyfile": "locked.key", "ssl_keyfile_password": "secret"},
        {"ssl_certfile": "one.both", "ssl_ca_certs": "ca.pem", "ssl_cert_reqs": "required"},
        {"ssl_certfile": "one.both", "ssl_ciphers": "ECDHE+AESGCM"},
        {"ssl_certfile": "one.both", "ssl_min_version": "1.3"},
    ],
)
def test_settings_that_work(folder: Path, names: dict[str, str]) -> None:
    context = build(folder, **names)
    assert context is not None
    assert context.minimum_version is (
        ssl.TLSVersion.TLSv1_3 if "ssl_min_version" in names else ssl.TLSVersion.TLSv1_2
    )


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ({"ssl_certfile": "missing"}, "missing"),
        ({"ssl_certfile": "one.pem", "ssl_keyfile": "missing.key"}, "missing.key"),
        ({"ssl_certfile": "one.pem"}, "one.pem"),
        ({"ssl_certfile": "junk"}, "junk"),
        ({"ssl_certfile": "empty"}, "empty"),
        ({"ssl_certfile": "."}, "cannot"),
        ({"ssl_certfile": "one.pem", "ssl_keyfile": "two.key"}, "two.key"),
        ({"ssl_certfile": "one.pem", "ssl_keyfile": "junk"}, "junk"),
        ({"ssl_certfile": "one.pem", "ssl_keyfile": "locked.key"}, "password"),
        (
            {"ssl_certfile": "one.pem", "ssl_keyfile": "locked.key", "ssl_keyfile_password": "wrong"},
            "password",
        ),
        (
            {"ssl_certfile": "one.pem", "ssl_keyfile": "locked.key", "ssl_keyfile_password": "x" * 2000},
            "password",
        ),
        ({"ssl_certfile": "one.both", "ssl_ca_certs": "missing.ca"}, "missing.ca"),
        ({"ssl_certfile": "one.both", "ssl_ca_certs": "junk"}, "junk"),
        ({"ssl_certfile": "one.both", "ssl_ca_certs": "empty"}, "empty"),
        ({"ssl_certfile": "one.both", "ssl_cert_reqs": "required"}, "ssl_ca_certs"),
        ({"ssl_certfile": "one.both", "ssl_ciphers": "NO-SUCH"}, "NO-SUCH"),
        ({"ssl_keyfile": "one.key"}, "ssl_certfile"),
        ({"ssl_context_factory": "no.such.module:x"}, "no.such.module"),
        ({"ssl_context_factory": "os:no_such"}, "no_such"),
        ({"ssl_context_factory": "os"}, "ssl_context_factory"),
        ({"ssl_context_factory": "os:sep"}, "ssl_context_factory"),
        ({"ssl_context_factory": lambda: None}, "NoneType"),
    ],
)
def test_settings_that_fail_say_so_in_one_line(folder: Path, names: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        build(folder, **names)
    text = str(caught.value)
    assert says in text
    assert "\n" not in text
    assert "None" not in text.replace("NoneType", "")
    assert "secret" not in text


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_key(folder: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes((folder / "one.key").read_bytes())
    key.chmod(0)
    with pytest.raises(SettingsError, match=str(key)):
        build(folder, ssl_certfile="one.pem", ssl_keyfile=str(key))


def test_a_worker_does_not_start_with_a_bad_certificate(folder: Path) -> None:
    with listener() as sock, pytest.raises(SettingsError, match="missing"):
        Worker(hello, Settings.build(ssl_certfile=str(folder / "missing")), [sock])


def test_factory(folder: Path) -> None:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    assert build_context(TlsSettings(ssl_context_factory=lambda: made)) is made
    assert build_context(TlsSettings(ssl_context_factory="ssl:create_default_context")) is not None


# Connections


class Scopes:
    def __init__(self) -> None:
        self.seen: list[Any] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.seen.append(scope)
        await hello(scope, receive, send)


async def get(worker: Worker, context: ssl.SSLContext) -> bytes:
    reader, writer = await tls_client(worker, context)
    try:
        writer.write(GET.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))
        return await reader.read()
    finally:
        writer.close()
        with contextlib.suppress(OSError):  # a server that refused us
            await writer.wait_closed()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_extension(loop: str, folder: Path, authority: trustme.CA, version: ssl.TLSVersion) -> None:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2", "http/1.1"])

    async def main() -> None:
        app = Scopes()
        async with serving(app, ssl_certfile=str(folder / "one.both")) as worker:
            reader, writer = await tls_client(worker, context)
            ours = writer.get_extra_info("ssl_object")
            assert ours.selected_alpn_protocol() == "http/1.1"
            writer.write(GET)
            await reader.readuntil(b"hello")
            scope = app.seen[-1]
            assert scope["scheme"] == "https"
            tls = scope["extensions"]["tls"]
            assert tls["server_cert"] == ssl.DER_cert_to_PEM_cert(ours.getpeercert(binary_form=True))
            assert tls["tls_version"] == {"TLSv1.2": 0x0303, "TLSv1.3": 0x0304}[ours.version()]
            known = {it["name"]: it["id"] & 0xFFFF for it in context.get_ciphers()}
            assert tls["cipher_suite"] == known[ours.cipher()[0]]
            assert (tls["client_cert_chain"], tls["client_cert_name"], tls["client_cert_error"]) == (
                [],
                None,
                None,
            )
            writer.close()
            await writer.wait_closed()
            await eventually(lambda: not worker.connections)

    run(loop, main)


@pytest.mark.parametrize("required", ["required", "optional"])
@pytest.mark.parametrize("shown", [True, False])
def test_client_certificates(
    loop: str, folder: Path, authority: trustme.CA, required: str, shown: bool
) -> None:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    if shown:
        client = authority.issue_cert("me@example.org", common_name='Me, "myself"', organization_name="Org")
        client.configure_cert(context)

    async def main() -> None:
        app = Scopes()
        flat = {"ssl_certfile": "one.both", "ssl_ca_certs": "ca.pem"}
        files = {name: str(folder / value) for name, value in flat.items()}
        async with serving(app, ssl_cert_reqs=required, **files) as worker:
            if not shown and required == "required":
                # With TLS 1.3 the client learns of it when it reads.
                with contextlib.suppress(OSError):
                    assert await get(worker, context) == b""
                assert not [scope for scope in app.seen if scope["type"] == "http"]
                return
            assert (await get(worker, context)).endswith(b"hello")
            tls = app.seen[-1]["extensions"]["tls"]
            if shown:
                assert tls["client_cert_chain"][0].startswith("-----BEGIN CERTIFICATE-----")
                # RFC 4514: the last part first, specials escaped.
                assert tls["client_cert_name"].startswith('CN=Me\\, \\"myself\\",')
                assert "O=Org" in tls["client_cert_name"]
            else:
                assert (tls["client_cert_chain"], tls["client_cert_name"]) == ([], None)

    run(loop, main)


def test_old_versions_and_plain_text_are_refused(loop: str, folder: Path, authority: trustme.CA) -> None:
    async def main() -> None:
        app = Scopes()
        flat = {"ssl_certfile": str(folder / "one.both"), "ssl_min_version": "1.3"}
        async with serving(app, tls_handshake_timeout=0.3, lifespan="off", **flat) as worker:
            old = ssl.create_default_context()
            authority.configure_trust(old)
            old.maximum_version = ssl.TLSVersion.TLSv1_2
            with pytest.raises(OSError):
                await get(worker, old)
            async with await Client.open(worker) as plain:
                await plain.send(GET)
                assert await plain.closes_within(5)
                assert b"HTTP" not in plain.received
            async with await Client.open(worker) as silent:  # the handshake has a deadline
                assert await silent.closes_within(5)
            assert app.seen == []

    run(loop, main)


def test_a_handshake_does_not_outlast_the_drain(loop: str, folder: Path) -> None:
    async def main() -> None:
        flat = {"ssl_certfile": str(folder / "one.both"), "drain_idle_timeout": 0.1}
        async with serving(hello, **flat) as worker, await Client.open(worker) as silent:
            await asyncio.sleep(0.05)
            await asyncio.wait_for(worker.drain(), 5)
            await silent.send(b"\x16")

    run(loop, main)


def test_a_handshake_under_way_is_served_by_the_drain(loop: str, folder: Path, authority: trustme.CA) -> None:
    """Its client's connect() has succeeded: like whoever stands in the accept queue, it gets its answer."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname="localhost")

    async def step(client: Client, action: Any) -> Any:
        while True:
            try:
                return action()
            except ssl.SSLWantReadError:
                await client.send(outgoing.read())
                incoming.write(await client.read())
            finally:
                if data := outgoing.read():
                    await client.send(data)

    async def main() -> None:
        flat = {"ssl_certfile": str(folder / "one.both"), "drain_idle_timeout": 0.5}
        async with serving(hello, **flat) as worker, await Client.open(worker) as client:
            await asyncio.sleep(0.05)
            draining = asyncio.ensure_future(worker.drain())
            await asyncio.sleep(0.2)
            assert not draining.done()
            await step(client, tls.do_handshake)
            tls.write(GET)
            answer = await step(client, lambda: tls.read(10_000))
            assert b"connection: close" in answer
            await asyncio.wait_for(draining, 5)

    run(loop, main)


def test_describe_without_a_client_certificate() -> None:
    class Quiet:
        context = ssl.create_default_context()

        def getpeercert(self, binary_form: bool = False) -> Any:
            return None

        def cipher(self) -> Any:
            return None

        def version(self) -> Any:
            return None

    described = describe_tls(Quiet(), None)  # type: ignore[arg-type]
    assert described == {
        "server_cert": None, "client_cert_chain": [], "client_cert_name": None,
        "client_cert_error": None, "tls_version": None, "cipher_suite": None,
    }  # fmt: skip
