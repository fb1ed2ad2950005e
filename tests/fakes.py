"""Stand-ins for the event loop's side of a connection, with time as an argument.

They are fakes, not mocks: they behave. tests/transport/test_fakes.py runs the same checks on them and on the
transports of asyncio and uvloop.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import itertools
from collections import deque
from collections.abc import Callable
from typing import Any

from leanserve.asgi.cancellation import find_policies
from leanserve.asgi.forwarded import TrustedProxies
from leanserve.asgi.http import HTTP_EXTENSIONS, HttpExchange
from leanserve.asgi.messages import ExchangeRecord
from leanserve.asgi.timer import times_all
from leanserve.errors import RemoteProtocolError
from leanserve.protocol.events import Request
from leanserve.protocol.fastframes import FrameRecogniser
from leanserve.protocol.fastpath import Recogniser, ResponseEncoder
from leanserve.protocol.responses import DefaultHeaders
from leanserve.settings import Settings
from leanserve.tally import Tally
from leanserve.transport.closing import ClosingConnection
from leanserve.transport.connection import Connection
from leanserve.transport.deadlines import Deadlines


class FakeTimer:
    """What ``call_at`` returns."""

    def __init__(self, when: float, callback: Callable[..., None], args: tuple[Any, ...]) -> None:
        self.when = when
        self.callback = callback
        self.args = args
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class FakeLoop:
    """A clock that stands still; callbacks wait for :meth:`run`, timers for :meth:`pass_time`."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._ready: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._timers: list[tuple[float, int, FakeTimer]] = []
        self._order = itertools.count()

    def time(self) -> float:
        return self.now

    def call_soon(self, callback: Callable[..., None], *args: Any) -> None:
        self._ready.append((callback, args))

    def call_at(self, when: float, callback: Callable[..., None], *args: Any) -> FakeTimer:
        timer = FakeTimer(when, callback, args)
        heapq.heappush(self._timers, (when, next(self._order), timer))
        return timer

    @property
    def armed(self) -> int:
        """Timers that will fire."""
        return sum(not timer.cancelled for _, _, timer in self._timers)

    def run(self) -> None:
        """Run what is ready, and what that makes ready."""
        for _ in range(1000):
            if not self._ready:
                return
            callback, args = self._ready.popleft()
            callback(*args)
        raise AssertionError("callbacks without end")

    def pass_time(self, seconds: float) -> None:
        """Let time pass, firing each timer at its time."""
        end = self.now + seconds
        self.run()
        for _ in range(1000):
            if not self._timers or self._timers[0][0] > end:
                self.now = end
                return
            when, _, timer = heapq.heappop(self._timers)
            if not timer.cancelled:
                self.now = max(self.now, when)
                timer.callback(*timer.args)
                self.run()
        raise AssertionError("timers without end")


class FakeTransport(asyncio.Transport):
    """A stream transport with a peer whose actions are method calls.

    Args:
        loop: whose ``call_soon`` brings ``connection_lost``.
        protocol: told as asyncio tells it.
        kernel_bytes: what the "kernel" takes before bytes stay in this transport's buffer.
        tls: speaks TLS, as far as half-closing goes.
    """

    def __init__(
        self,
        loop: Any,
        protocol: asyncio.Protocol,
        *,
        kernel_bytes: int = 65536,
        tls: bool = False,
        client: tuple[str, int] | None = ("192.0.2.1", 1234),
    ) -> None:
        super().__init__({"peername": client, "sockname": ("192.0.2.2", 80)})
        self._loop = loop
        self._protocol = protocol
        self._kernel_bytes = kernel_bytes
        self._tls = tls
        self._high, self._low = 65536, 16384
        self._unsent = bytearray()
        self._in_kernel = bytearray()
        self._waiting = bytearray()
        self._waiting_eof = False
        self._paused_writing = False
        self._reading = True
        self._closing = False
        self._lost = False
        self._told_lost = False
        self._eof_written = False
        self._eof_seen = False
        self.received = bytearray()  # what the peer has read
        self.aborted = False
        protocol.connection_made(self)

    # What the peer does

    def feed(self, data: bytes) -> None:
        """The peer sends."""
        self._waiting += data
        self._deliver()

    def feed_eof(self) -> None:
        """The peer closes its side."""
        self._waiting_eof = True
        self._deliver()

    def feed_reset(self) -> None:
        """The peer resets the connection."""
        self._force_close(ConnectionResetError(104, "reset"))

    def peer_reads(self, size: int | None = None) -> bytes:
        """The peer reads up to `size` bytes, all of them by default."""
        got = bytearray()
        while (size is None or len(got) < size) and (self._in_kernel or self._unsent):
            step = len(self._in_kernel) if size is None else min(size - len(got), len(self._in_kernel))
            got += self._in_kernel[:step]
            del self._in_kernel[:step]
            self._flush()
        self.received += got
        return bytes(got)

    @property
    def wire(self) -> bytes:
        """All that was written and not dropped, read by the peer or not."""
        return bytes(self.received + self._in_kernel + self._unsent)

    @property
    def sent_eof(self) -> bool:
        """Whether the peer, having read all, sees the end."""
        return not self._unsent and (self._eof_written or self._closing)

    @property
    def lost(self) -> bool:
        """Whether connection_lost has been called, or is about to be."""
        return self._lost

    # What the protocol does

    def write(self, data: Any) -> None:
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"data argument must be a bytes-like object, not {type(data).__name__}")
        if self._told_lost:
            raise RuntimeError("the handler is closed")  # as uvloop; asyncio would drop it
        if self._eof_written:
            raise RuntimeError("Cannot call write() after write_eof()")
        if self._lost or not data:
            return
        self._unsent += data
        self._flush()

    def write_eof(self) -> None:
        if self._tls:
            raise NotImplementedError
        self._eof_written = True

    def can_write_eof(self) -> bool:
        return not self._tls

    def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        self._flush()

    def abort(self) -> None:
        if self._told_lost:
            raise RuntimeError("aborted behind connection_lost")  # asyncio: an AttributeError, at times
        self.aborted = True
        self._force_close(None)

    def is_closing(self) -> bool:
        return self._closing

    def pause_reading(self) -> None:
        self._reading = False

    def resume_reading(self) -> None:
        if not self._closing and not self._reading:
            self._reading = True
            self._loop.call_soon(self._deliver)

    def is_reading(self) -> bool:
        return self._reading and not self._closing

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        if self._told_lost:
            raise RuntimeError("the handler is closed")  # as uvloop
        self._high = 65536 if high is None else high
        self._low = self._high // 4 if low is None else low
        self._tell()

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._low, self._high

    def get_write_buffer_size(self) -> int:
        return len(self._unsent)

    # Inside

    def _deliver(self) -> None:
        if self._closing or not self._reading:
            return
        if self._waiting:
            data, self._waiting = bytes(self._waiting), bytearray()
            self._protocol.data_received(data)
        if self._waiting_eof and not self._eof_seen and self._reading and not self._closing:
            self._eof_seen = True
            if not self._protocol.eof_received() or self._tls:
                self.close()

    def _flush(self) -> None:
        room = self._kernel_bytes - len(self._in_kernel)
        self._in_kernel += self._unsent[:room]
        del self._unsent[:room]
        self._tell()
        if self._closing and not self._unsent:
            self._lose(None)

    def _tell(self) -> None:
        if self._lost:
            return
        if not self._paused_writing and len(self._unsent) > self._high:
            self._paused_writing = True
            self._protocol.pause_writing()
        elif self._paused_writing and len(self._unsent) <= self._low:
            self._paused_writing = False
            self._protocol.resume_writing()

    def _force_close(self, error: Exception | None) -> None:
        self._closing = True
        self._unsent.clear()
        self._lose(error)

    def _lose(self, error: Exception | None) -> None:
        if not self._lost:
            self._lost = True
            self._loop.call_soon(self._tell_lost, error)

    def _tell_lost(self, error: Exception | None) -> None:
        self._told_lost = True
        self._protocol.connection_lost(error)
        del self._protocol  # as the loops do


class SteppedLoop(FakeLoop):
    """Fake time, and a real loop for tasks and callbacks that only runs when :meth:`run` is called."""

    def __init__(self) -> None:
        super().__init__()
        self.real = asyncio.new_event_loop()
        self.problems: list[dict[str, Any]] = []
        self.real.set_exception_handler(lambda _loop, context: self.problems.append(context))

    def call_soon(self, callback: Callable[..., None], *args: Any) -> None:
        self.real.call_soon(callback, *args)

    def create_task(self, coroutine: Any, **extra: Any) -> asyncio.Task[Any]:
        return self.real.create_task(coroutine, **extra)

    def run(self) -> None:
        """A few turns of the loop: enough for whatever does not wait for something outside."""
        self.real.run_until_complete(self._turns())

    def turn(self) -> None:
        """One turn: what is ready now, and not what that makes ready."""
        self.real.call_soon(self.real.stop)
        self.real.run_forever()

    async def _turns(self) -> None:
        for _ in range(12):
            await asyncio.sleep(0)

    def close(self) -> None:
        """Cancel what still runs and close."""
        tasks = asyncio.all_tasks(self.real)
        for task in tasks:
            task.cancel()
        if tasks:
            self.real.run_until_complete(asyncio.wait(tasks))
        self.run()
        self.real.close()


class FakeService:
    """What connections and exchanges ask of their worker."""

    def __init__(self, app: Any, settings: Settings | None = None, loop: FakeLoop | None = None) -> None:
        self.app = app
        self.settings = settings or Settings()
        self.loop: Any = loop or SteppedLoop()
        self.deadlines = Deadlines(self.loop.time, self.loop.call_at)
        self.server_cert: str | None = None
        self.recogniser = Recogniser(self.settings.http) if self.settings.http.fastpath else None
        self.encoder = ResponseEncoder(()) if self.settings.http.fastpath else None
        self.keeps_records = True
        self.tally: Tally | None = None
        self.websockets = 0
        self.default_headers = DefaultHeaders([(b"server", b"fake")])
        self.frame_recogniser = FrameRecogniser() if self.settings.http.fastpath else None
        self.draining = False
        self.holds_from_s = 0.0
        self.limits_running = False
        self.cancellation, self.policies = find_policies(self.settings.cancel)
        self.shutdown = {"event": asyncio.Event()}
        self.times_requests = times_all(self.settings.request)
        self.hangups = None
        self.context = contextvars.copy_context()
        self.state: dict[str, Any] = {}
        self.extensions: dict[str, dict[str, Any]] = {"leanserve.shutdown": self.shutdown}
        self.http_extensions = {**HTTP_EXTENSIONS, **self.extensions}
        self.proxies: TrustedProxies | None = None
        self.root_path = ""
        self.connections: set[Connection] = set()
        self.running: set[Any] = set()
        self.exchanges: list[Any] = []
        self.records: list[ExchangeRecord] = []
        self.refusals: list[RemoteProtocolError] = []
        self.failures: list[Exception] = []

    def connect(self, **extra: Any) -> tuple[Connection, FakeTransport]:
        """A new connection."""
        connection = Connection(self)
        return connection, FakeTransport(self.loop, connection, **extra)

    def open_exchange(self, connection: Connection, request: Request) -> Any:
        exchange = HttpExchange(self, connection, request, self.app)
        self.exchanges.append(exchange)
        self.running.add(exchange)
        return exchange

    def connection_opened(self, connection: Connection) -> None:
        self.connections.add(connection)

    def connection_closed(self, connection: Connection) -> None:
        self.connections.remove(connection)

    def exchange_ended(self, exchange: Any, received_bytes: int, sent_bytes: int) -> None:
        self.running.remove(exchange)

    def client_left(self, exchange: Any) -> None:
        """Nobody waits for a turn here."""

    def exchange_done(self, record: ExchangeRecord) -> None:
        self.records.append(record)

    def websocket_opened(self) -> None:
        self.websockets += 1

    def websocket_closed(self) -> None:
        self.websockets -= 1

    def refused(self, connection: ClosingConnection, error: RemoteProtocolError) -> None:
        self.refusals.append(error)

    def failed(self, connection: ClosingConnection, error: Exception) -> None:
        self.failures.append(error)

    def drain(self) -> None:
        """The server begins to stop."""
        self.draining = True
        for connection in list(self.connections):
            connection.drain()
