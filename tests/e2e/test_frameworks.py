"""Other frameworks, unmodified: FastAPI is in test_clients.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import real_clients
from harness import Serving


@pytest.mark.parametrize(
    ("module", "clients"),
    [
        ("starlette_app", ["httpx", "websockets"]),
        ("litestar_app", ["httpx", "websockets"]),
        ("django_app", ["httpx", "aiohttp"]),
        ("flask_app", ["httpx", "curl"]),
    ],
)
def test_framework(serve: Callable[..., Serving], module: str, clients: list[str]) -> None:
    server = serve(f"{module}:app")
    for client in clients:
        {**real_clients.HTTP, **real_clients.WEBSOCKET}[client](server)
