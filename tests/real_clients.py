"""The same three calls (predict, stream, WebSocket) through clients that people use."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest
from websockets.asyncio.client import connect, unix_connect

from harness import Serving

QUESTION = {"x": [1, 2, 3]}
ANSWER = {"y": 12}
TOKENS = ["0", "1", "2", "3", "4"]

_ROOT = Path(__file__).parents[1]
#: Where tests/run.py puts what the npm registry has.
NODE_MODULES = _ROOT / ".dev" / "node_modules"


def _context(server: Serving) -> ssl.SSLContext | None:
    return server.certificates.client_context() if server.certificates else None


def _tokens(text: str) -> list[str]:
    return [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]


def with_curl(server: Serving) -> None:
    """curl, one process per call."""
    command = ["curl", "--silent", "--show-error", "--fail", "--noproxy", "*", "--max-time", "10"]
    if server.uds is not None:
        command += ["--unix-socket", str(server.uds)]
    if server.certificates is not None:
        command += ["--cacert", str(server.certificates.authority)]

    def run(*arguments: str) -> str:
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=20, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    body = json.dumps(QUESTION)
    said = run("-H", "content-type: application/json", "-d", body, f"{server.base_url}/predict")
    assert json.loads(said) == ANSWER
    assert _tokens(run("--no-buffer", f"{server.base_url}/stream")) == TOKENS


def with_httpx(server: Serving) -> None:
    """httpx, one kept-alive connection."""
    transport = httpx.HTTPTransport(
        uds=str(server.uds) if server.uds else None, verify=_context(server) or False, trust_env=False
    )
    with httpx.Client(transport=transport, base_url=server.base_url, timeout=10, trust_env=False) as client:
        assert client.post("/predict", json=QUESTION).raise_for_status().json() == ANSWER
        with client.stream("GET", "/stream") as response:
            assert [line[6:] for line in response.iter_lines() if line] == TOKENS
        assert client.post("/predict", json=QUESTION).json() == ANSWER


def with_aiohttp(server: Serving) -> None:
    """aiohttp: REST, stream and WebSocket at the same time."""
    asyncio.run(_aiohttp(server))


async def _aiohttp(server: Serving) -> None:
    tls = _context(server) or True
    connector: aiohttp.BaseConnector = (
        aiohttp.UnixConnector(str(server.uds)) if server.uds else aiohttp.TCPConnector(ssl=tls)
    )
    timeout = aiohttp.ClientTimeout(total=10)
    async with aiohttp.ClientSession(server.base_url, connector=connector, timeout=timeout) as session:

        async def predict() -> Any:
            async with session.post("/predict", json=QUESTION) as response:
                return await response.json()

        async def stream() -> list[str]:
            async with session.get("/stream") as response:
                return _tokens(await response.text())

        answers = await asyncio.gather(predict(), stream(), predict(), stream())
    assert answers == [ANSWER, TOKENS, ANSWER, TOKENS]


def with_websockets(server: Serving) -> None:
    """The websockets library, a few messages on one connection, closed by the client."""
    # Not its threaded client: that reads and writes one SSL object from two threads at the same time, which
    # Python 3.11 does not allow for, and about one handshake in a thousand is lost on the client's side.
    asyncio.run(_websockets(server))


async def _websockets(server: Serving) -> None:
    url = server.base_url.replace("http", "ws", 1) + "/ws"
    facts: dict[str, Any] = {"open_timeout": 10, "close_timeout": 10, "ssl": _context(server)}
    if server.uds is not None:
        opened = unix_connect(str(server.uds), uri=url, **facts)
    else:
        opened = connect(url, proxy=None, **facts)
    async with opened as socket:
        for _ in range(3):
            await socket.send(json.dumps(QUESTION))
            assert json.loads(await asyncio.wait_for(socket.recv(), 10)) == ANSWER
    assert socket.protocol.close_code == 1000


def with_node(server: Serving) -> None:
    """The npm client `ws`."""
    node = shutil.which("node")
    if node is None or not (NODE_MODULES / "ws").is_dir():
        pytest.skip("node or its ws package is missing: install node and start the tests with tests/run.py")
    url = server.base_url.replace("http", "ws", 1) + "/ws"
    if server.uds is not None:
        url = f"ws+unix:{server.uds}:/ws"
    script = Path(__file__).parent / "e2e" / "clients" / "ws_client.cjs"
    arguments = [url, str(server.certificates.authority)] if server.certificates else [url]
    done = subprocess.run(
        [node, str(script), *arguments], capture_output=True, text=True, timeout=20, check=False,
        env={**os.environ, "NODE_PATH": str(NODE_MODULES)},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"answer": ANSWER, "code": 1000}


#: Clients of the HTTP endpoints, and of the WebSocket.
HTTP: dict[str, Callable[[Serving], None]] = {
    "curl": with_curl, "httpx": with_httpx, "aiohttp": with_aiohttp,
}
WEBSOCKET: dict[str, Callable[[Serving], None]] = {"websockets": with_websockets, "node-ws": with_node}
