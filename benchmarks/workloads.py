"""What is measured: one table of workloads, each with its client, its servers and what must hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.peers import REFERENCE

UVICORN, _SANSIO = "uvicorn-httptools", "uvicorn-sansio"
_HTTP = (REFERENCE, UVICORN, "uvicorn-h11", "granian", "gunicorn-asgi", "hypercorn")
_FEW = (REFERENCE, UVICORN, "granian", "gunicorn-asgi")
_WEBSOCKET = (REFERENCE, _SANSIO, "uvicorn-wsproto", "granian", "gunicorn-asgi", "hypercorn")
_LARGE_MESSAGES = (REFERENCE, "leanserve-no-numpy", _SANSIO, "uvicorn-wsproto", "granian", "gunicorn-asgi")


@dataclass(frozen=True, slots=True)
class Figure:
    """What a figure is called, its unit, and how many of the raw unit are one of the unit shown.

    The raw units are seconds, bytes and units of work per second.
    """

    title: str
    unit: str
    scale: float = 1.0
    digits: int = 1


@dataclass(frozen=True, slots=True)
class Must:
    """The figure of `subject` divided by that of `peer`: the median has to be on this side of the limit."""

    figure: str
    peer: str
    sign: str
    limit: float
    subject: str = REFERENCE


@dataclass(frozen=True, slots=True)
class Workload:
    """One row of the benchmark.

    Attributes:
        how: the way it is measured, see measure.py: load, transfer, idle or start.
        client: kind of client and its arguments.
        peers: who is measured.
        musts: what is asked; none: the figures are reported only.
        notes: what a reader has to know.
        workers: worker processes.
        app: the application.
        tls: over TLS.
        pinned: whether the server has one CPU and the client another; else all have all.
    """

    title: str
    how: str
    client: tuple[str, dict[str, Any]]
    peers: tuple[str, ...]
    musts: tuple[Must, ...] = ()
    notes: str = ""
    workers: int = 1
    app: str = "benchmarks.app:app"
    tls: bool = False
    pinned: bool = True
    figures: dict[str, Figure] = field(default_factory=dict)


def _figures(unit: str) -> dict[str, Figure]:
    per_second = "MB/s" if unit == "MB" else f"{unit}s per second"
    return {"cpu": Figure(f"server CPU per {unit}", "us", 1e-6), "rate": Figure(per_second, "", 1, 0)}


def _load(title: str, unit: str, client: tuple[str, dict[str, Any]], *musts: Must, **more: Any) -> Workload:
    more = {"how": "load", "peers": _FEW, "figures": _figures(unit), **more}
    return Workload(title=title, client=client, musts=musts, **more)


def _cpu(peer: str, sign: str, limit: float, subject: str = REFERENCE) -> Must:
    return Must("cpu", peer, sign, limit, subject)


_STREAM_EVENTS = 200
_BOX = (
    "A connection per GiB, one after the other for twice the time of the other rows, the last one cut. "
    "A MB is 10^6 bytes."
)
_MEMORY = {"each": Figure("RSS per connection", "bytes", 1, 0)}
_START = {
    "first": Figure("exec to first 200", "ms", 1e-3, 0),
    "rss": Figure("RSS of the first process", "MiB", 2**20),
    "pss": Figure("PSS of it", "MiB", 2**20),
    "uss": Figure("USS of it", "MiB", 2**20),
    "all_pss": Figure("PSS of all processes", "MiB", 2**20),
}

WORKLOADS: dict[str, Workload] = {
    "get": _load(
        "GET, 13-byte body, six browser headers, keep-alive, 32 connections", "request",
        ("http", {"connections": 32}),
        _cpu(UVICORN, "<=", 0.70),
        *(_cpu(name, "<", 1.0) for name in ("granian", "gunicorn-asgi", "hypercorn", "uvicorn-h11")),
        peers=_HTTP,
    ),
    "get-different": _load(
        "GET, 32 connections, headers that differ on every request", "request",
        ("http", {"connections": 32, "request": "different"}),
        _cpu(UVICORN, "<=", 0.80),
        notes="No header line and no target comes twice.",
    ),
    "get-256": _load(
        "GET, 256 connections", "request", ("http", {"connections": 256}), _cpu(UVICORN, "<=", 0.70),
    ),
    "get-pipelined": _load(
        "GET, 32 connections, 16 requests pipelined", "request", ("http", {"connections": 32, "depth": 16}),
        _cpu(UVICORN, "<=", 0.70),
    ),
    "post-json": _load(
        "POST 1 KiB of JSON, FastAPI with a pydantic model, 32 connections", "request",
        ("http", {"connections": 32, "request": "json"}),
        _cpu(UVICORN, "<=", 0.96),
        app="benchmarks.framework_app:app", notes="The framework is most of it.",
    ),
    "ws-64": _load(
        "WebSocket echo, 64 bytes of text, 32 connections", "message",
        ("websocket", {"connections": 32, "size": 64, "text": True}),
        _cpu(_SANSIO, "<=", 0.65),
        peers=_WEBSOCKET,
    ),
    "ws-64k": _load(
        "WebSocket echo, 64 KiB, binary, 8 connections", "message",
        ("websocket", {"connections": 8, "size": 65536}),
        _cpu(_SANSIO, "<=", 0.90), _cpu("uvicorn-wsproto", "<=", 1.0, "leanserve-no-numpy"),
        peers=_LARGE_MESSAGES,
    ),
    "ws-1m": _load(
        "WebSocket echo, 1 MiB, binary, 8 connections", "message",
        ("websocket", {"connections": 8, "size": 1 << 20}),
        _cpu(_SANSIO, "<=", 0.90), _cpu("uvicorn-wsproto", "<=", 1.0, "leanserve-no-numpy"),
        peers=_LARGE_MESSAGES,
    ),
    "sse": _load(
        "Server-sent events, 200 streams, 20-byte chunks", "chunk",
        ("http", {"connections": 200, "request": f"/events?count={_STREAM_EVENTS}", "units": _STREAM_EVENTS}),
        _cpu(UVICORN, "<=", 1.0),
        notes=f"Each chunk in a turn of the loop of its own, as from a model; {_STREAM_EVENTS} per response.",
    ),
    "upload": _load(
        "Upload of 1 GiB", "MB", ("upload", {}),
        _cpu(UVICORN, "<=", 0.40),
        Must("rate", UVICORN, ">=", 1.8),
        how="transfer", peers=_HTTP, notes=_BOX,
    ),
    "download": _load(
        "Download of 1 GiB in messages of 64 KiB", "MB", ("download", {"path": "/download?bytes={size}"}),
        _cpu(UVICORN, "<=", 1.0), Must("rate", UVICORN, ">=", 1.0),
        how="transfer", notes=_BOX,
    ),
    "download-file": _load(
        "Download of a file of 1 GiB by pathsend", "MB",
        ("download", {"path": "/file?path={file}&bytes={size}"}),
        _cpu(UVICORN, "<=", 1.0), Must("rate", UVICORN, ">=", 1.0),
        how="transfer",
        notes=_BOX + " Where the server does not offer `http.response.pathsend` the application reads the "
        "file in blocks of 64 KiB.",
    ),
    "connect": _load(
        "New connection per request, 16 at a time", "request", ("new_connections", {"connections": 16}),
        _cpu(UVICORN, "<=", 0.70),
    ),
    "connect-tls": _load(
        "New TLS connection per request, 8 at a time", "request", ("new_tls_connections", {"connections": 8}),
        _cpu(UVICORN, "<=", 0.95),
        tls=True, notes="A full handshake each, ECDSA P-256.",
    ),
    "idle-http": _load(
        "Idle keep-alive connections: 10,000, or as many as may be open", "connection", ("idle", {}),
        Must("each", UVICORN, "<", 1.0),
        how="idle", figures=_MEMORY,
        notes="RSS of all processes, with them less without; one answered request each.",
    ),
    "idle-ws": _load(
        "Idle WebSockets: 10,000, or as many as may be open", "connection", ("idle", {"websockets": True}),
        Must("each", _SANSIO, "<", 1.0),
        how="idle", figures=_MEMORY, peers=(REFERENCE, _SANSIO, "granian", "gunicorn-asgi"),
        notes="RSS of all processes, with them less without; one handshake each.",
    ),
    "start-1": _load(
        "Start, 1 worker", "start", ("", {}), Must("first", UVICORN, "<", 1.0),
        how="start", figures=_START, pinned=False,
        notes="uvicorn has no parent process with one worker, so only the time is compared.",
    ),
    "start-4": _load(
        "Start, 4 workers", "start", ("", {}),
        Must("first", UVICORN, "<", 1.0), Must("rss", UVICORN, "<", 1.0), Must("pss", UVICORN, "<", 1.0),
        how="start", figures=_START, workers=4, pinned=False,
        notes="The first process is the idle parent of the workers; its pages were read after the first 200.",
    ),
    "workers-1": _load(
        "GET, 32 connections, one worker, nothing pinned", "request", ("http", {"connections": 32}),
        peers=(REFERENCE, UVICORN, "granian"), pinned=False,
    ),
    "workers-2": _load(
        "GET, 32 connections, two workers, nothing pinned", "request", ("http", {"connections": 32}),
        peers=(REFERENCE, UVICORN, "granian"), pinned=False, workers=2,
        notes="To be read beside the row for one worker. On two CPUs the client competes with both workers.",
    ),
}
