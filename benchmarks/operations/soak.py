"""The soak: everything at once for a long time; memory, descriptors, threads and tasks have to stay flat."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from statistics import linear_regression, median

from benchmarks.clients import frame, plain_frame
from benchmarks.operations.client import Answer, Ended, connect, get, once, post
from benchmarks.operations.results import Found, Scale, Tell
from benchmarks.operations.servers import WORKERS, serving, wait_served, wait_settled
from benchmarks.peers import REFERENCE, Running
from benchmarks.proc import memory, tree

PART = "soak"
SERVERS = (REFERENCE, "uvicorn", "gunicorn", "granian")
LOAD = "load"
SUPERVISOR = "supervisor"
#: What is sampled, and what may be added besides a twentieth: noise of the allocator, clients of a moment.
METRICS = {"rss": 2 << 20, "pss": 2 << 20, "fds": 8, "threads": 1, "tasks": 8, "objects": 2000}

_UPLOAD = bytes(1 << 20)
_NUMBERS = json.dumps({"numbers": list(range(100))}).encode()
_REST_WITHIN_S = 10.0
_MOST_LOOKS = 200


class Wrong(Exception):
    """An answer that is not the one that was due."""


def _check(answer: Answer, body: bytes) -> None:
    if answer.status != 200 or answer.body != body:
        raise Wrong(f"{answer.status} {answer.body[:80]!r}")


class _Raw:
    """A plain socket in the loop, for what a Link does not do."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._loop = asyncio.get_running_loop()

    async def send(self, data: bytes) -> None:
        async with asyncio.timeout(10):
            await self._loop.sock_sendall(self.sock, data)

    async def receive(self, size: int = 65536) -> bytes:
        async with asyncio.timeout(10):
            return await self._loop.sock_recv(self.sock, size)

    async def receive_exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            data += await self._some(size - len(data))
        return data

    async def receive_head(self) -> tuple[bytes, bytes]:
        """(head, what came behind it)"""
        data = b""
        while b"\r\n\r\n" not in data:
            data += await self._some(65536)
        head, _, rest = data.partition(b"\r\n\r\n")
        return head, rest

    async def _some(self, size: int) -> bytes:
        data = await self.receive(size)
        if not data:
            raise Wrong("the stream ended early")
        return data

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.sock.close()


@contextlib.asynccontextmanager
async def _raw(port: int, receive_buffer: int = 0) -> AsyncIterator[_Raw]:
    sock = socket.socket()
    try:
        sock.setblocking(False)
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        async with asyncio.timeout(10):
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        yield _Raw(sock)
    finally:
        sock.close()


async def _gets(port: int, chance: random.Random) -> None:
    link = await connect(port)
    try:
        for _ in range(50):
            answer = await link.ask(get("/pid"))
            _check(answer, b"%d" % answer.pid)
            await asyncio.sleep(chance.uniform(0, 0.04))
    finally:
        link.close()


async def _json(port: int, chance: random.Random) -> None:
    link = await connect(port)
    try:
        for _ in range(20):
            _check(await link.ask(post("/sums", _NUMBERS)), b'{"sum": 4950}')
            await asyncio.sleep(chance.uniform(0, 0.06))
    finally:
        link.close()


async def _upload(port: int, chance: random.Random) -> None:
    link = await connect(port)
    try:
        _check(await link.ask(post("/upload", _UPLOAD)), b"%d" % len(_UPLOAD))
    finally:
        link.close()
    await asyncio.sleep(chance.uniform(0.1, 0.4))


async def _stream(port: int, chance: random.Random) -> None:
    """Half of them are cut midway, by a FIN or a reset."""
    short = chance.random() < 0.5
    async with _raw(port) as raw:
        await raw.send(get(f"/events?count={20 if short else 1000}"))
        _, data = await raw.receive_head()
        end = time.monotonic() + chance.uniform(0.05, 1)
        while short and not data.endswith(b"0\r\n\r\n"):
            data += await raw._some(65536)
        while not short and time.monotonic() < end:
            await raw._some(65536)
        if short and b"data: 19\n\n" not in data:
            raise Wrong(f"a stream without its end: {data[-80:]!r}")
        if chance.random() < 0.5:
            raw.reset()


async def _websocket(port: int, chance: random.Random) -> None:
    """Closed as it should be, or left, or reset."""
    async with _raw(port) as raw:
        await raw.send(
            b"GET /ws HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        head, _ = await raw.receive_head()
        if not head.startswith(b"HTTP/1.1 101"):
            raise Wrong(f"no 101: {head[:80]!r}")
        for _ in range(20):
            payload = bytes(chance.choice((10, 1000, 70_000)))
            await raw.send(frame(payload, 2))
            expected = plain_frame(payload, 2)
            if await raw.receive_exactly(len(expected)) != expected:
                raise Wrong("another echo")
            await asyncio.sleep(chance.uniform(0, 0.1))
        end = chance.randrange(3)
        if end == 0:
            await raw.send(frame(b"\x03\xe8", 8))
            if await raw.receive_exactly(4) != plain_frame(b"\x03\xe8", 8):
                raise Wrong("another close frame")
        elif end == 1:
            raw.reset()


async def _slow_reader(port: int, chance: random.Random) -> None:
    """Two MiB in small sips; half of them leave early."""
    async with _raw(port, receive_buffer=16384) as raw:
        await raw.send(get("/download?bytes=2097152"))
        _, data = await raw.receive_head()
        left = 2_097_152 - len(data)
        leaves_at = left // 2 if chance.random() < 0.5 else 0
        while left > leaves_at:
            left -= len(await raw._some(65536))
            await asyncio.sleep(0.02)
        if left:
            raw.reset()


async def _abort(port: int, chance: random.Random) -> None:
    """What clients do that have changed their mind."""
    async with _raw(port) as raw:
        what = chance.randrange(5)
        if what == 1:
            await raw.send(b"GET /pid HTTP/1.1\r\nHost: 127")
        elif what == 2:
            await raw.send(get("/wait?ms=300"))
        elif what == 3:
            await raw.send(post("/upload", _UPLOAD)[:300_000])
        elif what == 4:
            await raw.send(get("/wait?ms=50"))
            raw.sock.shutdown(socket.SHUT_WR)
        await asyncio.sleep(chance.uniform(0, 0.05))
        if chance.random() < 0.5:
            raw.reset()


Client = Callable[[int, random.Random], Awaitable[None]]

#: What runs beside each other: name to (the client, how many of them).
CLIENTS: dict[str, tuple[Client, int]] = {
    "GET": (_gets, 8), "JSON": (_json, 4), "1 MiB upload": (_upload, 2), "event stream": (_stream, 8),
    "WebSocket": (_websocket, 6), "slow reader": (_slow_reader, 4), "aborted": (_abort, 4),
}


class _Load:
    def __init__(self, port: int) -> None:
        self.done: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self._port = port

    async def run(self, end_s: float) -> None:
        """Until time.monotonic() is `end_s`."""
        await asyncio.gather(*(
            self._again(name, client, random.Random(f"{name} {number}"), end_s)
            for name, (client, count) in CLIENTS.items() for number in range(count)
        ))

    async def _again(self, name: str, client: Client, chance: random.Random, end_s: float) -> None:
        while time.monotonic() < end_s:
            try:
                await client(self._port, chance)
                self.done[name] += 1
            except (Wrong, Ended, OSError, TimeoutError) as error:
                self.failed[f"{name}: {type(error).__name__}"] += 1
                await asyncio.sleep(0.1)


Sample = dict[str, dict[str, float]]  # who, metric, value


def _of_kernel(pid: int) -> dict[str, float]:
    """Empty when the process has gone."""
    try:
        held = memory({pid})
        return {
            "rss": held.rss, "pss": held.pss, "fds": len(os.listdir(f"/proc/{pid}/fd")),
            "threads": len(os.listdir(f"/proc/{pid}/task")),
        }
    except OSError:
        return {}


async def _states(port: int) -> dict[int, dict[str, float]]:
    """What each worker says of itself; asked until all have been heard."""
    found: dict[int, dict[str, float]] = {}
    for _ in range(_MOST_LOOKS):
        if len(found) >= WORKERS:
            break
        with contextlib.suppress(OSError, Ended, TimeoutError):
            state = json.loads((await once(port, "/state")).body)
            found[int(state.pop("pid"))] = {"tasks": state["tasks"], "objects": state["objects"]}
    return found


async def _sample(server: Running) -> Sample:
    states = await _states(server.port)
    found = {f"worker {pid}": {**_of_kernel(pid), **state} for pid, state in states.items()}
    found[SUPERVISOR] = _of_kernel(server.pid)
    others = tree(server.pid) - set(states) - {server.pid}
    found["processes"] = {"count": 1 + len(states) + len(others)}
    return found


async def _samples(server: Running, end_s: float, every_s: float) -> tuple[list[float], list[Sample]]:
    times: list[float] = []
    found: list[Sample] = []
    begun_s = time.monotonic()
    while (now_s := time.monotonic()) < end_s:
        times.append(now_s - begun_s)
        found.append(await _sample(server))
        await asyncio.sleep(max(every_s - (time.monotonic() - now_s), 0))
    return times, found


def trend(times: list[float], values: list[float]) -> dict[str, float]:
    """Medians of the first and the last third, and the slope of the last two thirds, per hour."""
    third = max(len(values) // 3, 1)
    found = {"first": median(values[:third]), "last": median(values[-third:]), "most": max(values)}
    late_times, late = times[third:], values[third:]
    if len(set(late_times)) > 1:
        found["slope"] = linear_regression(late_times, late).slope * 3600
    return found


def is_flat(metric: str, figures: dict[str, float]) -> bool:
    """Whether the last third is not above the first, but for a twentieth and METRICS' allowance."""
    first, last = figures[f"{metric} first"], figures[f"{metric} last"]
    return last <= first * 1.05 + METRICS[metric]


def _found(server: str, who: str, title: str, times: list[float], samples: list[Sample]) -> Found:
    figures: dict[str, float] = {}
    series: dict[str, list[float]] = {}
    for metric in METRICS:
        points = [
            (at, one[who][metric]) for at, one in zip(times, samples, strict=True)
            if metric in one.get(who, {})
        ]
        if points:
            series[f"{metric} times"], series[metric] = [list(column) for column in zip(*points, strict=True)]
            told = trend(series[f"{metric} times"], series[metric])
            figures |= {f"{metric} {name}": value for name, value in told.items()}
    return Found(PART, title, server, figures=figures, series=series)


async def _rest(server: Running, before: dict[str, float]) -> dict[str, float]:
    """Tasks and descriptors of all workers together when the clients have gone; they may take a moment."""
    end = time.monotonic() + _REST_WITHIN_S
    while True:
        now = _totals(await _sample(server))
        if time.monotonic() > end or all(now[name] <= before[name] for name in now):
            return now
        await asyncio.sleep(0.2)


def _totals(sample: Sample) -> dict[str, float]:
    workers = [one for who, one in sample.items() if who.startswith("worker ")]
    return {name: sum(one.get(name, 0) for one in workers) for name in ("tasks", "fds")}


async def _one(name: str, scale: Scale, tell: Tell) -> None:
    with serving(name) as server:
        await wait_served(server)
        await wait_settled(server.port, WORKERS)
        before = _totals(await _sample(server))
        load = _Load(server.port)
        end_s = time.monotonic() + scale.seconds
        loading = asyncio.create_task(load.run(end_s))
        try:
            times, samples = await _samples(server, end_s, scale.sample_s)
        finally:
            await loading
        after = await _rest(server, before)
    workers = sorted({who for one in samples for who in one if who.startswith("worker ")})
    tell(Found(PART, LOAD, name, figures={
        "seconds": scale.seconds, "samples": len(samples), "replaced": len(workers) - WORKERS,
        **{f"done: {client}": load.done[client] for client in CLIENTS}, "failed": load.failed.total(),
        **{f"failed: {kind}": count for kind, count in load.failed.items()},
        **{f"{metric} before": value for metric, value in before.items()},
        **{f"{metric} after": value for metric, value in after.items()},
    }))
    titles = {SUPERVISOR: SUPERVISOR, **{who: f"worker {at}" for at, who in enumerate(workers, 1)}}
    for who, title in titles.items():
        tell(_found(name, who, title, times, samples))


async def run(servers: list[str], scale: Scale, tell: Tell) -> None:
    """The soak of each server."""
    for name in servers:
        try:
            await _one(name, scale, tell)
        except (RuntimeError, OSError) as error:
            tell(Found(PART, LOAD, name, reason=str(error) or repr(error)))
