"""What is done to the server: each attack is a small function, and one row of the table at the end."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from hostile.peer import ANSWER_WITHIN_S, Outcomes, Peer, Target, crowd, pour
from ws_frames import BINARY, CONT, PING, TEXT, deflated, frame, header

Run = Callable[[Target, int, Outcomes], Awaitable[None]]

_GET = b"GET / HTTP/1.1\r\nhost: a.example\r\n\r\n"
_UPLOAD = b"POST /upload HTTP/1.1\r\nhost: a.example\r\n"
_CHUNKED = _UPLOAD + b"transfer-encoding: chunked\r\n\r\n"
_AT_ONCE = 100
_ENDLESS_BYTES = 64 << 20  # where an attack without end ends
_SLOW_PAUSE_S = 1.0
_ARRIVING, _ARRIVAL_S = 10, 0.01  # slow peers come one after the other: a thousand a second
_READ_BYTES = 4096  # what the kernel takes for a peer that does not read


# Slow peers: all stand at the same time, and each gives or takes a byte a second.


async def _slow(
    target: Target, count: int, outcomes: Outcomes, life: Callable[[Peer], Awaitable[str]]
) -> None:
    """`count` lives at once, until the server ends them or the time is over."""
    standing, arriving = 0, asyncio.Semaphore(_ARRIVING)

    async def one(_: int) -> str:
        nonlocal standing
        try:
            async with arriving:
                peer = await Peer.open(target, receive_buffer=_READ_BYTES)
                await asyncio.sleep(_ARRIVAL_S)
        finally:
            standing += 1
            if standing == count:
                outcomes.held.set()
        async with peer:
            said = await life(peer)
            outcomes.longest_s = max(outcomes.longest_s, peer.age_s)
            return said

    await crowd(outcomes, count, count, one)


def _dripping(opening: bytes, piece: bytes) -> Run:
    """Peers that send `opening`, and then `piece` every second."""

    async def run(target: Target, count: int, outcomes: Outcomes) -> None:
        async def life(peer: Peer) -> str:
            answer = asyncio.ensure_future(peer.outcome(target.hold_s))
            try:
                await peer.send(opening)
                while not answer.done():
                    await asyncio.wait([answer], timeout=_SLOW_PAUSE_S)
                    if not answer.done():
                        await peer.send(piece)
            except OSError:
                pass  # the server has closed; what it said is in the answer
            return await answer

        await _slow(target, count, outcomes, life)

    return run


async def slow_reads(target: Target, count: int, outcomes: Outcomes) -> None:
    """Ask for 64 MiB, and read ten bytes a second."""

    async def life(peer: Peer) -> str:
        try:
            await peer.send(b"GET /large HTTP/1.1\r\nhost: a.example\r\n\r\n")
            while peer.age_s < target.hold_s:
                async with asyncio.timeout(target.hold_s):
                    if not await peer.read(10):
                        return "closed"
                await asyncio.sleep(_SLOW_PAUSE_S)
                # A reset is read behind what has arrived before it, which takes this peer for ever.
                if peer.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                    return "reset"
        except (OSError, TimeoutError) as error:
            return "reset" if isinstance(error, ConnectionError) else "held"
        return "held"

    await _slow(target, count, outcomes, life)


async def silence(target: Target, count: int, outcomes: Outcomes) -> None:
    """Connect, and say nothing."""
    await _slow(target, count, outcomes, lambda peer: peer.outcome(target.hold_s))


# Peers that leave


def _leaving(*pieces: bytes) -> Run:
    """Peers that send this and reset; nothing at all is a bare connect."""

    async def run(target: Target, count: int, outcomes: Outcomes) -> None:
        async def one(_: int) -> str:
            async with await Peer.open(target) as peer:
                for piece in pieces:
                    await peer.send(piece)
            return "left"

        await crowd(outcomes, count, _AT_ONCE, one)

    return run


async def leave_in_answer(target: Target, count: int, outcomes: Outcomes) -> None:
    """Reset within an answer that is on its way."""

    async def one(_: int) -> str:
        async with await Peer.open(target) as peer:
            await peer.send(b"GET /large HTTP/1.1\r\nhost: a.example\r\n\r\n")
            await peer.read()
        return "left"

    await crowd(outcomes, count, _AT_ONCE, one)


# Endless and many


def _endless(opening: bytes, piece: bytes) -> Run:
    async def run(target: Target, count: int, outcomes: Outcomes) -> None:
        await crowd(outcomes, count, 4, lambda _: pour(target, opening, piece, _ENDLESS_BYTES))

    return run


def _asking(request: bytes) -> Run:
    """Requests that are answered, or refused, each on a connection of its own."""

    async def run(target: Target, count: int, outcomes: Outcomes) -> None:
        async def one(_: int) -> str:
            async with await Peer.open(target) as peer:
                await peer.send(request)
                return await peer.outcome()

        await crowd(outcomes, count, _AT_ONCE, one)

    return run


def _pipelined(per_connection: int, *, reads: bool) -> Run:
    async def run(target: Target, count: int, outcomes: Outcomes) -> None:
        async def one(_: int) -> str:
            async with await Peer.open(target) as peer:
                sending = asyncio.ensure_future(peer.send(_GET * per_connection))
                try:
                    if not reads:
                        await asyncio.sleep(target.hold_s)
                        return "left"
                    answers, rest = 0, b""
                    while answers < per_connection:
                        data = await peer.read()
                        if not data:
                            return "closed"
                        answers += (rest + data).count(b"HTTP/1.1 200 ")
                        rest = data[-12:]  # one byte less than what is counted
                    return "all answered" if answers == per_connection else "too many answers"
                finally:
                    sending.cancel()
                    await asyncio.gather(sending, return_exceptions=True)

        await crowd(outcomes, count, 4, one)

    return run


def _whole(body: bytes) -> Run:
    """Chunked uploads that are legal and unkind."""

    async def run(target: Target, count: int, outcomes: Outcomes) -> None:
        async def one(_: int) -> str:
            async with await Peer.open(target) as peer:
                answer = asyncio.ensure_future(peer.outcome())
                try:
                    await peer.send(_CHUNKED + body)
                    peer.sock.shutdown(socket.SHUT_WR)
                except OSError:
                    pass  # refused, and closed before all was sent
                return await answer

        await crowd(outcomes, count, 4, one)

    return run


# WebSocket


def _frames(data: Callable[[], bytes], *, reads: bool = True, offers: bytes = b"") -> Run:
    """Peers that send this behind the handshake, and what the server says of it: a close code, or "taken"."""

    async def run(target: Target, count: int, outcomes: Outcomes) -> None:
        sent = data()

        async def one(_: int) -> str:
            async with await Peer.open(target) as peer:
                await peer.shake(*([b"sec-websocket-extensions: " + offers] if offers else []))
                answer = asyncio.ensure_future(_close_code(peer)) if reads else None
                try:
                    async with asyncio.timeout(ANSWER_WITHIN_S if reads else target.hold_s):
                        await peer.send(sent + frame(TEXT, b"count"))
                        return await answer if answer else "left"
                except TimeoutError:
                    return "held"
                except OSError:
                    return await answer if answer else "reset"
                finally:
                    if answer is not None:
                        answer.cancel()

        await crowd(outcomes, count, 4, one)

    return run


async def _close_code(peer: Peer) -> str:
    """Read frames until a close ("1009") or a text ("taken"). Control frames of up to 125 bytes go by."""
    data = peer.received
    while True:
        while len(data) >= 2 and len(data) >= 2 + data[1]:
            opcode, size = data[0] & 0x0F, data[1]
            if opcode == 8:
                return str(struct.unpack_from("!H", data, 2)[0]) if size else "1005"
            if opcode == TEXT:
                return "taken"
            del data[: 2 + size]
        try:
            more = await peer.read()
        except OSError:
            return "reset"
        if not more:
            return "closed"
        data += more


def _fragments(size: int, count: int) -> bytes:
    return frame(BINARY, bytes(size), fin=False) + frame(CONT, bytes(size), fin=False) * count


# TLS


def _client_hello() -> bytes:
    """The first flight of a client."""
    outgoing = ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost")
    try:
        client.do_handshake()
    except ssl.SSLWantReadError:
        pass
    return outgoing.read()


async def abandoned_handshakes(target: Target, count: int, outcomes: Outcomes) -> None:
    """Leave with half a ClientHello sent, or behind the server's answer; by reset, or with FIN."""
    hello = _client_hello()

    async def one(number: int) -> str:
        async with await Peer.open(target) as peer:
            if number % 2:
                await peer.send(hello[: len(hello) // 2])
            else:
                await peer.send(hello)
                await peer.read()
            if number % 4 < 2:
                peer.close()
        return "left"

    await crowd(outcomes, count, _AT_ONCE, one)


async def half_handshakes(target: Target, count: int, outcomes: Outcomes) -> None:
    """Half a ClientHello, and then silence."""
    hello = _client_hello()

    async def life(peer: Peer) -> str:
        await peer.send(hello[: len(hello) // 2])
        return await peer.outcome(target.hold_s)

    await _slow(target, count, outcomes, life)


async def whole_handshakes(target: Target, count: int, outcomes: Outcomes) -> None:
    """A handshake, and a close without a request."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE

    async def one(_: int) -> str:
        _, writer = await asyncio.open_connection("127.0.0.1", target.port, ssl=context)
        writer.close()
        try:
            await writer.wait_closed()
        except (OSError, ssl.SSLError):
            pass  # how it ends is not what this is about
        return "left"

    await crowd(outcomes, count, 20, one)


@dataclass(frozen=True, slots=True)
class Attack:
    """One row of the table.

    Attributes:
        run: the attack, once it has begun.
        full, quick: how many connections.
        good: what may become of them.
        tls: whether the server speaks it.
        hold_s: how long slow peers go on in a full run; None where nobody is slow.
        ended_by: the setting whose deadline ends the slow peers; as long as there is none of that name, they
            are held and nothing is said of it.
    """

    run: Run
    full: int
    quick: int
    good: tuple[str, ...]
    tls: bool = False
    hold_s: float | None = None
    ended_by: str | None = None


def _named(**attacks: Attack) -> dict[str, Attack]:
    return {name.replace("_", "-"): attack for name, attack in attacks.items()}


ATTACKS = _named(
    silence=Attack(silence, 1000, 40, ("closed",), hold_s=15, ended_by="first_byte_timeout"),
    slow_heads=Attack(
        _dripping(b"GET / HTTP/1.1\r\nhost: a.example\r\nx-slow: ", b"a"), 1000, 40, ("408",),
        hold_s=30, ended_by="header_timeout",
    ),
    slow_bodies=Attack(
        _dripping(_UPLOAD + b"content-length: 1000000\r\n\r\n", b"a"), 1000, 40, ("408", "closed", "reset"),
        hold_s=60, ended_by="body_min_rate",
    ),
    slow_chunks=Attack(
        _dripping(_CHUNKED, b"1\r\na\r\n"), 1000, 40, ("408", "closed", "reset"),
        hold_s=60, ended_by="body_min_rate",
    ),
    stuck_bodies=Attack(
        _dripping(_UPLOAD + b"content-length: 1000000\r\n\r\naaaa", b""), 1000, 40,
        ("408", "closed", "reset"), hold_s=40, ended_by="body_timeout",
    ),
    slow_reads=Attack(slow_reads, 1000, 20, ("closed", "reset"), hold_s=75, ended_by="send_timeout"),
    bare_connects=Attack(_leaving(), 20_000, 1000, ("left",)),
    half_requests=Attack(_leaving(b"GET / HTTP/1.1\r\nhost: a.example\r\nx-half: "), 20_000, 1000, ("left",)),
    unread_answers=Attack(_leaving(_GET), 20_000, 1000, ("left",)),
    reset_in_body=Attack(
        _leaving(_UPLOAD + b"content-length: 100000\r\n\r\n", bytes(30_000)), 10_000, 500, ("left",)
    ),
    reset_in_chunk=Attack(_leaving(_CHUNKED + b"ffff\r\nabc"), 10_000, 500, ("left",)),
    reset_in_answer=Attack(leave_in_answer, 5000, 200, ("left",)),
    many_headers=Attack(_endless(b"GET / HTTP/1.1\r\n", b"x-y: z\r\n" * 1000), 400, 20, ("431",)),
    long_header=Attack(_endless(b"GET / HTTP/1.1\r\nx: ", b"a" * 16384), 400, 20, ("431",)),
    long_line=Attack(_endless(b"GET /", b"a" * 4096), 400, 20, ("414",)),
    chunk_extensions=Attack(_endless(_CHUNKED + b"5;", b"a=b;" * 4096), 400, 20, ("431",)),
    trailers=Attack(_endless(_CHUNKED + b"0\r\n", b"x-t: z\r\n" * 1000), 400, 20, ("431",)),
    many_ranges=Attack(
        _asking(
            b"GET / HTTP/1.1\r\nhost: a.example\r\nconnection: close\r\nrange: bytes=0-%s\r\n\r\n"
            % b"".join(b",5-%d" % number for number in range(1300))
        ), 5000, 200, ("200",),
    ),
    bad_upgrades=Attack(
        _asking(
            b"GET /ws HTTP/1.1\r\nhost: a.example\r\nupgrade: websocket\r\nconnection: Upgrade\r\n"
            b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n"
            b"sec-websocket-protocol: \x80\xff\r\n\r\n"
        ), 10_000, 300, ("400",),
    ),
    pipelined=Attack(_pipelined(10_000, reads=True), 8, 1, ("all answered",)),
    pipelined_unread=Attack(_pipelined(10_000, reads=False), 8, 2, ("left",)),
    tiny_chunks=Attack(_whole(b"1\r\na\r\n" * 100_000 + b"0\r\n\r\n"), 8, 1, ("200",)),
    extended_chunks=Attack(_whole(b"1;a=b\r\na\r\n" * 30_000 + b"0\r\n\r\n"), 8, 1, ("400",)),
    one_byte_fragments=Attack(_frames(lambda: _fragments(1, 100_000)), 8, 1, ("1009",)),
    empty_fragments=Attack(_frames(lambda: _fragments(0, 100_000)), 8, 1, ("1009",)),
    one_byte_messages=Attack(_frames(lambda: frame(TEXT, b"a") * 100_000), 8, 1, ("taken",)),
    pings=Attack(_frames(lambda: frame(PING, bytes(125)) * 50_000), 8, 1, ("taken",)),
    unread_pings=Attack(
        _frames(lambda: frame(PING, bytes(125)) * 50_000, reads=False), 8, 1, ("left", "held")
    ),
    deflate_bomb=Attack(
        _frames(
            lambda: frame(BINARY, deflated(bytes(64 << 20)), rsv=4), offers=b"permessage-deflate"
        ), 40, 4, ("1009",),
    ),
    deflate_bomb_in_fragments=Attack(
        _frames(
            lambda: b"".join(
                frame(BINARY if not at else CONT, bomb[at : at + 100], fin=False, rsv=0 if at else 4)
                for bomb in [deflated(bytes(64 << 20))] for at in range(0, len(bomb), 100)
            ), offers=b"permessage-deflate",
        ), 40, 4, ("1009",),
    ),
    huge_frame=Attack(_frames(lambda: header(BINARY, 1 << 40) + bytes(65536)), 400, 20, ("1009",)),
    abandoned_handshakes=Attack(abandoned_handshakes, 15_000, 300, ("left",), tls=True),
    whole_handshakes=Attack(whole_handshakes, 15_000, 200, ("left",), tls=True),
    half_handshakes=Attack(
        half_handshakes, 1000, 40, ("closed", "reset"), tls=True, hold_s=15, ended_by="tls_handshake_timeout"
    ),
)
