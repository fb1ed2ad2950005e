"""The request corpus: one file is one stream of bytes and its verdict (format: tests/corpus/README.md)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
VERDICTS = ("accept", "refuse", "wait")
_KEYS = ("verdict", "why", "source", "request", "begins", "after", "layer")
_REPEAT = re.compile(r"\{\{(.*?) \* (\d+)\}\}", re.DOTALL)
_ESCAPE = re.compile(r"\\(?:x([0-9a-f]{2})|(.))")
_SHORT = {"r": b"\r", "n": b"\n", "t": b"\t", "\\": b"\\"}


@dataclass(frozen=True, slots=True)
class Expected:
    """One request as the application must see it."""

    method: bytes
    target: bytes
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Case:
    """One corpus file.

    Attributes:
        verdict: accept (every request is answered), refuse (answered with an error, then closed) or
            wait (nothing wrong so far, more bytes needed).
        statuses: what a refusal may answer with; empty unless refused.
        requests: the requests that reach the application complete, in order.
        begins: a request whose head is good and whose body is refused or not all there.
        after: whether the connection stays usable ("keep") or not ("close"). Never "keep" after a refusal.
        layer: "http", or "websocket" for what only the handshake check can see.
    """

    name: str
    raw: bytes
    verdict: str
    statuses: tuple[int, ...]
    requests: tuple[Expected, ...]
    begins: Expected | None
    after: str
    layer: str
    why: str
    source: str


def unescape(text: str) -> bytes:
    r"""Bytes of printable text with \r \n \t \\ \xNN and {{TEXT * COUNT}}; line ends of the file are nothing.

    Raises:
        ValueError: an unknown escape, or a character that is not printable ASCII.
    """
    for char in text:
        if char != "\n" and not " " <= char <= "~":
            raise ValueError(f"write {char!r} as an escape")
    flat = _expand(text.replace("\n", ""))
    out, position = bytearray(), 0
    for found in _ESCAPE.finditer(flat):
        out += flat[position : found.start()].encode("ascii")
        if found[1]:
            out.append(int(found[1], 16))
        elif found[2] in _SHORT:
            out += _SHORT[found[2]]
        else:
            raise ValueError(f"unknown escape {found[0]!r}")
        position = found.end()
    out += flat[position:].encode("ascii")
    return bytes(out)


def _expand(text: str) -> str:
    return _REPEAT.sub(lambda found: found[1] * int(found[2]), text)


def _expected(text: str) -> Expected:
    method, target, body = [*_expand(text).split(" ", 2), ""][:3]
    return Expected(unescape(method), unescape(target), unescape(body))


def _facts(head: str) -> dict[str, list[str]]:
    facts: dict[str, list[str]] = {key: [] for key in _KEYS}
    for line in head.splitlines():
        key, colon, value = line.partition(": ")
        if not colon or key not in facts:
            raise ValueError(f"unknown line {line!r}")
        facts[key].append(value)
    return facts


def parse(name: str, text: str) -> Case:
    """One file's text as a Case. Raises ValueError when the file is not of the format."""
    head, rule, raw = text.partition("\n---\n")
    if not rule:
        raise ValueError("no line of three hyphens")
    facts = _facts(head)
    (verdict, *statuses) = facts["verdict"][0].split()
    if verdict not in VERDICTS or (verdict == "refuse") != bool(statuses):
        raise ValueError(f"verdict {facts['verdict'][0]!r}")
    if not facts["why"]:
        raise ValueError("no why")
    return Case(
        name=name,
        raw=unescape(raw),
        verdict=verdict,
        statuses=tuple(int(status) for status in statuses),
        requests=tuple(_expected(line) for line in facts["request"]),
        begins=_expected(facts["begins"][0]) if facts["begins"] else None,
        after=(facts["after"] or ["close" if verdict == "refuse" else "keep"])[0],
        layer=(facts["layer"] or ["http"])[0],
        why=" ".join(facts["why"]),
        source=", ".join(facts["source"]),
    )


def load() -> list[Case]:
    """Every case, sorted by name. Raises ValueError, naming the file, for one that is not of the format."""
    cases = []
    for path in sorted(CORPUS.rglob("*.req")):
        name = path.relative_to(CORPUS).with_suffix("").as_posix()
        try:
            cases.append(parse(name, path.read_text("ascii")))
        except (ValueError, UnicodeDecodeError) as error:
            raise ValueError(f"{name}.req: {error}") from error
    return cases
