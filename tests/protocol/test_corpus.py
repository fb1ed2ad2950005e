"""Every corpus file through the codec: whole, byte by byte, and cut in two wherever it can be cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain

import pytest

import corpus_reader
from corpus_reader import Case, Expected
from leanserve.errors import RemoteProtocolError
from leanserve.protocol.events import Data, EndOfBody, Request, Upgrade
from leanserve.protocol.fastpath import Recogniser
from leanserve.protocol.http1 import Http1Codec
from leanserve.settings import HttpSettings

CASES = corpus_reader.load()
SENTINEL = b"GET /sentinel HTTP/1.1\r\nhost: a.example\r\n\r\n"

# Files longer than this are cut around their ends, and at some positions in between.
_LONG = 600
_CUTS_BETWEEN = 20


@dataclass
class Outcome:
    requests: list[Expected] = field(default_factory=list)
    begun: Expected | None = None
    status: int | None = None
    after: str = "keep"


def _seen(request: Request, body: bytes) -> Expected:
    target = request.raw_path + (b"?" + request.query if request.query else b"")
    return Expected(request.method, target, body)


def read(pieces: Iterable[bytes], recogniser: Recogniser | None) -> Outcome:
    """What a connection would do with the pieces, were every request answered at its end."""
    codec, outcome = Http1Codec(HttpSettings(), recogniser), Outcome()
    for piece in pieces:
        codec.receive(piece)
        try:
            _drain(codec, outcome)
        except RemoteProtocolError as error:
            outcome.status, outcome.after = error.status, "close"
        if outcome.after == "close":
            break
    return outcome


def _drain(codec: Http1Codec, outcome: Outcome) -> None:
    while (event := codec.next_event()) is not None:
        if isinstance(event, Request):
            outcome.begun = _seen(event, b"")
        assert outcome.begun is not None
        if isinstance(event, Data):
            outcome.begun = Expected(
                outcome.begun.method, outcome.begun.target, outcome.begun.body + event.data
            )
        if codec.request_ended:
            assert isinstance(event, EndOfBody) or not event.body
            assert codec.request is not None
            outcome.requests.append(outcome.begun)
            outcome.begun = None
            if not codec.request.keep_alive or codec.request.upgrade is not Upgrade.NONE:
                outcome.after = "close"
                return
            codec.next_exchange()


def check(case: Case, outcome: Outcome, how: str) -> None:
    """The verdict of the file and nothing else has happened."""
    where = f"{case.name} {how}: {case.why}"
    assert outcome.requests == list(case.requests), where
    if case.verdict == "refuse":
        assert outcome.status in case.statuses, where
    else:
        assert outcome.status is None, where
        assert outcome.after == case.after, where
    if case.begins is None:
        assert outcome.begun is None, where
    elif outcome.begun is None:
        raise AssertionError(f"{where}: the head was not seen")
    else:
        begun, begins = outcome.begun, case.begins
        assert (begun.method, begun.target) == (begins.method, begins.target), where
        # A refused piece may take good bytes of its own read along; an unfinished body may lose none.
        assert begins.body.startswith(begun.body), where
        assert case.verdict == "refuse" or begun.body == begins.body, where


def cuts(size: int) -> Iterator[int]:
    if size <= _LONG:
        return iter(range(1, size))
    return chain(range(1, 64), range(64, size - 64, size // _CUTS_BETWEEN), range(size - 64, size))


def single_bytes(raw: bytes) -> Iterator[bytes]:
    """Byte by byte; of a long file the middle goes in larger pieces, which no rule can tell apart."""
    middle = range(4096, len(raw) - 4096)
    at = 0
    while at < len(raw):
        step = 1021 if at in middle and at + 1021 in middle else 1
        yield raw[at : at + step]
        at += step


def in_layer(layer: str) -> list[pytest.param]:
    return [pytest.param(case, id=case.name) for case in CASES if case.layer == layer]


@pytest.fixture(params=["recognised", "strict"])
def recogniser(request: pytest.FixtureRequest) -> Recogniser | None:
    """Both ways: with the recogniser in front of h11, and without."""
    return Recogniser(HttpSettings()) if request.param == "recognised" else None


@pytest.mark.parametrize("case", in_layer("http"))
def test_whole(case: Case, recogniser: Recogniser | None) -> None:
    check(case, read([case.raw], recogniser), "whole")


@pytest.mark.parametrize("case", in_layer("http"))
def test_byte_by_byte(case: Case, recogniser: Recogniser | None) -> None:
    check(case, read(single_bytes(case.raw), recogniser), "byte by byte")


@pytest.mark.parametrize("case", in_layer("http"))
def test_every_cut(case: Case, recogniser: Recogniser | None) -> None:
    for at in cuts(len(case.raw)):
        check(case, read([case.raw[:at], case.raw[at:]], recogniser), f"cut at {at}")


@pytest.mark.parametrize("case", in_layer("http"))
def test_a_request_behind(case: Case, recogniser: Recogniser | None) -> None:
    if case.verdict == "wait":
        return  # what stands behind an unfinished request is a part of it
    outcome = read([case.raw + SENTINEL], recogniser)
    sentinel = Expected(b"GET", b"/sentinel")
    answered = outcome.requests[len(case.requests) :]
    if case.verdict == "accept" and case.after == "keep":
        assert answered == [sentinel]
    else:
        assert sentinel not in outcome.requests


@pytest.mark.parametrize("case", in_layer("websocket"))
def test_handshakes_are_requests_to_this_layer(case: Case) -> None:
    head, _, body = case.raw.partition(b"\r\n\r\n")
    codec = Http1Codec(HttpSettings())
    codec.receive(head + b"\r\n\r\n")
    request = codec.next_event()
    assert isinstance(request, Request)
    assert request.upgrade is Upgrade.WEBSOCKET
    assert bool(body) is (request.content_length != 0)


def test_the_corpus_is_all_there() -> None:
    verdicts = [case.verdict for case in CASES]
    assert verdicts.count("refuse") >= 150
    assert verdicts.count("accept") >= 80
    assert verdicts.count("wait") >= 5
