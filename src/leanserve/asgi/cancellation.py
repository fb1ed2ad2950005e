"""Whether an application is cancelled when its client has gone, and how it learns why.

Every scope has ``scope["extensions"]["leanserve.cancellation"]``, a dict of the application's own:

- ``policy``: what happens when the client goes. The application may change it at any time.

  - ``"cancel"``: its task gets ``asyncio.CancelledError``, whose message is the cause.
  - ``"notify"``: ``receive()`` gives the disconnect, ``send()`` raises ClientDisconnected; it runs on.
  - ``"ignore"``: it runs on as if the client were there, and what it sends is dropped. For a WebSocket, and
    for a request whose body is not complete, that is not possible: there it means "notify".

- ``cause``: None, or why the application is being cancelled: ``"client_gone"``, ``"deadline"``,
  ``"shutdown"``, ``"slow_reader"`` or ``"bad_request"``.
- ``timeout``: seconds that the request may take, if it has such a limit.
"""

from __future__ import annotations

import asyncio
import fnmatch
import gc
import inspect
import re
from collections.abc import Sequence
from types import AsyncGeneratorType, CoroutineType, GeneratorType
from typing import TYPE_CHECKING, Any, Final, cast

from leanserve.errors import RemoteProtocolError
from leanserve.settings import CancelSettings
from leanserve.transport.deadlines import NEVER, Deadlines

if TYPE_CHECKING:
    from leanserve.asgi.messages import Running

__all__ = ["CANCELLATION", "Grace", "Policies", "cancel_task", "cause_of", "find_policies"]

# What stands between who asks an asynchronous generator and the generator; it has no attribute for that.
_STEPS: Final = frozenset({"async_generator_asend", "async_generator_athrow"})

#: The name of the extension.
CANCELLATION: Final = "leanserve.cancellation"


class Policies:
    """Policies by path.

    Args:
        rules: ``PATTERN=POLICY``, as ``/jobs/*=ignore``; ``*`` stands for any text, slashes too.
        default: the policy of a path that no pattern fits.
    """

    __slots__ = ("_default", "_rules")

    def __init__(self, rules: Sequence[str], default: str) -> None:
        self._default = default
        self._rules: list[tuple[re.Pattern[str], str]] = []
        for rule in rules:
            pattern, _, policy = rule.rpartition("=")
            self._rules.append((re.compile(fnmatch.translate(pattern)), policy))

    def find(self, raw_path: bytes) -> str:
        """The policy of the first rule that fits the decoded path, without the root path."""
        from urllib.parse import unquote  # for those who have policies

        path = unquote(raw_path.decode("latin-1"))
        return next((policy for pattern, policy in self._rules if pattern.match(path)), self._default)


def find_policies(settings: CancelSettings) -> tuple[dict[str, Any], Policies | None]:
    """What each scope gets a copy of, and the policies by path if there are any."""
    default = "cancel" if settings.cancel_on_disconnect else "notify"
    rules = settings.disconnect_policy
    return {"policy": default, "cause": None}, Policies(rules, default) if rules else None


def cause_of(error: Exception | None) -> str:
    """Why a connection was lost, in the words of the access log."""
    return error.cause if isinstance(error, RemoteProtocolError) else "client_gone"


def cancel_task(loop: asyncio.AbstractEventLoop, task: asyncio.Task[None], cause: str) -> bool:
    """Cancel an application's task; False when that has to wait for a thread.

    Cancelled before its first step, a coroutine does not run at all, not even its ``finally``: then it is
    cancelled in the next turn. And no thread can be stopped: who waits for one (a handler without ``async``)
    is cancelled behind its end, as anyio does it with its own cancellations; until then it counts as running.
    """
    coroutine = cast("CoroutineType[Any, Any, None]", task.get_coro())
    thread = _find_thread(coroutine)
    if thread is not None:
        thread.add_done_callback(lambda _: task.cancel(cause))
    elif inspect.getcoroutinestate(coroutine) == inspect.CORO_CREATED:
        loop.call_soon(task.cancel, cause)
    else:
        task.cancel(cause)
    return thread is None


def _find_thread(coroutine: CoroutineType[Any, Any, Any]) -> asyncio.Future[Any] | None:
    """What stands for a thread of anyio, if the innermost of these coroutines waits for one."""
    coroutine = _find_innermost(coroutine)
    if coroutine.cr_code.co_name != "run_sync_in_worker_thread" or coroutine.cr_frame is None:
        return None
    seen = coroutine.cr_frame.f_locals
    return None if seen.get("abandon_on_cancel", True) else seen.get("future")


def _find_innermost(coroutine: CoroutineType[Any, Any, Any]) -> CoroutineType[Any, Any, Any]:
    """The last coroutine on the way to what this one waits for; through generators, too, in which frameworks
    have a thread run: iterators without ``async`` in a response, dependencies that ``yield``."""
    inner: Any = coroutine
    while True:
        if isinstance(inner, CoroutineType):
            coroutine, inner = inner, inner.cr_await
        elif isinstance(inner, AsyncGeneratorType):
            inner = inner.ag_await
        elif isinstance(inner, GeneratorType):
            inner = inner.gi_yieldfrom
        elif type(inner).__name__ in _STEPS:
            inner = next((it for it in gc.get_referents(inner) if isinstance(it, AsyncGeneratorType)), None)
        else:
            return coroutine


class Grace:
    """Some time for an application that has been told; then it is cancelled.

    Args:
        deadlines: those of the worker.
        exchange: whose ``cancel_now(cause)`` is called.
    """

    __slots__ = ("_deadlines", "_exchange", "cause", "deadline", "queue_item")

    def __init__(self, deadlines: Deadlines, exchange: Running) -> None:
        self._deadlines = deadlines
        self._exchange = exchange
        self.cause = ""
        self.deadline = NEVER
        self.queue_item: list[Any] | None = None

    def give(self, seconds: float, cause: str) -> None:
        """Start; when it has started before, the earlier end counts."""
        if self._deadlines.now() + seconds < self.deadline:
            self.cause = cause
            self._deadlines.set(self, seconds)

    def deadline_reached(self) -> None:
        """The time is over."""
        self._exchange.cancel_now(self.cause)

    def end(self) -> None:
        """The application has ended."""
        self._deadlines.forget(self)
