"""Leanserve in code: a server under supervision, inside somebody's event loop, or in a thread.

    Server(app).serve(workers=4)                    # blocks; processes, signals, logging: as the command line

    async with Server(app, port=0).running() as server:
        print(server.urls)                          # in your loop; no signal handlers, no logging set-up

    with Server(app, port=0) as server:             # in a thread of its own: notebooks, tests
        print(server.urls)

This module imports no event loop: ``serve`` is also the way of the supervisor, which has none.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import logging
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from leanserve import logs
from leanserve.activation import activate
from leanserve.envfile import load_env_file
from leanserve.errors import BootFailed, LeanserveError, SettingsError
from leanserve.listeners import FdAddress, Listeners, open_listeners, parse_address, parse_addresses
from leanserve.settings import Settings, uses_tls

if TYPE_CHECKING:
    import asyncio

    from leanserve.worker.worker import Worker

__all__ = ["Server", "check_early", "run_supervised"]

Address = tuple[str, int] | str


class Server:
    """One server; it may be started again after it has stopped.

    Args:
        app: an application object (ASGI 3, ASGI 2, WSGI, or with ``factory=True`` a function that makes one),
            or ``"module:attribute"``. An object works with fork only; reload and spawn need the name.
        settings: any setting by its name, or by uvicorn's name for it; see docs/reference/settings.md.

    Raises:
        SettingsError: a setting is unknown, or its value cannot be used.
    """

    def __init__(self, app: Any, **settings: Any) -> None:
        self.app = app
        self.settings = Settings.build(**settings)
        self._listeners: Listeners | None = None
        self._thread: _Thread | None = None
        self._worker: Worker | None = None

    def __repr__(self) -> str:
        return f"<Server {' '.join(self.urls) or 'stopped'}>"

    @property
    def addresses(self) -> tuple[Address, ...]:
        """What is bound while the server runs: (host, port) pairs and paths of unix sockets."""
        return self._listeners.addresses if self._listeners is not None else ()

    @property
    def urls(self) -> tuple[str, ...]:
        """The addresses as URLs; ``unix:PATH`` for unix sockets."""
        if self._listeners is None:
            return ()
        return tuple(self._listeners.describe(tls=uses_tls(self.settings.tls)))

    def statistics(self) -> dict[str, int]:
        """Counts of the worker in this process while it runs (``worker.Worker.statistics``): what is open and
        running, and how much of the traffic the fast path has taken. Empty otherwise."""
        return {} if self._worker is None else self._worker.statistics()

    # In processes

    def serve(self, workers: int | str | None = None) -> None:
        """Serve under supervision until SIGTERM or SIGINT; sets up logging and signals. Blocks.

        Args:
            workers: number of processes or "auto"; the setting of the same name when None.

        Raises:
            SettingsError: a setting cannot be used.
            OSError: an address cannot be bound.
            BootFailed: the application could not be started; the reason is in the log.
            LeanserveError: the supervisor gave up because workers crash again and again.
            RuntimeError: this is not the main thread, where signals arrive.
        """
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("serve() handles signals and needs the main thread; use start() in others")
        settings = self.settings if workers is None else self.settings.replace(workers=workers)
        if sys.platform == "win32":
            self._serve_in_process(settings)
            return
        code = run_supervised(self.app, settings)
        if code == 2:
            raise SettingsError("a worker could not use a setting; the log says which")
        if code == 3:
            raise BootFailed("the application could not be started; the log says why")
        if code:
            raise LeanserveError(f"the server gave up with exit code {code}; the log says why")

    def _serve_in_process(self, settings: Settings) -> None:
        """One worker in this process, where there are no supervised ones; ^C drains it."""
        if settings.pool.workers != 1:
            raise SettingsError("this platform runs one worker only: leave --workers out")
        check_early(self.app, settings)
        logs.configure(settings.log)
        try:
            self.start()
            assert self._thread is not None
            while not self._thread.ended:
                time.sleep(0.1)
        except KeyboardInterrupt:
            pass
        finally:
            self.stop()

    # In somebody's event loop

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Server]:
        """One worker in the running event loop, for as long as the block lasts; then it drains.

        Signal handlers and logging stay as they are.

        Raises:
            SettingsError: a setting cannot be used here (``workers`` other than 1, ``reload``).
            BootFailed: the application could not be loaded or started.
            OSError: an address cannot be bound.
        """
        import anyio

        from leanserve.asgi.interfaces import load_app
        from leanserve.worker.worker import Worker

        self._check_alone()
        _warn(self.settings)
        app = load_app(self.app, self.settings.load)
        listeners = open_listeners(self.settings.listen, 1)
        try:
            worker = Worker(app, self.settings, listeners.sockets(0))
            await worker.start()
            self._listeners, self._worker = listeners, worker
            try:
                yield self
            finally:
                # Cancelled or not, the lifespan shutdown runs; a second cancel must not cut it short.
                with anyio.CancelScope(shield=True):
                    await worker.drain()
        finally:
            self._listeners = self._worker = None
            listeners.close()

    def _check_alone(self) -> None:
        if self._listeners is not None:
            raise RuntimeError("this server runs already")
        settings = self.settings
        pool = settings.pool
        several = pool.workers != 1 or pool.preload or pool.worker_env
        if several or settings.reload.reload or settings.admin.admin is not None:
            raise SettingsError(
                "one worker runs inside this process: workers, worker_env, preload, reload and admin "
                "need serve()"
            )
        check_early(self.app, self.settings)

    # In a thread

    def start(self) -> Server:
        """Run in a thread of its own; returns when the server accepts. A second start does nothing.

        Raises: as :meth:`running`.
        """
        if self._thread is None:
            thread = _Thread(self)
            thread.start()
            try:
                thread.wait_ready()
            except KeyboardInterrupt:
                thread.wait_ready()  # it may serve already; an application's shutdown is not skipped
                thread.stop()
                raise
            self._thread = thread
            atexit.register(self.stop)  # so that the lifespan shutdown runs when nobody calls stop()
        return self

    def stop(self) -> None:
        """Drain, and return when the thread has ended. Nothing when it does not run.

        Raises:
            Exception: what ended the server before it was told to.
        """
        thread, self._thread = self._thread, None
        if thread is not None:
            atexit.unregister(self.stop)
            thread.stop()

    def __enter__(self) -> Server:
        """:meth:`start`."""
        return self.start()

    def __exit__(self, *_exc_info: object) -> None:
        """:meth:`stop`."""
        self.stop()


class _Thread(threading.Thread):
    """A thread with an event loop of its own that runs one server until it is told to stop.

    Who waits for it looks at plain attributes and sleeps. ^C may come in the middle of any wait of threading:
    an Event then keeps its lock for ever, and join() takes a thread that still runs for ended (Python 3.11).
    """

    def __init__(self, server: Server) -> None:
        super().__init__(name="leanserve", daemon=True)
        self.ended = False
        self._server = server
        self._ready = False
        self._error: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._done: asyncio.Event | None = None

    def run(self) -> None:
        """The thread's main: what it raises is kept for the thread that waits."""
        import anyio

        with contextlib.ExitStack() as stack:
            stack.callback(self._tell_end)
            stack.push(self._keep_error)
            anyio.run(self._live, backend_options={"use_uvloop": _use_uvloop(self._server.settings)})

    def _tell_end(self) -> None:
        self._ready = self.ended = True

    def _keep_error(self, _kind: object, error: BaseException | None, _trace: object) -> bool:
        self._error = error
        return True

    async def _live(self) -> None:
        import asyncio

        self._done = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        async with self._server.running():
            self._ready = True
            await self._done.wait()

    def wait_ready(self) -> None:
        """Wait until the server accepts; raises what it failed with."""
        while not self._ready:
            time.sleep(0.002)
        if self._error is not None:
            self.join()
            raise self._error

    def stop(self) -> None:
        """Tell it to stop and wait for its end; raises what it failed with."""
        assert self._loop is not None
        assert self._done is not None
        with contextlib.suppress(RuntimeError):  # its loop is closed: it has ended by itself
            self._loop.call_soon_threadsafe(self._done.set)
        self.join()
        if self._error is not None:
            raise self._error


def run_supervised(app: Any, settings: Settings, reread: Callable[[], Settings] | None = None) -> int:
    """Serve with worker processes under the supervisor; the exit code of the command line.

    Args:
        app: as that of :class:`Server`.
        settings: all settings.
        reread: reads them again from where they came from; without, only files that they name are read again.

    Raises:
        SettingsError: a setting cannot be used.
        OSError: an address cannot be bound.
    """
    settings = activate(settings)
    check_early(app, settings)
    logs.configure(settings.log)
    _warn(settings)
    from leanserve.supervisor.supervisor import Supervisor

    def read_again() -> Settings:
        fresh = settings if reread is None else reread()
        check_early(app, fresh)
        return fresh

    return Supervisor(app, settings, reread=read_again).run(then_exit=True)


def _check_admin(settings: Settings) -> None:
    address, wanted, workers = settings.admin.admin, settings.admin.ready_workers, settings.pool.workers
    if address is not None and isinstance(parse_address(address, "admin"), FdAddress):
        raise SettingsError("admin takes HOST:PORT or unix:PATH, and no descriptor")
    if isinstance(workers, int) and wanted > workers:
        raise SettingsError(f"ready_workers {wanted} with workers {workers}: /readyz would never say yes")


def check_early(app: Any, settings: Settings) -> None:
    """Find what can be found without the application: better one line now than one from every worker.

    Also puts ``env_file`` into the environment.

    Raises:
        SettingsError: APP is malformed, a library or a file is missing, a certificate cannot be used, ...
    """
    if settings.pool.env_file is not None:
        load_env_file(settings.pool.env_file)
    parse_addresses(settings.listen)
    _check_admin(settings)
    if settings.proxy.proxy_headers:
        from leanserve.asgi.forwarded import TrustedProxies

        TrustedProxies(settings.proxy.forwarded_allow_ips)
    if settings.proxy.proxy_protocol != "off":
        from leanserve.asgi.forwarded import TrustedProxies

        TrustedProxies(settings.proxy.proxy_protocol_allow_ips, "proxy_protocol_allow_ips")
    if isinstance(app, str):
        from leanserve.asgi.interfaces import parse_app_string

        parse_app_string(app)
    elif settings.reload.reload or settings.pool.preload or settings.pool.start_method == "spawn":
        raise SettingsError(
            "reload, preload and start_method=spawn need the application by name: 'module:attribute'"
        )
    if settings.pool.preload and sys.platform != "linux":
        raise SettingsError("preload needs Linux: elsewhere nobody waits for the children of another process")
    if settings.reload.reload and importlib.util.find_spec("watchfiles") is None:
        raise SettingsError("reload needs watchfiles: pip install 'leanserve[reload]'")
    if settings.recycle.limit_max_gpu_memory is not None and importlib.util.find_spec("pynvml") is None:
        raise SettingsError("limit_max_gpu_memory needs pynvml, to ask the driver: pip install nvidia-ml-py")
    if settings.worker.loop == "uvloop" and importlib.util.find_spec("uvloop") is None:
        raise SettingsError("loop uvloop is not installed: pip install uvloop, or use --loop asyncio")
    if settings.tls.ssl_certfile is not None and settings.tls.ssl_context_factory is None:
        from leanserve.transport.tls import build_context

        build_context(settings.tls)


def _warn(settings: Settings) -> None:
    """Say once what may be a mistake and is no error."""
    proxy = settings.proxy
    asked = {
        "forwarded_allow_ips": proxy.proxy_headers,
        "proxy_protocol_allow_ips": proxy.proxy_protocol != "off",
    }
    for name, used in asked.items():
        if used and "*" in (part.strip() for part in getattr(proxy, name).split(",")):
            logger = logging.getLogger("leanserve")
            logger.warning("%s is '*': whoever can connect may say who the client is", name)


def _use_uvloop(settings: Settings) -> bool:
    if settings.worker.loop == "auto":
        return importlib.util.find_spec("uvloop") is not None
    return settings.worker.loop == "uvloop"
