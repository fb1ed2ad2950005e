"""A range of a file to a connection, without copying it through Python where the kernel can do it."""

from __future__ import annotations

import asyncio
import errno
import os
from typing import TYPE_CHECKING

from leanserve.errors import ClientDisconnected

if TYPE_CHECKING:
    from leanserve.transport.connection import Connection

__all__ = ["send_range"]

_PIECE_BYTES = 262144

# What the socket says when its peer is gone; anything else is the file's trouble, and not the client's.
_GONE = frozenset(
    {errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ESHUTDOWN}
)
# Not every file system has it.
_NOT_OFFERED = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP})


async def send_range(connection: Connection, fd: int, count: int) -> None:
    """Send the first `count` bytes of the file open at `fd`.

    Raises:
        ClientDisconnected: the client has gone.
        OSError: the file cannot be read, or has become shorter.
    """
    sock = connection.transport.get_extra_info("socket")
    if connection.peer.tls is not None or sock is None or not hasattr(os, "sendfile"):
        await _copy(connection, fd, count)
        return
    await _flush(connection)
    # uvloop does not offer loop.sendfile, and neither loop lets others watch a transport's own descriptor: a
    # duplicate is another descriptor of the same socket, which both accept.
    out = os.dup(sock.fileno())
    try:
        await _sendfile(connection, out, fd, count)
    finally:
        os.close(out)


async def _flush(connection: Connection) -> None:
    """Wait until what was written before is in the kernel: sendfile goes past the transport's buffer."""
    transport = connection.transport
    low, high = transport.get_write_buffer_limits()
    transport.set_write_buffer_limits(high=0, low=0)
    try:
        if not connection.gate.open:
            await connection.gate.wait_open()
    finally:
        if not connection.gate.lost:  # on a transport that is gone uvloop raises
            transport.set_write_buffer_limits(high=high, low=low)


async def _sendfile(connection: Connection, out: int, fd: int, count: int) -> None:
    offset = 0
    while offset < count:
        if connection.gate.lost:
            raise ClientDisconnected("the client has gone")
        try:
            sent = os.sendfile(out, fd, offset, min(count - offset, _PIECE_BYTES))
        except BlockingIOError:
            await _writable(out, connection)
            continue
        except OSError as error:
            if error.errno in _NOT_OFFERED and not offset:
                await _copy(connection, fd, count)
                return
            if error.errno in _GONE:
                connection.abort()  # the loop has not told of it yet: we hear of it as anybody else does
                await connection.gate.wait_lost()
                raise ClientDisconnected("the client has gone") from error
            raise
        if sent == 0:
            raise OSError(f"the file ended {count - offset} bytes early")
        offset += sent
        await asyncio.sleep(0)  # a fast reader must not hold the loop for the whole file


async def _writable(out: int, connection: Connection) -> None:
    loop = asyncio.get_running_loop()
    waiter: asyncio.Future[None] = loop.create_future()
    loop.add_writer(out, _set, waiter)
    # While the duplicate is open, a socket whose peer reads nothing stays as it is even when its connection
    # is lost: then the gate wakes us.
    connection.gate.watch(waiter)
    connection.watch_reader(on=True)
    try:
        await waiter
    finally:
        connection.watch_reader(on=False)
        connection.gate.unwatch(waiter)
        loop.remove_writer(out)


async def _copy(connection: Connection, fd: int, count: int) -> None:
    loop = asyncio.get_running_loop()
    offset = 0
    while offset < count:
        data = await loop.run_in_executor(None, _read_at, fd, min(count - offset, _PIECE_BYTES), offset)
        if not data:
            raise OSError(f"the file ended {count - offset} bytes early")
        offset += len(data)
        connection.transport.write(data)
        if not connection.gate.open:
            await connection.gate.wait_open()


def _read_at(fd: int, count: int, offset: int) -> bytes:
    os.lseek(fd, offset, os.SEEK_SET)  # Windows has no pread, and nobody else uses this descriptor
    return os.read(fd, count)


def _set(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
