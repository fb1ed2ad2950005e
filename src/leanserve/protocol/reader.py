"""One request message through strict.py and h11: what is not plain.

A module of its own because h11 is a sixth of what a worker imports, and most workers never need it: it comes
with the first message that is not plain.
"""

from __future__ import annotations

import h11

from leanserve.errors import RemoteProtocolError
from leanserve.protocol import strict
from leanserve.protocol.events import Data, EndOfBody, Request
from leanserve.settings import HttpSettings

__all__ = ["StrictReader"]

# h11's own limit counts what is incomplete; ours are exact and in front of it, so h11's must not interfere.
_NO_LIMIT = 1 << 40


class StrictReader:
    """An h11 connection that is given the bytes of one message, and is then thrown away.

    Args:
        settings: the limits.
    """

    __slots__ = ("_gate", "_h11", "_settings")

    def __init__(self, settings: HttpSettings) -> None:
        self._settings = settings
        self._h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=_NO_LIMIT)
        self._gate = strict.ChunkGate(settings)

    def read_head(self, head: bytes) -> Request:
        """A head without its empty line: both have to take it. Raises RemoteProtocolError."""
        strict.check_head(head, self._settings)
        parsed = self._feed(head + b"\r\n\r\n")
        if not isinstance(parsed, h11.Request):
            raise RemoteProtocolError("h11 sees no request in a complete head")
        return strict.build_request(parsed.method, parsed.target, parsed.http_version, list(parsed.headers))

    def measure(self, buffer: bytes | bytearray) -> int:
        """How many bytes of `buffer` are the next to read of a chunked body; what is behind them is the next
        message's, or for another call. Raises RemoteProtocolError."""
        return self._gate.take(buffer)

    def read_body(self, data: bytes) -> Data | EndOfBody | None:
        """The next event of a chunked body behind `data`, as measured. Raises RemoteProtocolError."""
        event = self._feed(data)
        if isinstance(event, h11.Data):
            return Data(bytes(event.data))
        return EndOfBody() if isinstance(event, h11.EndOfMessage) else None

    def _feed(self, data: bytes) -> object:
        """The one place where h11 is called, and its errors become ours."""
        try:
            if data:
                self._h11.receive_data(data)
            return self._h11.next_event()
        except h11.RemoteProtocolError as error:
            raise RemoteProtocolError(str(error), status=error.error_status_hint) from error
