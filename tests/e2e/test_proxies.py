"""docs/howto/proxies.md: its configurations, in nginx and HAProxy where they are installed."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from docs.documents import blocks, read
from harness import free_port, wait_until
from leanserve import Server

NGINX = """
daemon off; user root; pid {folder}/pid; error_log stderr; events {{}}
http {{ access_log off; {block} }}
"""
HAPROXY = """
global
    maxconn 100
defaults
    timeout connect 5s
    timeout client 20s
    timeout server 20s
{block}
"""
BLOCKS = [block for block in blocks(read("howto/proxies.md")) if block.kind in ("nginx", "haproxy")]


async def who(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        return
    body = json.dumps({name: scope[name] for name in ("client", "scheme")}).encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


@contextmanager
def proxy(kind: str, block: str, upstream: int, folder: Path) -> Iterator[int]:
    """The proxy with this block as its configuration; the port that it listens on."""
    program = shutil.which(kind) or shutil.which(kind, path="/usr/sbin:/usr/local/sbin")
    if program is None:
        pytest.skip(f"{kind} is not installed")
    port = free_port()
    for old, new in (("127.0.0.1:8000", f"127.0.0.1:{upstream}"), (":8080", f"127.0.0.1:{port}")):
        block = block.replace(old, new)
    block = block.replace("listen 8080", f"listen 127.0.0.1:{port}")
    file = folder / "conf"
    file.write_text((NGINX if kind == "nginx" else HAPROXY).format(folder=folder, block=block))
    options = ["-p", str(folder), "-c"] if kind == "nginx" else ["-db", "-f"]
    with subprocess.Popen([program, *options, str(file)], stderr=subprocess.PIPE) as process:
        try:
            wait_until(lambda: process.poll() is not None or answers(port), 15, f"{kind} listens")
            assert process.poll() is None, process.stderr and process.stderr.read()
            yield port
        finally:
            process.terminate()


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def ask(port: int, address: str, *lines: bytes) -> Any:
    """(answer, own port) of a client on `address` of this host."""
    with socket.create_connection(("127.0.0.1", port), 10, source_address=(address, 0)) as sock:
        sock.sendall(b"\r\n".join([b"GET / HTTP/1.1", b"Host: a", b"Connection: close", *lines, b"", b""]))
        answer = b""
        while data := sock.recv(65536):
            answer += data
        body = answer.partition(b"\r\n\r\n")[2]
        return json.loads(body[body.index(b"{") : body.rindex(b"}") + 1]), sock.getsockname()[1]


@pytest.mark.parametrize("block", BLOCKS, ids=[f"{block.kind}-{block.line}" for block in BLOCKS])
def test_the_client_is_seen_through_the_proxy(block: Any, tmp_path: Path) -> None:
    tcp = "send-proxy" in block.text
    settings = {"proxy_protocol": "required"} if tcp else {}
    with (
        Server(who, port=0, log_level="warning", **settings) as server,
        proxy(block.kind, block.text, server.addresses[0][1], tmp_path) as port,
    ):
        # 127.0.0.1 is trusted, 127.0.0.2 is a client like others: what it claims is not believed.
        seen, own = ask(port, "127.0.0.2", b"X-Forwarded-For: 6.6.6.6", b"X-Forwarded-Proto: https")
        assert seen == {"client": ["127.0.0.2", own if tcp else 0], "scheme": "http"}
