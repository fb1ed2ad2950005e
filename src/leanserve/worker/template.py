"""The entry of a template process: it imports the application once, and workers are forked from it.

It serves nothing and runs no loop. A worker is forked twice, so that it becomes a child of the supervisor,
which has made itself the one that inherits orphans for that moment: whose end the supervisor waits for and
whose death it hears of is the same for every worker.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import os
import signal
import time
import traceback
from typing import Any

from leanserve import logs
from leanserve.asgi.interfaces import load_app
from leanserve.channel import TemplateSpec, WorkerSpec
from leanserve.errors import BootFailed, SettingsError
from leanserve.forking import end_with, flush_streams, resolve
from leanserve.passing import receive_spec, send_packet
from leanserve.worker.forkable import find_obstacle
from leanserve.worker.process import describe_failure, die_with_parent, prepare_signals

__all__ = ["main"]

_EXIT_BUG, _EXIT_SETTINGS, _EXIT_BOOT = 1, 2, 3


def main(spec: TemplateSpec) -> int:
    """Import the application, fork a worker for every spec that comes, and return the exit code."""
    born_s = time.monotonic()
    prepare_signals()
    if not die_with_parent(spec.parent_pid, signal.SIGKILL):
        return _EXIT_BUG
    try:
        app = load_app(spec.app, spec.settings.load)
    except (BootFailed, SettingsError) as error:
        _tell(spec, describe_failure(str(error), traceback.format_exc()))
        return _EXIT_SETTINGS if isinstance(error, SettingsError) else _EXIT_BOOT
    obstacle = find_obstacle()
    if obstacle is not None:
        why = f"preload: importing {spec.app} leaves what no forked worker could use: {obstacle}"
        _tell(spec, describe_failure(f"{why}. Let the lifespan startup do that, or leave --preload out", ""))
        return _EXIT_BOOT
    # One that goes to the whole group (systemd does that) is the supervisor's to deal with; blocked and not
    # ignored, so that a worker that is just being forked gets its own.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    gc.collect()
    gc.freeze()  # what is here stays: no worker's collector writes to pages that are shared
    _tell(spec, {"event": "ready", "seconds": time.monotonic() - born_s})
    with contextlib.suppress(OSError):  # the supervisor is gone
        while (wanted := receive_spec(spec.sock)) is not None:
            send_packet(spec.sock, _fork(spec, wanted, app))
            _close_sockets(wanted)
    return 0


def _tell(spec: TemplateSpec, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # the supervisor is gone
        send_packet(spec.sock, message)


def _fork(spec: TemplateSpec, wanted: WorkerSpec, app: Any) -> dict[str, int]:
    """Fork a worker; its pid, or the errno of what has failed."""
    flush_streams()
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    gate, gate_end = os.pipe()
    answer: dict[str, int] = {"errno": errno.ECHILD}
    try:
        between = os.fork()
        if not between:
            _fork_again(spec, wanted, app, writer, gate, gate_end)
        # Its end, known: the worker has got its new parent.
        with contextlib.suppress(ChildProcessError):
            os.waitpid(between, 0)
        number = int(os.read(reader, 20) or 0)
        if number:
            answer = {"pid": number} if number > 0 else {"errno": -number}
    except OSError as error:
        answer = {"errno": error.errno or errno.ECHILD}
    finally:
        for fd in (reader, writer, gate, gate_end):  # with the last one the worker begins
            os.close(fd)
    return answer


def _fork_again(
    spec: TemplateSpec, wanted: WorkerSpec, app: Any, writer: int, gate: int, gate_end: int
) -> None:
    """In the process between: it ends at once, and leaves an orphan."""
    try:
        pid = os.fork()
    except OSError as error:
        os.write(writer, str(-(error.errno or errno.ECHILD)).encode())
        os._exit(0)
    if pid:
        os.write(writer, str(pid).encode())
        os._exit(0)

    def run() -> int:
        for fd in (writer, gate_end):
            os.close(fd)
        os.read(gate, 1)  # the end of it: from now on our parent is the supervisor
        os.close(gate)
        spec.sock.close()
        prepare_signals()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        logs.adjust(spec.settings.log, wanted.settings.log)  # changed in place since this template was made
        return resolve(spec.entry)(dataclasses.replace(wanted, app=spec.app, loaded=app))

    end_with(run)


def _close_sockets(wanted: WorkerSpec) -> None:
    wanted.channel.close()
    for sock in {sock for slot in wanted.listeners for sock in slot}:
        sock.close()
