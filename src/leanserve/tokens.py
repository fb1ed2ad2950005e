"""Tokens that all processes of a pool share: who takes one may do something until it gives it back.

They live in a pipe, a byte for each that is free. The kernel hands out a byte to one reader and no other, so
there are no locks, and a process that dies can leave nothing locked. A descriptor with a free token is
readable, which is how an event loop waits for one.
"""

from __future__ import annotations

import os
import sys

from leanserve.errors import SettingsError
from leanserve.settings import MAX_TOKENS

__all__ = ["Tokens"]

_PAGE_BYTES = 4096


class Tokens:
    """One kind of token, as any process of the pool sees it.

    Args:
        limit: how many there are, free or taken.
        fds: both ends of the pipe, not blocking: reader, writer.
    """

    __slots__ = ("fds", "limit")

    def __init__(self, limit: int, fds: tuple[int, int]) -> None:
        self.limit = limit
        self.fds = fds

    def __repr__(self) -> str:
        return f"<Tokens {self.taken()} of {self.limit} taken>"

    @classmethod
    def create(cls, limit: int) -> Tokens:
        """A new pipe with `limit` free tokens.

        Raises:
            SettingsError: the kernel gives this user no pipe that is large enough.
            OSError: no descriptor is to be had.
        """
        tokens = cls(limit, os.pipe())
        try:
            for fd in tokens.fds:
                os.set_blocking(fd, False)
            if limit > _room(tokens.fds[1]):
                raise SettingsError(
                    f"cannot count to {limit}: this user's pipes are small; see fs.pipe-user-pages-soft"
                )
            tokens.give(limit)
        except BaseException:
            tokens.close()
            raise
        return tokens

    def take(self) -> bool:
        """Take one; False when none is free. Never waits."""
        try:
            os.read(self.fds[0], 1)
        except BlockingIOError:
            return False
        return True

    def give(self, count: int = 1) -> None:
        """Give `count` back."""
        if count > 0:
            os.write(self.fds[1], bytes(count))

    def taken(self) -> int:
        """How many are taken now, by all processes together."""
        import fcntl  # neither is there on Windows, which has no pools
        import termios

        size = fcntl.ioctl(self.fds[0], termios.FIONREAD, bytes(4))
        return self.limit - int.from_bytes(size, sys.byteorder)

    def close(self) -> None:
        """Close both ends in this process."""
        for fd in self.fds:
            os.close(fd)


def _room(fd: int) -> int:
    """So many bytes fit into the pipe wherever the first of them lies in its page."""
    import fcntl

    if not hasattr(fcntl, "F_GETPIPE_SZ"):
        return MAX_TOKENS
    return int(fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)) - _PAGE_BYTES
