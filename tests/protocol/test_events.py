"""leanserve.protocol.events: plain values, with the defaults of a request without a body."""

from __future__ import annotations

from leanserve.protocol.events import BodyKind, Data, EndOfBody, Request, Upgrade


def test_defaults_are_those_of_a_plain_get() -> None:
    request = Request(b"GET", b"/", b"", "1.1", [])
    assert request.keep_alive
    assert request.body is BodyKind.NONE
    assert request.content_length == 0
    assert not request.expects_continue
    assert not request.accepts_trailers
    assert request.upgrade is Upgrade.NONE


def test_events_are_compared_by_value() -> None:
    assert Data(b"a") == Data(b"a") != Data(b"b")
    assert EndOfBody() == EndOfBody()
    assert Request(b"GET", b"/", b"", "1.1", []) == Request(b"GET", b"/", b"", "1.1", [])
    assert repr(Data(b"a")) == "Data(data=b'a')"
