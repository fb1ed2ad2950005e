"""leanserve.transport.sendfile: real files over real sockets, plain and TLS, to quick and slow readers."""

from __future__ import annotations

import asyncio
import hashlib
import os
import ssl
from pathlib import Path
from typing import Any

import pytest
import trustme

from leanserve.errors import AppProtocolError, ClientDisconnected
from served import Client, eventually, run, serving, tls_client
from wire import parse

BIG = 20_000_000


@pytest.fixture(params=["asyncio", "uvloop"])
def loop(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    block = os.urandom(1_000_000)
    (folder / "big").write_bytes(block * (BIG // len(block)))
    (folder / "small").write_bytes(b"a small file")
    (folder / "empty").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


class Files:
    """Answers with the file that the path names."""

    def __init__(self, folder: Path, *headers: tuple[bytes, bytes], status: int = 200) -> None:
        self.folder = folder
        self.headers = headers
        self.status = status
        self.errors: list[Exception] = []
        self.done = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            raise NotImplementedError
        if scope["path"] == "/filler":
            await send({"type": "http.response.start", "status": 200})
            await send({"type": "http.response.body", "body": b"y" * 10_000_000})
            return
        await send({"type": "http.response.start", "status": self.status, "headers": self.headers})
        try:
            path = str(self.folder / scope["path"].strip("/"))
            await send({"type": "http.response.pathsend", "path": path})
        except (OSError, AppProtocolError) as error:
            self.errors.append(error)
            raise
        finally:
            self.done += 1


def get(name: str, *, method: str = "GET", version: str = "1.1", close: bool = False) -> bytes:
    extra = "connection: close\r\n" if close else ""
    return f"{method} /{name} HTTP/{version}\r\nhost: a\r\n{extra}\r\n".encode()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_files_in_a_row(loop: str, files: Path) -> None:
    async def main() -> None:
        app = Files(files)
        async with serving(app) as worker, await Client.open(worker) as client:
            await client.send(
                get("small")
                + get("empty")
                + get("small", method="HEAD")
                + get("big")
                + get("small", close=True)
            )
            found = await client.read_all(b"GET", b"GET", b"HEAD", b"GET", b"GET")
            assert [response.get(b"content-length") for response in found] == [
                b"12", b"0", b"12", b"%d" % BIG, b"12",
            ]  # fmt: skip
            assert all(response.complete for response in found)
            assert found[0].body == found[4].body == b"a small file"
            assert digest(found[3].body) == digest((files / "big").read_bytes())
            assert app.errors == []

    run(loop, main)


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_slow_reader(loop: str, files: Path, version: str) -> None:
    async def main() -> None:
        app = Files(files)
        async with serving(app) as worker, await Client.open(worker, receive_buffer=65536) as client:
            await client.send(get("big", version=version, close=True))
            for _ in range(20):
                await client.read(50_000)
                await asyncio.sleep(0.005)
            (response,) = await client.read_all()
            assert response.complete
            assert digest(response.body) == digest((files / "big").read_bytes())
            assert app.errors == []

    run(loop, main)


def test_others_are_served_meanwhile(loop: str, files: Path) -> None:
    async def main() -> None:
        async with serving(Files(files)) as worker:
            async with await Client.open(worker) as stalled, await Client.open(worker) as other:
                await stalled.send(get("big"))
                await stalled.read(1000)
                await other.send(get("small"))
                assert (await other.read_one()).body == b"a small file"

    run(loop, main)


def test_over_tls(loop: str, files: Path, authority: trustme.CA, tmp_path: Path) -> None:
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(tmp_path / "cert.pem")
    context = ssl.create_default_context()
    authority.configure_trust(context)

    async def main() -> None:
        app = Files(files)
        async with serving(app, ssl_certfile=str(tmp_path / "cert.pem")) as worker:
            reader, writer = await tls_client(worker, context)
            writer.write(get("small") + get("big", close=True))
            await reader.read(1000)
            await asyncio.sleep(0.2)
            data = await reader.read(-1)
            assert digest(data[-BIG:]) == digest((files / "big").read_bytes())
            writer.close()
            await writer.wait_closed()
            assert app.errors == []

    run(loop, main)


@pytest.mark.parametrize("before", [b"", get("filler")])
def test_a_client_that_leaves(loop: str, files: Path, before: bytes) -> None:
    """Behind another answer that it has not read, the file is not even asked for."""

    async def main() -> None:
        app = Files(files)
        async with serving(app, cancel_on_disconnect=False) as worker:
            client = await Client.open(worker, receive_buffer=4096)
            await client.send(before + get("big"))
            await client.read(1000)
            await eventually(lambda: worker.running or before)
            await asyncio.sleep(0.1)
            client.reset()
            await eventually(lambda: not worker.connections and not worker.running)
            assert [type(error) for error in app.errors] == ([] if before else [ClientDisconnected])

    run(loop, main)


def test_a_client_that_sends_fin_within_its_body_and_reads_nothing(loop: str, files: Path) -> None:
    """The connection is lost while the file waits for a socket that will not become writable."""

    async def main() -> None:
        app = Files(files)
        async with serving(app, linger_timeout=0.2, cancel_on_disconnect=False) as worker:
            async with await Client.open(worker, receive_buffer=4096) as client:
                head = b"POST /big HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\nhe"
                await client.send(head)
                await client.read(1000)
                await asyncio.sleep(0.1)
                client.shut()
                await eventually(lambda: app.done)
                assert [type(error) for error in app.errors] == [ClientDisconnected]

    run(loop, main)


def test_cancelled(loop: str, files: Path) -> None:
    async def main() -> None:
        app = Files(files)
        async with serving(app, drain_timeout=0.1) as worker:
            async with await Client.open(worker, receive_buffer=4096) as client:
                await client.send(get("big"))
                await client.read(1000)
                await worker.drain()
                assert app.done == 1

    before = len(os.listdir("/proc/self/fd"))
    run(loop, main)
    assert len(os.listdir("/proc/self/fd")) <= before


def test_bytes_of_before_go_first(loop: str, files: Path) -> None:
    async def main() -> None:
        async with serving(Files(files)) as worker, await Client.open(worker, receive_buffer=4096) as client:
            await client.send(get("filler") + get("small", close=True))
            await asyncio.sleep(0.1)
            first, second = await client.read_all()
            assert first.body == b"y" * 10_000_000
            assert second.body == b"a small file"

    run(loop, main)


@pytest.mark.parametrize(("length", "complete"), [(b"5", True), (b"20", False)])
def test_a_length_that_is_not_the_files(loop: str, files: Path, length: bytes, complete: bool) -> None:
    async def main() -> None:
        app = Files(files, (b"content-length", length))
        async with serving(app, linger_timeout=0.1) as worker, await Client.open(worker) as client:
            await client.send(get("small"))
            (response,) = await client.read_all()
            assert response.body == b"a small file"[: int(length)]
            assert response.complete is complete
            assert [type(error) for error in app.errors] == [AppProtocolError]

    run(loop, main)


def test_a_file_that_becomes_shorter(loop: str, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(b"x" * BIG)

    async def main() -> None:
        app = Files(tmp_path)
        async with serving(app, linger_timeout=0.1) as worker:
            async with await Client.open(worker, receive_buffer=4096) as client:
                await client.send(get("big"))
                await client.read(1000)
                os.truncate(tmp_path / "big", 1000)
                (response,) = await client.read_all()
                assert not response.complete
                (error,) = app.errors
                assert not isinstance(error, ClientDisconnected)
                assert "early" in str(error)

    run(loop, main)


def test_statuses_without_content(loop: str, files: Path) -> None:
    async def main() -> None:
        async with serving(Files(files, status=304)) as worker, await Client.open(worker) as client:
            await client.send(get("small") + get("small", close=True))
            data = b""
            while piece := await client.read():
                data += piece
            found = parse(data, [b"GET", b"GET"])
            assert [response.status for response in found] == [304, 304]
            assert b"small file" not in data

    run(loop, main)
