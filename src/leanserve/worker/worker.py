"""One worker: the application, its connections, and their end. Runs in any loop; sets up no signals."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
import weakref
from collections.abc import Awaitable, Callable, Sequence
from enum import IntEnum
from socket import socket
from typing import TYPE_CHECKING, Any, ClassVar

from leanserve.asgi.cancellation import find_policies
from leanserve.asgi.forwarded import TrustedProxies
from leanserve.asgi.http import HTTP_EXTENSIONS, HttpExchange
from leanserve.asgi.lifespan import Lifespan
from leanserve.asgi.messages import App, ExchangeRecord, Running
from leanserve.asgi.timer import times_all
from leanserve.errors import BootFailed, RemoteProtocolError, SettingsError
from leanserve.flight import TARGET_BYTES, FlightRecorder
from leanserve.machine import Machine
from leanserve.protocol.events import Headers, Request
from leanserve.protocol.fastframes import FrameRecogniser
from leanserve.protocol.fastpath import Recogniser, ResponseEncoder
from leanserve.protocol.responses import DefaultHeaders, check_headers
from leanserve.scoreboard import Lane, WorkerState
from leanserve.settings import Settings
from leanserve.starting import extend_start
from leanserve.tally import Tally
from leanserve.transport.closing import ClosingConnection
from leanserve.transport.connection import Connection
from leanserve.transport.deadlines import Deadlines
from leanserve.transport.hangup import HangupWatch, make_watch
from leanserve.transport.roles import Exchange
from leanserve.transport.tls import build_context
from leanserve.worker.accept import Acceptor
from leanserve.worker.access_log import AccessLog
from leanserve.worker.complaints import Complaints
from leanserve.worker.date import format_date
from leanserve.worker.lifetime import Lifetime, has_end
from leanserve.worker.memory import Trimmer, trim
from leanserve.worker.probes import Probes
from leanserve.worker.wakeups import Wakeups
from leanserve.worker.watchdog import Watchdog

__all__ = ["Worker", "WorkerMachine", "WorkerMove", "WorkerState"]

logger = logging.getLogger("leanserve")

# What the supervisor is told of requests at work has to fit into its channel at once.
_MOST_LISTED, _LISTED_CHARS = 20, 200
# From cancelling what still runs at the end of the drain to cutting its connection.
_CANCEL_GRACE_S = 0.75


if TYPE_CHECKING:
    from leanserve.asgi.websocket import WebSocketExchange
    from leanserve.flight import Berth
    from leanserve.protocol.proxy_header import Endpoints
    from leanserve.worker.admission import Admission


class WorkerMove(IntEnum):
    """What can happen to a worker."""

    STARTED = 0
    DRAIN = 1
    STOP = 2


class WorkerMachine(Machine[WorkerState, WorkerMove]):
    """BOOTING, READY, DRAINING, STOPPED, in that order; a boot that fails goes straight to the end."""

    __slots__ = ()
    START: ClassVar[IntEnum] = WorkerState.BOOTING
    TABLE: ClassVar = {
        (WorkerState.BOOTING, WorkerMove.STARTED): WorkerState.READY,
        (WorkerState.BOOTING, WorkerMove.STOP): WorkerState.STOPPED,
        (WorkerState.READY, WorkerMove.DRAIN): WorkerState.DRAINING,
        (WorkerState.DRAINING, WorkerMove.DRAIN): WorkerState.DRAINING,
        (WorkerState.DRAINING, WorkerMove.STOP): WorkerState.STOPPED,
    }


class Worker:
    """Serves one application on some listeners, in the running loop.

    Args:
        app: an ASGI 3 callable (asgi.interfaces.load_app makes one of anything).
        settings: all settings.
        listeners: bound sockets; they stay the caller's to close.
        on_full: called when it has reached one of its limits, and again while it goes on beyond that.
        on_wants: called when the application has said, to `lane`, whether it wants requests; in any thread.
        on_closed: called when it accepts no more, and what was queued is connected.
        lane: where the counters go, if anybody reads them.
        recorder: where requests at work are noted for whoever asks after our end.
        token_fds: of the pool's tokens, when its workers share the limits of admission; needs `lane`.
        wakeups: our place among the workers that accept from the same queues, if there are others.
        shared: how many of the listeners, the last ones, are theirs, too.
    """

    def __init__(
        self,
        app: App,
        settings: Settings,
        listeners: Sequence[socket],
        *,
        on_full: Callable[[], None] | None = None,
        on_wants: Callable[[], None] | None = None,
        on_closed: Callable[[], None] | None = None,
        lane: Lane | None = None,
        recorder: FlightRecorder | None = None,
        token_fds: Sequence[tuple[int, int]] = (),
        wakeups: Wakeups | None = None,
        shared: int = 0,
    ) -> None:
        self.settings = settings
        self.listeners = list(listeners)
        self.machine = WorkerMachine()
        self.shutdown = {"event": asyncio.Event()}
        self.extensions: dict[str, dict[str, Any]] = {
            "leanserve.worker": {"set_ready": self.set_ready, "extend_start": extend_start},
            "leanserve.shutdown": self.shutdown,
        }
        self.http_extensions = {**HTTP_EXTENSIONS, **self.extensions}
        self.lifespan = Lifespan(app, settings.load, self.extensions)
        self.proxies = (
            TrustedProxies(settings.proxy.forwarded_allow_ips) if settings.proxy.proxy_headers else None
        )
        self.root_path = settings.load.root_path
        self._extra_headers = _parse_headers(settings.http.header)
        self.recogniser: Recogniser | None = None
        self.encoder: ResponseEncoder | None = None
        self.frame_recogniser = FrameRecogniser() if settings.http.fastpath else None
        if settings.http.fastpath:
            self.recogniser = Recogniser(settings.http)
            self.encoder = ResponseEncoder(name for name, _ in self._extra_headers)
        self.context = self.lifespan.context
        self.state = self.lifespan.state
        self.keeps_records = settings.log.logs_access
        self._access_log = AccessLog(settings.log)
        self.times_requests = times_all(settings.request)
        self.cancellation, self.policies = find_policies(settings.cancel)
        self.lane = lane
        self.tally = Tally() if lane is not None and lane.watched else None
        self.connections: set[Connection] = set()
        self.running: set[Running] = set()
        self._recorder = recorder
        self._berths = [] if recorder is None else recorder.free
        self._id_field = (settings.log.request_id_header or "").lower().encode("ascii")
        self.server_cert: str | None = None
        if settings.tls.ssl_certfile is not None:
            from leanserve.worker.reconfigure import tell_certificate

            tell_certificate(self, settings.tls)
        self.limits_running = settings.admission.max_concurrent_requests is not None
        self.admission: Admission | None = None
        self._wakeups = wakeups
        self._shared = shared
        self.app = self._guarded(app, token_fds)
        self._lifetime = Lifetime(settings.recycle, on_full) if has_end(settings.recycle) else None
        admin = settings.admin
        self._probes = Probes(admin, self._why_not_ready) if admin.health_path or admin.ready_path else None
        limit = settings.worker.stall_limit
        self._watchdog = None if limit is None else Watchdog(limit, self.running)
        self._complaints = Complaints(logger)
        self._trimmer = Trimmer(trim)
        self._handshaking: weakref.WeakSet[Connection] = weakref.WeakSet()
        self._changed = asyncio.Event()
        self._hurry = asyncio.Event()
        self.tls = build_context(settings.tls)
        self._on_wants = on_wants
        self._on_closed = on_closed

    loop: asyncio.AbstractEventLoop
    deadlines: Deadlines
    hangups: HangupWatch | None
    #: ``date``, ``server`` and the operator's own headers; new every second.
    default_headers: DefaultHeaders
    draining: bool = False
    holds_from_s: float = 0.0
    _acceptor: Acceptor
    _ticker: asyncio.TimerHandle
    _done = _bytes_in = _bytes_out = 0  # of ended exchanges, until the scoreboard is told
    _tick_due_ns = sys.maxsize
    _app_says_no = ""  # why the application wants no requests
    _told: tuple[int, int] = (0, 0)  # declined heads and frames that a debug line has told of

    def _guarded(self, app: App, token_fds: Sequence[tuple[int, int]]) -> App:
        """The application as exchanges call it, behind what counts its calls, where something does."""
        settings = self.settings
        if self.limits_running:
            from leanserve.worker.admission import Admission
            from leanserve.worker.slots import make_slots

            slots, places = make_slots(settings.admission, self.lane, token_fds)
            self.admission = Admission(
                settings.admission, slots, places, root_path=self.root_path, on_refused=self._count_refused
            )
            app = self.admission.guard(app)
        below = settings.listen.accept_below
        if self._wakeups is None and below is not None:
            self._wakeups = Wakeups()
        if self._wakeups is not None and self._shared:
            app = self._wakeups.note_calls(app)
        if self._wakeups is not None and below is not None:
            app = self._wakeups.guard(app, below)
        return app

    def __repr__(self) -> str:
        counts = f"{len(self.connections)} connections, {len(self.running)} running"
        return f"<Worker {self.machine.state.name} {counts}>"

    @property
    def addresses(self) -> list[Any]:
        """What the listeners are bound to: (host, port, ...) or a path."""
        return [sock.getsockname() for sock in self.listeners]

    # Life

    async def start(self, wait_turn: Callable[[], Awaitable[object]] | None = None) -> None:
        """Run the lifespan startup, then listen and accept.

        Args:
            wait_turn: called between the two: somebody else decides when it is time to listen, or, with
                BootFailed, that it never will be.

        Raises:
            BootFailed: the application failed to start.
            OSError: a listener cannot listen.
        """
        self.loop = asyncio.get_running_loop()
        self.deadlines = Deadlines(self.loop.time, self.loop.call_at)
        self.hangups = None
        started = False
        try:
            await self.lifespan.startup()
            started = True
        finally:
            if not started:
                self.machine.advance(WorkerMove.STOP)
        self.hangups = make_watch(self.loop)
        self._acceptor = Acceptor(
            self._new_connection, self.settings, self.listeners, self.tls, self._complaints.add,
            wakeups=self._wakeups, shared=self._shared,
        )  # fmt: skip
        self.default_headers = self._make_headers(int(time.time()))
        try:
            if wait_turn is not None:
                await wait_turn()
            await self._acceptor.open()
        except (OSError, BootFailed):
            self._acceptor.pause()
            self._close_watches()
            await self.lifespan.shutdown()
            self.machine.advance(WorkerMove.STOP)
            raise
        self._enter(WorkerMove.STARTED)
        self._tick()
        if self._watchdog is not None:
            self._watchdog.start()

    def limit_idle(self, seconds: float) -> None:
        """In a drain, wait no longer than this for requests that may be on their way."""
        idle_s = self.settings.drain.drain_idle_timeout
        self.settings = self.settings.replace(drain_idle_timeout=min(idle_s, seconds))

    def hurry(self) -> None:
        """Wait for nothing any more: :meth:`drain` cuts what still runs and returns soon."""
        self._hurry.set()

    async def drain(self, *, keep_listeners: int = 0, all_leave: bool = False) -> None:
        """Finish what runs, then stop. The lifespan shutdown always runs.

        Args:
            keep_listeners: from so many of the listeners, the last ones, somebody else goes on accepting
                (a successor in the slot, the workers of other slots).
            all_leave: the workers of other slots are told to leave, too.
        """
        drain = self.settings.drain
        self._enter(WorkerMove.DRAIN)
        self.shutdown["event"].set()
        try:
            await self._pause(drain.pre_stop_delay)
            await self._stop_accepting(keep_listeners, all_leave)
            for connection in list(self.connections):
                connection.drain()
            if not await self._wait_idle(drain.drain_timeout, hurry=True):
                await self._cut()
        finally:
            self._close_watches()
            self._ticker.cancel()
            if self._watchdog is not None:
                self._watchdog.stop()
            await self.lifespan.shutdown()
            self._enter(WorkerMove.STOP)

    def _close_watches(self) -> None:
        self.deadlines.close()
        if self.hangups is not None:
            self.hangups.close()
            self.hangups = None

    async def _stop_accepting(self, keep_listeners: int, all_leave: bool) -> None:
        await self._acceptor.close(keep_listeners, all_leave=all_leave)
        if self._on_closed is not None:
            self._on_closed()
        if self._handshaking or self._acceptor.busy:
            await self._pause(self.settings.drain.drain_idle_timeout)

    async def _cut(self) -> None:
        """The drain timeout has passed: WebSockets get 1012, the rest is cancelled, then cut."""
        logger.warning("cutting %d requests and %d connections", len(self.running), len(self.connections))
        for connection in list(self.connections):
            connection.cancel("shutdown")
        for exchange in list(self.running):
            exchange.cancel("shutdown")
        await self._wait_idle(_CANCEL_GRACE_S, hurry=False)
        for connection in list(self.connections):
            connection.reset()  # a response that has begun must not look complete
        await self._wait_idle(_CANCEL_GRACE_S, hurry=False)

    async def _pause(self, seconds: float) -> None:
        """Sleep, unless there is a hurry."""
        if seconds:
            try:
                async with asyncio.timeout(seconds):
                    await self._hurry.wait()
            except TimeoutError:
                pass

    async def _wait_idle(self, seconds: float, *, hurry: bool) -> bool:
        """Wait until nothing is connected and nothing runs; False after `seconds` or in a hurry."""
        hurried = asyncio.ensure_future(self._hurry.wait()) if hurry else None
        end = self.loop.time() + seconds
        try:
            while self.connections or self.running:
                self._changed.clear()
                changed = asyncio.ensure_future(self._changed.wait())
                waits = {changed} if hurried is None else {changed, hurried}
                await asyncio.wait(
                    waits, timeout=max(end - self.loop.time(), 0), return_when="FIRST_COMPLETED"
                )
                changed.cancel()
                if self.loop.time() >= end or (hurried is not None and hurried.done()):
                    return not (self.connections or self.running)
        finally:
            if hurried is not None:
                hurried.cancel()
        return True

    def _enter(self, move: WorkerMove) -> None:
        state = self.machine.advance(move)
        if self.lane is not None and state is WorkerState.STOPPED:
            self._tell_counts(self.lane)
        self.draining = state >= WorkerState.DRAINING  # asked four times per request: no call for that
        if self.lane is not None:
            self.lane.enter(state, time.monotonic_ns())

    def _tick(self) -> None:
        """With each second of the clock: a new date, and a heartbeat for the supervisor."""
        now = time.time()
        self.default_headers = self._make_headers(int(now))
        if self.lane is not None:
            beat_ns = time.monotonic_ns()
            self.lane.beat(beat_ns)
            self.lane.tell_lag(max(beat_ns - self._tick_due_ns, 0))
            self._tell_counts(self.lane)
        if self._recorder is not None:
            self._recorder.note_ages(self.running, self._id_field)
        self._tell_fastpath()
        if self._lifetime is not None:
            self._lifetime.look(time.monotonic())
        self._trimmer.look(len(self.connections) + len(self._handshaking), self.loop.time())
        # A little late rather than early: loops keep time in milliseconds.
        wait_s = 1.002 - now % 1
        self._tick_due_ns = time.monotonic_ns() + int(wait_s * 1e9)
        self._ticker = self.loop.call_later(wait_s, self._tick)

    def _tell_counts(self, lane: Lane) -> None:
        lane.count_done(self._done, self._bytes_in, self._bytes_out)
        self._done = self._bytes_in = self._bytes_out = 0
        if self.tally is not None:
            lane.tell_tally(self.tally)
        elif lane.watched:
            self.tally = Tally()  # from now on there is somebody who reads it

    def _tell_fastpath(self) -> None:
        """What share of the traffic was plain: to the scoreboard, and a debug line when it was not all."""
        if self.recogniser is None or self.frame_recogniser is None:
            return
        heads, frames = self.recogniser, self.frame_recogniser
        if self.lane is not None:
            self.lane.tell_fastpath(heads.recognised, heads.declined, frames.recognised, frames.declined)
        new_heads, new_frames = heads.declined - self._told[0], frames.declined - self._told[1]
        if new_heads:
            logger.debug("%d request heads were not plain; in the last it was %s", new_heads, heads.why)
        if new_frames:
            logger.debug("%d WebSocket frames were not plain; in the last it was %s", new_frames, frames.why)
        self._told = (heads.declined, frames.declined)

    def statistics(self) -> dict[str, int]:
        """Connections and running exchanges now; since the start, heads and messages that the fast path took,
        and heads and frames that it left to h11 and wsproto."""
        heads, frames = self.recogniser, self.frame_recogniser
        return {
            "connections": len(self.connections),
            "running": len(self.running),
            "heads_recognised": 0 if heads is None else heads.recognised,
            "heads_declined": 0 if heads is None else heads.declined,
            "frames_recognised": 0 if frames is None else frames.recognised,
            "frames_declined": 0 if frames is None else frames.declined,
        }

    def set_ready(self, ready: bool, reason: str = "") -> None:
        """The ASGI extension ``leanserve.worker``: whether the application of this worker wants requests.

        New connections go to other workers while one of them wants some; requests that come all the same are
        served. Any thread may call it.

        Args:
            ready: a worker is, until somebody says no.
            reason: why not, in a few words: it stands in the answer of `ready_path`.
        """
        self._app_says_no = "" if ready else str(reason) or "the application says so"
        if self._wakeups is not None:
            self._wakeups.is_willing = ready
        if self.lane is not None:
            self.lane.tell_app_ready(ready)
            if self._on_wants is not None:
                self._on_wants()

    def _why_not_ready(self) -> str:
        state = self.machine.state
        return self._app_says_no if state is WorkerState.READY else f"the worker is {state.name.lower()}"

    def list_running(self) -> list[dict[str, Any]]:
        """What is at work, those first that have been for longest: method and path, seconds (None: not
        measured). No more than some twenty, and of a long path its beginning."""
        now = time.monotonic()
        found = sorted(self.running, key=lambda exchange: exchange.started)[:_MOST_LISTED]
        return [
            {"what": str(each)[:_LISTED_CHARS], "age_s": now - each.started if each.started else None}
            for each in found
        ]

    def _make_headers(self, now: int) -> DefaultHeaders:
        headers: Headers = []
        if self.settings.http.date_header:
            headers.append((b"date", format_date(now)))
        if self.settings.http.server_header:
            headers.append((b"server", b"leanserve"))
        return DefaultHeaders(headers + self._extra_headers)

    # What connections and exchanges ask

    def _new_connection(self, endpoints: Endpoints | None = None) -> Connection:
        connection = Connection(self, endpoints)
        if self.tls is not None:
            self._handshaking.add(connection)
        return connection

    def open_exchange(self, connection: Connection, request: Request) -> Exchange:
        """Begin an exchange. Whether its application is called at once is the business of admission."""
        if self._lifetime is not None:
            self._lifetime.count()
        app = self.app
        if self._probes is not None and (probe := self._probes.find(request)) is not None:
            app = probe
        exchange: HttpExchange | WebSocketExchange
        if request.upgrade:
            from leanserve.asgi.websocket import WebSocketExchange  # and wsproto: a quarter of all imports

            exchange = WebSocketExchange(self, connection, request, app)
        else:
            exchange = HttpExchange(self, connection, request, app)
        berth: Berth | None = None
        if berths := self._berths:  # what leanserve.flight says of them
            berth, target = berths.pop(), request.raw_path
            if request.method != b"GET":
                target = request.method + b" " + target
            try:
                berth.value = target
            except ValueError:
                berth.value = target[:TARGET_BYTES]
        exchange.berth = berth
        self.running.add(exchange)
        if self.lane is not None:
            self.lane.tell_in_flight(len(self.running))
        return exchange

    def _count_refused(self) -> None:
        if self.tally is not None:
            self.tally.limited += 1

    def connection_opened(self, connection: Connection) -> None:
        """A connection was accepted."""
        if self.tls is not None:
            self._handshaking.discard(connection)
        self.connections.add(connection)
        if self.lane is not None:
            self.lane.connection_opened()
        if self.draining:
            connection.drain()

    def connection_closed(self, connection: Connection) -> None:
        """A connection is gone."""
        self.connections.discard(connection)
        if self.lane is not None:
            self.lane.connection_closed()
        if self.draining:
            self._changed.set()

    def exchange_ended(self, exchange: Running, received_bytes: int, sent_bytes: int) -> None:
        """The application call has ended; background work behind the response counts as running."""
        self.running.discard(exchange)
        if (berth := exchange.berth) is not None:
            berth.value = b""
            self._berths.append(berth)
            if self._recorder is not None and self._recorder.detailed:
                self._recorder.forget(berth)
        self._done += 1
        self._bytes_in += received_bytes
        self._bytes_out += sent_bytes
        if self.lane is not None:
            self.lane.tell_in_flight(len(self.running))
        if self.draining:
            self._changed.set()

    def client_left(self, exchange: Running) -> None:
        """The connection was lost before the response was complete: nobody waits for its turn."""
        if self.admission is not None:
            self.admission.leave(exchange.task)

    def exchange_done(self, record: ExchangeRecord) -> None:
        """The response has ended."""
        if self.keeps_records:
            self._access_log.write(record)

    def websocket_opened(self) -> None:
        """A WebSocket handshake was accepted."""
        if self.lane is not None:
            self.lane.websocket_opened()

    def websocket_closed(self) -> None:
        """A WebSocket that was open has ended."""
        if self.lane is not None:
            self.lane.websocket_closed()

    def refused(self, connection: ClosingConnection, error: RemoteProtocolError) -> None:
        """The peer broke the protocol: one line, and not too many of them."""
        if self.tally is not None:
            self.tally.refused += 1
        client = connection.peer.client
        peer = f"{client[0]}:{client[1]}" if client else "a peer"
        self._complaints.add("refused %s: %s", peer, error.reason)

    def failed(self, connection: ClosingConnection, error: Exception) -> None:
        """A bug of ours."""
        logger.error("internal error at %r; the connection is aborted", connection, exc_info=error)


def _parse_headers(lines: Sequence[str]) -> Headers:
    headers = []
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon:
            raise SettingsError(f"header {line!r} has no colon; write NAME:VALUE")
        headers.append((name.strip().encode("latin-1"), value.strip().encode("latin-1")))
    try:
        return check_headers(headers)
    except RuntimeError as error:
        raise SettingsError(f"header: {error}") from error
