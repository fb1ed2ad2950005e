"""leanserve.protocol.responses: header hygiene, and framing decided once."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leanserve.errors import AppProtocolError
from leanserve.protocol.events import Headers, Request
from leanserve.protocol.responses import (
    Framing,
    ResponseHead,
    check_headers,
    check_trailers,
    plan_response,
)

TOKEN = set(b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")


def plan(
    status: int = 200,
    headers: Headers | None = None,
    *,
    method: bytes = b"GET",
    version: str = "1.1",
    keep_alive: bool = True,
    known: int | None = None,
    close: bool = False,
    defaults: Headers | None = None,
) -> ResponseHead:
    request = Request(method, b"/", b"", version, [], keep_alive=keep_alive)
    return plan_response(request, status, headers or [], defaults or [], known_length=known, close=close)


# Hygiene


@given(st.binary(min_size=1, max_size=8))
def test_names_are_tokens(name: bytes) -> None:
    if set(name) <= TOKEN:
        assert check_headers([(name, b"x")]) == [(name.lower(), b"x")]
    else:
        with pytest.raises(AppProtocolError):
            check_headers([(name, b"x")])


@given(st.binary(max_size=12))
def test_values_have_no_control_bytes(value: bytes) -> None:
    if any((byte < 0x20 and byte != 9) or byte == 0x7F for byte in value):
        with pytest.raises(AppProtocolError):
            check_headers([(b"a", value)])
    else:
        assert check_headers([(b"a", value)]) == [(b"a", value.strip(b" \t"))]


@pytest.mark.parametrize(
    "headers",
    [None, 5, [5], [(b"a",)], [(b"a", b"b", b"c")], [("a", b"b")], [(b"a", "b")], [(b"a", None)], ["ab"]],
)
def test_what_is_no_list_of_pairs(headers: Any) -> None:
    with pytest.raises(AppProtocolError):
        check_headers(headers)


def test_any_iterable_and_any_bytes() -> None:
    pairs = ((name, value) for name, value in [(bytearray(b"A"), memoryview(b" b "))])
    assert check_headers(pairs) == [(b"a", b"b")]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", [b"Content-Length", b"transfer-encoding", b"host", b"trailer", b"connection"]
)
def test_trailers_do_not_frame(name: bytes) -> None:
    with pytest.raises(AppProtocolError, match=name.decode().lower()):
        check_trailers([(name, b"1")])
    assert check_trailers([(b"X-Sum", b"1")]) == [(b"x-sum", b"1")]


# Framing


@pytest.mark.parametrize(
    ("case", "framing", "headers", "close"),
    [
        (plan(known=3), Framing.LENGTH, [(b"content-length", b"3")], False),
        (plan(known=0), Framing.LENGTH, [(b"content-length", b"0")], False),
        (plan(), Framing.CHUNKED, [(b"transfer-encoding", b"chunked")], False),
        (plan(version="1.0"), Framing.CLOSE, [(b"connection", b"close")], True),
        # RFC 9112 section 9.3: an old client has to be told that the connection stays
        (
            plan(version="1.0", known=3),
            Framing.LENGTH,
            [(b"content-length", b"3"), (b"connection", b"keep-alive")],
            False,
        ),
        (plan(headers=[(b"content-length", b"07")]), Framing.LENGTH, [(b"content-length", b"7")], False),
        (plan(204, known=0), Framing.NONE, [], False),
        (plan(204, [(b"content-length", b"3")]), Framing.NONE, [], False),
        (plan(205, known=3), Framing.NONE, [(b"content-length", b"0")], False),
        (plan(205, [(b"content-length", b"3")]), Framing.NONE, [(b"content-length", b"0")], False),
        (plan(304, known=0), Framing.NONE, [], False),
        (plan(304, [(b"content-length", b"3")]), Framing.NONE, [(b"content-length", b"3")], False),
        # as a GET would have been framed, as far as that is known (RFC 9110 section 9.3.2)
        (plan(method=b"HEAD", known=0), Framing.NONE, [], False),
        (
            plan(headers=[(b"content-length", b"3")], method=b"HEAD"),
            Framing.NONE,
            [(b"content-length", b"3")],
            False,
        ),
        (plan(205, method=b"HEAD"), Framing.NONE, [(b"content-length", b"0")], False),
    ],
)
def test_framing(case: ResponseHead, framing: Framing, headers: Headers, close: bool) -> None:
    assert (case.framing, case.headers, case.close) == (framing, headers, close)


def test_close_comes_from_everywhere() -> None:
    said = [(b"connection", b"close")]
    for case in (
        plan(known=0, close=True),
        plan(known=0, keep_alive=False),
        plan(known=0, headers=[(b"connection", b"Close")]),
        plan(known=0, headers=[(b"connection", b"keep-alive, close")]),
    ):
        assert case.close
        assert [item for item in case.headers if item[0] == b"connection"] == said
    kept = plan(known=0, headers=[(b"connection", b"keep-alive, upgrade")])
    assert not kept.close
    assert (b"connection", b"upgrade") in kept.headers
    assert (b"connection", b"keep-alive") not in kept.headers


@pytest.mark.parametrize(
    "headers",
    [
        [(b"content-length", b"3"), (b"content-length", b"4")],
        [(b"content-length", b"3, 3")],
        [(b"content-length", b"+3")],
        [(b"content-length", b"")],
        [(b"content-length", "٣".encode())],
        [(b"content-length", b"9" * 20)],
        [(b"content-length", b"9" * 5000)],
        [(b"transfer-encoding", b"gzip")],
        [(b"transfer-encoding", b"gzip, chunked")],
    ],
)
def test_lengths_and_codings_that_are_wrong(headers: Headers) -> None:
    with pytest.raises(AppProtocolError):
        plan(headers=headers)


def test_two_equal_lengths_become_one() -> None:
    twice = [(b"content-length", b"3"), (b"content-length", b"3")]
    assert plan(headers=twice).headers == [(b"content-length", b"3")]


def test_chunked_of_the_application_is_the_servers() -> None:
    chunked = [(b"transfer-encoding", b"Chunked")]
    assert plan(headers=chunked).headers == [(b"transfer-encoding", b"chunked")]
    assert plan(headers=chunked, known=3).headers == [(b"content-length", b"3")]


@pytest.mark.parametrize("status", [0, 100, 101, 199, 1000, -1, "200", None, 200.0])
def test_statuses_that_end_nothing(status: Any) -> None:
    with pytest.raises(AppProtocolError):
        plan(status)


def test_defaults_fill_gaps() -> None:
    defaults = [(b"date", b"now"), (b"server", b"us")]
    case = plan(known=0, headers=[(b"server", b"me")], defaults=defaults)
    assert case.headers == [(b"server", b"me"), (b"date", b"now"), (b"content-length", b"0")]
    assert defaults == [(b"date", b"now"), (b"server", b"us")]


# Lengths kept


@given(st.integers(0, 50), st.lists(st.integers(0, 20), max_size=8))
def test_never_more_and_never_a_fake_end(declared: int, pieces: list[int]) -> None:
    head = plan(headers=[(b"content-length", b"%d" % declared)])
    sent = sum(head.admit(size) for size in pieces)
    assert sent == min(declared, sum(pieces))
    assert head.check_complete() is (sum(pieces) == declared)
    assert (head.fault is None) is (sum(pieces) == declared)
    if sum(pieces) > declared:
        assert head.fault is not None
        assert "longer" in head.fault


def test_other_framings_take_anything() -> None:
    head = plan()
    assert head.admit(10**9) == 10**9
    assert head.check_complete()
