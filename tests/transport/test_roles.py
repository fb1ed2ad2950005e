"""leanserve.transport.roles: whoever stands around a connection has all that it calls."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import pytest

from fakes import FakeService
from leanserve.asgi.http import HttpExchange
from leanserve.asgi.websocket import WebSocketExchange
from leanserve.settings import Settings
from leanserve.transport.roles import Exchange, Service, Tunnel
from leanserve.worker.worker import Worker
from served import hello, listener, serving


def members(role: type[Any]) -> dict[str, Any]:
    """What a role names: methods, properties and annotated attributes."""
    found = {name: it for name, it in vars(role).items() if not name.startswith("_")}
    return {**found, **dict.fromkeys(inspect.get_annotations(role))}


@pytest.mark.parametrize(
    ("role", "kind"), [(Exchange, HttpExchange), (Exchange, WebSocketExchange), (Tunnel, WebSocketExchange)]
)
def test_exchanges_and_tunnels(role: type[Any], kind: type[Any]) -> None:
    for name, wanted in members(role).items():
        there = getattr(kind, name)
        assert inspect.signature(there).parameters.keys() == inspect.signature(wanted).parameters.keys(), name


def test_services() -> None:
    async def main() -> None:
        async with serving(hello) as worker:
            for name in members(Service):
                assert hasattr(worker, name), name

    asyncio.run(main())
    fake = FakeService(hello)
    assert [name for name in members(Service) if not hasattr(fake, name)] == []
    fake.loop.close()
    with listener() as sock:
        assert not Worker(hello, Settings(), [sock]).draining
