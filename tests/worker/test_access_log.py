"""leanserve.worker.access_log: one line per exchange, in three forms, and its fields for formatters."""

from __future__ import annotations

import json
import logging
import os
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leanserve.asgi.messages import ExchangeRecord
from leanserve.errors import SettingsError
from leanserve.settings import LogSettings, Settings
from leanserve.worker.access_log import AccessLog
from served import Client, run, serving

# All that gunicorn documents, and all of ours.
LETTERS = "hlutrmUqHsBbfaTDLMp"
FIELDS = (
    "client", "method", "path", "query", "version", "status", "duration_ms", "ttfb_ms", "request_bytes",
    "response_bytes", "worker", "request_id", "traceparent", "cause",
)  # fmt: skip
TRACE = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def record(**facts: Any) -> ExchangeRecord:
    plain: dict[str, Any] = {
        "client": ("192.0.2.1", 5), "method": "GET", "path": "/a%20b", "query": "c=d", "version": "1.1",
        "status": 200, "duration_s": 0.01234, "first_byte_s": 0.001, "received_bytes": 1, "sent_bytes": 2,
    }  # fmt: skip
    return ExchangeRecord(**{**plain, **facts})


def lines_of(caplog: pytest.LogCaptureFixture, *records: ExchangeRecord, **flat: Any) -> list[str]:
    log = AccessLog(Settings.build(**flat).log)
    caplog.clear()
    with caplog.at_level(logging.INFO, "leanserve.access"):
        for one in records:
            log.write(one)
    return [it.getMessage() for it in caplog.records]


def test_text_and_fields(caplog: pytest.LogCaptureFixture) -> None:
    headers = [(b"x-request-id", b"r 1"), (b"traceparent", TRACE)]
    lines = lines_of(
        caplog,
        record(request_headers=headers),
        record(client=None, query="", status=499, first_byte_s=None, received_bytes=0, cause="client_gone"),
        record(first_byte_s=0.01232, received_bytes=0),
    )
    ids = f'id="r 1" traceparent="{TRACE.decode()}"'
    assert lines == [
        f'192.0.2.1:5 "GET /a%20b?c=d HTTP/1.1" 200 2 12.3ms first=1.0ms in=1 {ids}',
        '- "GET /a%20b HTTP/1.1" 499 2 12.3ms client_gone',
        '192.0.2.1:5 "GET /a%20b?c=d HTTP/1.1" 200 2 12.3ms',
    ]
    first, second, _ = caplog.records
    fields = {
        "client": "192.0.2.1:5", "method": "GET", "path": "/a%20b", "query": "c=d", "status": 200,
        "duration_ms": 12.34, "ttfb_ms": 1.0, "request_bytes": 1, "response_bytes": 2, "cause": "",
        "worker": os.getpid(), "request_id": "r 1", "traceparent": TRACE.decode(), "version": "1.1",
    }  # fmt: skip
    assert {name: getattr(first, name) for name in fields} == fields
    assert second.ttfb_ms is None  # type: ignore[attr-defined]
    assert second.request_id is None  # type: ignore[attr-defined]


def test_json(caplog: pytest.LogCaptureFixture) -> None:
    headers = [(b"x-request-id", b"r1"), (b"traceparent", TRACE), (b"x-request-id", b"r2")]
    (line,) = lines_of(
        caplog, record(request_headers=headers, cause="deadline"), access_log_format="json"
    )  # fmt: skip
    found = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", found.pop("time"))
    assert found == {
        "client": "192.0.2.1:5", "method": "GET", "path": "/a%20b", "query": "c=d", "version": "1.1",
        "status": 200, "duration_ms": 12.34, "ttfb_ms": 1.0, "request_bytes": 1, "response_bytes": 2,
        "worker": os.getpid(), "request_id": "r1, r2", "traceparent": TRACE.decode(), "cause": "deadline",
    }  # fmt: skip
    for name, expected in (("TraceParent", TRACE.decode()), (None, None), ("x-other", None)):
        flat = {"log_format": "json", "request_id_header": name}
        (line,) = lines_of(caplog, record(request_headers=headers), **flat)
        assert json.loads(line)["request_id"] == expected


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("%(h)s %(l)s %(u)s", "192.0.2.1 - me"),
        ('"%(r)s" %(m)s %(U)s?%(q)s %(H)s', '"GET /a%20b?c=d HTTP/1.1" GET /a%20b?c=d HTTP/1.1'),
        ("%(s)s %(B)s %(b)s", "200 2 2"),
        ('"%(f)s" "%(a)s"', '"http://r/" "curl\\x22\\x5c"'),
        ("%(T)s %(M)s %(D)s %(L)s", "3 3012 3012345 3.012345"),
        ("%(p)s", f"<{os.getpid()}>"),
        ("100%% %(s)s%%", "100% 200%"),
        ("%({x-forwarded-for}i)s %({Referer}i)s %({nosuch}i)s", "a, b http://r/ -"),
        ("%({Content-Type}o)s %({nosuch}o)s", "text/html -"),
        ("%({LSX_VARIABLE}e)s %({LSX_NONE}e)s", "v\\x0a -"),
        ("%(client)s %(status)s %(ttfb_ms)s %(request_bytes)s %(request_id)s", "192.0.2.1:5 200 1.0 1 -"),
        ("%(traceparent)s %(cause)s", "- app_error"),
    ],
)
def test_atoms(
    form: str, expected: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LSX_VARIABLE", "v\n")
    headers = [
        (b"referer", b"http://r/"), (b"user-agent", b'curl"\\'), (b"x-forwarded-for", b"a"),
        (b"x-forwarded-for", b"b"), (b"authorization", b"Basic bWU6c2VjcmV0"),
    ]  # fmt: skip
    one = record(
        request_headers=headers, response_headers=[(b"content-type", b"text/html")], duration_s=3.0123454,
        cause="app_error",
    )  # fmt: skip
    assert lines_of(caplog, one, access_log_format=form) == [expected]


def test_atoms_without_a_value(caplog: pytest.LogCaptureFixture) -> None:
    nothing = record(client=None, query="", sent_bytes=0, first_byte_s=None)
    (line,) = lines_of(
        caplog, nothing, access_log_format="%(h)s %(u)s %(b)s %(B)s %(f)s %(a)s %(ttfb_ms)s %(q)s %(query)s"
    )
    assert line == "- - - 0 - - -  -"
    (line,) = lines_of(caplog, record(), access_log_format="%(t)s")
    months = "Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec"
    assert re.fullmatch(rf"\[\d\d/(?:{months})/\d{{4}}:\d\d:\d\d:\d\d [+-]\d{{4}}\]", line)


@pytest.mark.parametrize(
    "value", [b"Basic", b"Basic !!", b"Basic bWU=", b"Bearer bWU6c2VjcmV0", b"Basic Og=="]
)
def test_no_user(value: bytes, caplog: pytest.LogCaptureFixture) -> None:
    headers = [(b"authorization", value)]
    assert lines_of(caplog, record(request_headers=headers), access_log_format="%(u)s") == ["-"]


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("plain", "must be text, json or have atoms"),
        ("%(h)s %(z)s", r"'%\(z\)s' is no atom"),
        ("%(h)s %(h)d", r"'%\(h\)d' is no atom"),
        ("%(h)s %", "'%' is no atom"),
        ("%(h)s %s", "'%s' is no atom"),
        ("%(h)s %({a b}i)s", "is no atom"),
        ("%(h)s\n%(s)s", "printable ASCII in one line"),
        ("%(h)s \x1b", "printable ASCII"),
        ("%(h)s ü", "printable ASCII"),
    ],
)
def test_a_wrong_format_is_a_wrong_setting(form: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Settings.build(access_log_format=form)


def test_a_wrong_name_of_the_id_field() -> None:
    with pytest.raises(SettingsError, match="request_id_header must be the name of a header"):
        Settings.build(request_id_header="x request")


def test_nothing_when_nobody_listens(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "leanserve.access"):
        AccessLog(LogSettings()).write(record())
    assert caplog.records == []


# What peers send never leaves its place in the line

_ALL_ATOMS = " ".join(f'"%({name})s"' for name in (*LETTERS, *FIELDS, "{x-any}i", "{x-any}o"))
_TEXT = st.binary(max_size=40).map(lambda data: data.decode("latin-1"))
_NAMES = (b"x-request-id", b"traceparent", b"referer", b"user-agent", b"authorization", b"x-any")
_NASTY = (b"\r\nGET /", b'" 200 0', b"\x1b[2J", b"\x9b2J", b"\\", b"\xff", b"Basic DTph", b"Basic Ilw6")
_HEADERS = st.lists(
    st.tuples(st.sampled_from(_NAMES), st.binary(max_size=40) | st.sampled_from(_NASTY)), max_size=6
)


@settings(max_examples=300, deadline=None)
@given(
    facts=st.fixed_dictionaries(
        {
            "client": st.none() | st.tuples(st.text(max_size=10), st.integers(0, 65535)),
            "method": _TEXT, "path": _TEXT, "query": _TEXT,
            "request_headers": _HEADERS, "response_headers": _HEADERS,
        }
    ),
    form=st.sampled_from(["text", "json", _ALL_ATOMS]),
)  # fmt: skip
def test_no_control_byte_and_no_line_break(facts: dict[str, Any], form: str) -> None:
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda made: seen.append(made.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("leanserve.access")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        AccessLog(Settings.build(access_log_format=form).log).write(record(**facts))
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
    (line,) = seen
    assert re.fullmatch(r"[\x20-\x7e]*", line)
    if form == "json":
        found = json.loads(line)
        assert set(found) == {"time", *FIELDS}
        assert all(re.fullmatch(r"[\x20-\x7e]*", it) for it in found.values() if isinstance(it, str))
    elif form != "text":
        assert len(re.findall(r'"[^"]*"', line)) == len(LETTERS) + len(FIELDS) + 2
        assert line.count('"') == 2 * (len(LETTERS) + len(FIELDS) + 2)
    else:
        assert line.count('"') % 2 == 0


def test_a_long_value_is_cut(caplog: pytest.LogCaptureFixture) -> None:
    headers = [(b"user-agent", b"\xff" * 60_000), (b"x-request-id", b"a" * 1024)]
    (line,) = lines_of(caplog, record(request_headers=headers), access_log_format="%(a)s %(request_id)s")
    assert line == "\\xff" * 1024 + "... " + "a" * 1024


# From a worker


def access_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [it.getMessage() for it in caplog.records if it.name == "leanserve.access"]


async def app(scope: Any, receive: Any, send: Any) -> None:
    headers = [(b"X-Any", b"said")]
    if scope["type"] == "websocket":
        await receive()
        if scope["path"] == "/denied":
            await send({"type": "websocket.http.response.start", "status": 401, "headers": headers})
            await send({"type": "websocket.http.response.body", "body": b"no"})
            return
        await send({"type": "websocket.accept", "headers": headers})
        await send({"type": "websocket.close"})
        return
    if scope["path"] == "/boom":
        raise ValueError
    trailers = scope["path"] == "/trailers"
    await send({"type": "http.response.start", "status": 201, "headers": headers, "trailers": trailers})
    if scope["path"] == "/late":
        raise ValueError
    if scope["path"] == "/pieces":
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
    await send({"type": "http.response.body", "body": b"abc"})
    if trailers:
        await send({"type": "http.response.trailers", "headers": [(b"x-any", b"trailer")]})


def requests(caplog: pytest.LogCaptureFixture, *heads: bytes, **flat: Any) -> list[str]:
    async def main() -> None:
        async with serving(app, lifespan="off", **flat) as worker:
            for head in heads:
                async with await Client.open(worker) as client:
                    await client.send(head)
                    await client.read_all()

    with caplog.at_level(logging.INFO, "leanserve.access"):
        run("asyncio", main)
    return access_lines(caplog)


def get(path: bytes, more: bytes = b"") -> bytes:
    return b"GET " + path + b" HTTP/1.1\r\nhost: a\r\nconnection: close\r\n" + more + b"\r\n"


@pytest.mark.parametrize("fastpath", [True, False])
def test_headers_of_both_sides(fastpath: bool, caplog: pytest.LogCaptureFixture) -> None:
    form = "%(U)s %(s)s %({x-request-id}i)s %({x-any}o)s"
    paths = (b"/plain", b"/pieces", b"/trailers", b"/boom", b"/late")
    heads = [get(path, b"x-request-id: me\r\nte: trailers\r\n") for path in paths]
    upgrade = b"x-request-id: ws\r\nupgrade: websocket\r\n"
    upgrade += b"sec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
    for path in (b"/accepted", b"/denied"):
        heads.append(get(path, upgrade).replace(b"close", b"upgrade"))
    flat = {"access_log": True, "access_log_format": form, "fastpath": fastpath, "ws_close_timeout": 0}
    lines = requests(caplog, *heads, **flat)
    assert lines == [
        "/plain 201 me said", "/pieces 201 me said", "/trailers 201 me said",
        "/boom 500 me -", "/late 500 me -", "/accepted 101 ws said", "/denied 401 ws said",
    ]  # fmt: skip


def test_a_raw_control_sequence_in_a_header(caplog: pytest.LogCaptureFixture) -> None:
    """RFC 9110 section 5.5 lets bytes above 0x7f into a value; 0x9b begins a command for a terminal."""
    (line,) = requests(caplog, get(b"/", b'x-request-id: \x9b2J\t"\xc3\xbc\r\n'), access_log=True)
    assert 'id="\\x9b2J\\x09\\x22\\xc3\\xbc"' in line


@pytest.mark.parametrize("switched_on", [True, False])
def test_one_line_at_completion(switched_on: bool, caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        if scope["path"] == "/boom":
            raise ValueError
        await send({"type": "http.response.start", "status": 201})
        assert not [it for it in access_lines(caplog) if "/last" in it]
        await send({"type": "http.response.body", "body": b"abc"})

    async def main() -> None:
        async with serving(app, access_log=switched_on, lifespan="off") as worker:
            async with await Client.open(worker) as client:
                await client.send(b"GET /boom HTTP/1.1\r\nhost: a\r\n\r\n")
                await client.send(b"GET /last?x HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
                await client.read_all()

    with caplog.at_level(logging.INFO, "leanserve.access"):
        run("asyncio", main)
    lines = access_lines(caplog)
    if not switched_on:
        assert lines == []
        return
    assert len(lines) == 2
    assert '"GET /boom HTTP/1.1" 500 21 ' in lines[0]
    assert lines[0].endswith("app_error")
    assert '"GET /last?x HTTP/1.1" 201 3 ' in lines[1]


@pytest.mark.parametrize(
    ("flat", "expected"),
    [
        ({"log_level": "warning"}, False),
        ({"log_level": "info"}, True),
        ({"log_level": "debug"}, True),
        ({"log_level": "debug", "access_log": False}, False),
        ({"log_level": "warning", "log_config": {"version": 1}}, True),
    ],
)
def test_a_level_above_info_is_quiet(flat: dict[str, Any], expected: bool) -> None:
    async def main() -> None:
        async with serving(app, lifespan="off", **{"access_log": True, **flat}) as worker:
            assert worker.keeps_records is expected

    run("asyncio", main)


def test_a_quote_in_the_target_cannot_end_the_quoted_part(caplog: pytest.LogCaptureFixture) -> None:
    (line,) = lines_of(caplog, record(path='/a"', query='" 200 0'))
    assert line.count('"') == 2
