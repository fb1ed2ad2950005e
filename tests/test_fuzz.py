"""The fuzzer, for a few seconds; and that it finds what it is for: recognisers broken on purpose."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest

from fuzz import Kind, fuzz, less
from fuzz.__main__ import KINDS, main
from fuzz.frames import Frames
from fuzz.http import Heads, Responses, Streams
from leanserve.protocol.events import Headers, Request
from leanserve.protocol.fastframes import FrameRecogniser, PartFrame
from leanserve.protocol.fastpath import PlainHead, Recogniser, ResponseEncoder
from leanserve.settings import HttpSettings

COUNTS = {"heads": 16_000, "streams": 3_000, "responses": 16_000, "frames": 5_000}


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.name)
def test_there_is_no_difference(make: type[Kind[Any]]) -> None:
    kind, count = make(), COUNTS[make.name]
    done, finding = fuzz(kind, seed=20261121, count=count)
    assert finding is None, str(finding)
    assert done == count
    # A fuzzer whose cases all go one way proves nothing.
    assert min(kind.recognised, kind.declined, kind.refused) > count // 6


# Recognisers with one mistake each


class ForgetsRepeatedLength(Recogniser):
    def recognise_request(self, head: bytes) -> Request | None:
        lines = head.split(b"\r\n")
        lengths = [line for line in lines if line.lower().startswith(b"content-length:")]
        return super().recognise_request(b"\r\n".join(line for line in lines if line not in lengths[1:]))


class ForgetsLimits(Recogniser):
    def __init__(self, settings: HttpSettings) -> None:
        super().__init__(replace(settings, header_count=settings.header_count + 1))


class HandsOutItsTable(Recogniser):
    def recognise_request(self, head: bytes) -> Request | None:
        request = super().recognise_request(head)
        if request is not None and (block := self._blocks.get(head.partition(b"\r\n")[2])):
            request.headers = block[0]
        return request


class Raises(Recogniser):
    def recognise_request(self, head: bytes) -> Request | None:
        head.decode("ascii")
        return super().recognise_request(head)


class GivesBytearray(Recogniser):
    def recognise_request(self, head: bytes) -> Request | None:
        request = super().recognise_request(head)
        if request is not None:
            request.query = cast(bytes, bytearray(request.query))
        return request


class TakesChunked(Recogniser):
    def recognise_request(self, head: bytes) -> Request | None:
        return super().recognise_request(head.replace(b"\r\nTransfer-Encoding: chunked", b""))


class LetsConnectionThrough(ResponseEncoder):
    def __init__(self, names: list[bytes]) -> None:
        super().__init__(names)
        self._ours -= {b"connection"}


class ForgetsLength(ResponseEncoder):
    def check(self, headers: object) -> PlainHead | None:
        plain = super().check(headers)
        return None if plain is None else (plain[0], -1, plain[2])


class ForgetsHeaders(ResponseEncoder):
    def check(self, headers: object) -> PlainHead | None:
        plain = super().check(headers)
        if plain is None:
            return None
        kept: Headers = [item for item in plain[2] if item[0] != b"content-length"]
        return plain[0], plain[1], kept


Found = tuple[str | bytes | PartFrame | None, int] | None


class TakesLongMessages(FrameRecogniser):
    def recognise_frame(self, data: bytes | bytearray, at: int, max_size_bytes: int) -> Found:
        return super().recognise_frame(data, at, max_size_bytes + 1)


class IgnoresReservedBits(FrameRecogniser):
    def recognise_frame(self, data: bytes | bytearray, at: int, max_size_bytes: int) -> Found:
        changed = data[:at] + bytes((data[at] & 0x8F,)) + data[at + 1 :]
        return super().recognise_frame(changed, at, max_size_bytes)


class GivesBytearrays(FrameRecogniser):
    def recognise_frame(self, data: bytes | bytearray, at: int, max_size_bytes: int) -> Any:
        found = super().recognise_frame(data, at, max_size_bytes)
        return (bytearray(found[0]), found[1]) if found and type(found[0]) is bytes else found


class TakesAnyText(FrameRecogniser):
    def recognise_frame(self, data: bytes | bytearray, at: int, max_size_bytes: int) -> Found:
        found = super().recognise_frame(data, at, max_size_bytes)
        if found is not None or data[at] != 0x81:
            return found
        found = super().recognise_frame(data[:at] + b"\x82" + data[at + 1 :], at, max_size_bytes)
        return (found[0].decode(errors="replace"), found[1]) if found and type(found[0]) is bytes else None


@pytest.mark.parametrize(
    "kind",
    [
        *(Heads(it) for it in (ForgetsRepeatedLength, ForgetsLimits, TakesChunked)),
        *(Heads(it) for it in (HandsOutItsTable, Raises, GivesBytearray)),
        *(Streams(it) for it in (ForgetsRepeatedLength, TakesChunked)),
        *(Responses(it) for it in (LetsConnectionThrough, ForgetsLength, ForgetsHeaders)),
        *(Frames(it) for it in (TakesLongMessages, IgnoresReservedBits, TakesAnyText, GivesBytearrays)),
    ],
    ids=lambda kind: f"{kind.name}-{kind.subject.__name__}",
)
def test_a_mistake_is_found(kind: Kind[Any]) -> None:
    _, finding = fuzz(kind, seed=1, count=COUNTS[kind.name])
    assert finding is not None
    # The number says all: the same case once more, by itself.
    assert fuzz(kind.anew(), seed=1, first=finding.number, count=1)[1] == finding
    assert f"{kind.name}: seed 1, case {finding.number}\n" in str(finding)


def test_what_is_found_is_made_small() -> None:
    _, finding = fuzz(Heads(ForgetsRepeatedLength), seed=1, count=COUNTS["heads"])
    assert finding is not None
    head = finding.least.heads[0].lower()
    assert head.count(b"\r\n") == 3
    assert head.count(b"\r\ncontent-length:") == 2
    assert len(head) < 75
    assert finding.least_results[1] is None
    assert repr(finding.least) in str(finding)


def test_less() -> None:
    assert list(less(b"abc")) == [b"c", b"ab", b"bc", b"ac", b"ab"]
    assert list(less(b"abcd")) == [b"cd", b"ab", b"bcd", b"acd", b"abd", b"abc"]
    assert list(less(b"a")) == [b""]
    assert list(less(b"")) == []


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--heads", "50", "--frames", "20", "--seed", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:-1]] == [["heads", "50"], ["frames", "20"]]
    assert lines[-1] == "no difference"
    assert main(["--heads", "1000000000", "--seconds", "0"]) == 0
    assert "no difference" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["--seed", "1"])


def test_the_command_tells_a_difference(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(Heads):
        def __init__(self, recogniser: type[Recogniser] = ForgetsRepeatedLength) -> None:
            super().__init__(recogniser)

    monkeypatch.setattr("fuzz.__main__.KINDS", [Broken])
    assert main(["--heads", "16000"]) == 1
    assert "least: Head(" in capsys.readouterr().out
