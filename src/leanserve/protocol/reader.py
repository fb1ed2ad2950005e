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
        self._gate = strict.ChunkGate(settings.trailer_bytes, settings.max_body_size)

    def read_head(self, head: bytes) -> Request:
        """A head without its empty line: both have to take it. Raises RemoteProtocolError."""
        strict.check_head(head, self._settings)
        parsed = self._feed(head + b"\r\n\r\n")
        if not isinstance(parsed, h11.Request):
            raise RemoteProtocolError("h11 sees no request in a complete head")
        return strict.build_request(parsed.method, parsed.target, parsed.http_version, list(parsed.headers))

    def read_chunked(self, buffer: bytes | bytearray) -> tuple[Data | EndOfBody | None, int]:
        """The next event of a chunked body, and how many of the bytes in `buffer` were taken for it; what is
        behind them is the next message's, or not needed yet. Raises RemoteProtocolError."""
        event, size = self._feed(b""), 0
        if event is h11.NEED_DATA and buffer:
            data = bytes(buffer)
            size = self._gate.take(data)
            event = self._feed(data[:size])
        if isinstance(event, h11.Data):
            return Data(bytes(event.data)), size
        return EndOfBody() if isinstance(event, h11.EndOfMessage) else None, size

    def _feed(self, data: bytes) -> object:
        """The one place where h11 is called, and its errors become ours."""
        try:
            if data:
                self._h11.receive_data(data)
            return self._h11.next_event()
        except h11.RemoteProtocolError as error:
            raise RemoteProtocolError(str(error), status=error.error_status_hint) from error
