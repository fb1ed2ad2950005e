"""leanserve.worker.access_log: one line per exchange, and its fields for formatters."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from leanserve.asgi.messages import ExchangeRecord
from leanserve.worker.access_log import write_access
from served import Client, run, serving


def record(**facts: Any) -> ExchangeRecord:
    plain: dict[str, Any] = {
        "client": ("192.0.2.1", 5), "method": "GET", "path": "/a%20b", "query": "c=d", "version": "1.1",
        "status": 200, "duration_s": 0.01234, "first_byte_s": 0.001, "received_bytes": 1, "sent_bytes": 2,
    }  # fmt: skip
    return ExchangeRecord(**{**plain, **facts})


def test_line_and_fields(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "leanserve.access"):
        write_access(record())
        write_access(record(client=None, query="", status=499, first_byte_s=None, cause="client_gone"))
    first, second = caplog.records
    assert first.getMessage() == '192.0.2.1:5 "GET /a%20b?c=d HTTP/1.1" 200 2 12.3ms'
    assert second.getMessage() == '- "GET /a%20b HTTP/1.1" 499 2 12.3ms client_gone'
    fields = {
        "client": "192.0.2.1:5", "method": "GET", "path": "/a%20b", "query": "c=d", "status": 200,
        "duration_ms": 12.34, "ttfb_ms": 1.0, "request_bytes": 1, "response_bytes": 2, "cause": "",
    }  # fmt: skip
    assert {name: getattr(first, name) for name in fields} == fields
    assert second.ttfb_ms is None  # type: ignore[attr-defined]


def test_nothing_when_nobody_listens(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "leanserve.access"):
        write_access(record())
    assert caplog.records == []


@pytest.mark.parametrize("switched_on", [True, False])
def test_one_line_at_completion(switched_on: bool, caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        if scope["path"] == "/boom":
            raise ValueError
        await send({"type": "http.response.start", "status": 201})
        assert not [
            it for it in caplog.records if it.name == "leanserve.access" and "/last" in it.getMessage()
        ]
        await send({"type": "http.response.body", "body": b"abc"})

    async def main() -> None:
        async with serving(app, access_log=switched_on, lifespan="off") as worker:
            async with await Client.open(worker) as client:
                await client.send(b"GET /boom HTTP/1.1\r\nhost: a\r\n\r\n")
                await client.send(b"GET /last?x HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
                await client.read_all()

    with caplog.at_level(logging.INFO, "leanserve.access"):
        run("asyncio", main)
    lines = [it.getMessage() for it in caplog.records if it.name == "leanserve.access"]
    if not switched_on:
        assert lines == []
        return
    assert len(lines) == 2
    assert '"GET /boom HTTP/1.1" 500 21 ' in lines[0]
    assert lines[0].endswith("app_error")
    assert '"GET /last?x HTTP/1.1" 201 3 ' in lines[1]


def test_a_quote_in_the_target_cannot_end_the_quoted_part(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "leanserve.access"):
        write_access(record(path='/a"', query='" 200 0'))
    assert caplog.records[0].getMessage().count('"') == 2
