"""``leanserve ctl``: orders to a running server. Each may be given twice."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import click

from leanserve.admin.client import Client, find_server
from leanserve.admin.top import draw
from leanserve.errors import ServerGone, SettingsError

__all__ = ["build_ctl"]

_PAUSE_S = 0.1
# A roll that has ended and left old workers has failed; it may also be about to begin.
_STILL_LOOKS = 10

HELP = """\
Give an order to a running server, or ask it how it is.

\b
status      what /status says
reload      replace all workers, one after the other, with new code (as SIGHUP); or --config-only
abort       end a reload: a successor that boots leaves, what is not replaced yet stays
workers N   have N workers
drain       finish what runs, then end (as SIGTERM)
stop        drain, and wait for the end; with --now finish nothing
dump [N]    write the stacks of all threads of worker N, or of all, to the log
upgrade     replace the supervisor, too: new code, new Python, the same sockets (as SIGUSR2)

Exit codes: 0 done, 1 not done, 2 wrong usage."""


def build_ctl() -> click.Command:
    """The click command; calling it returns the exit code."""
    return click.Command(
        "leanserve ctl",
        params=[
            click.Argument(["order"], type=click.Choice(list(_ORDERS)), required=False),
            click.Argument(["number"], type=click.IntRange(1), required=False),
            click.Option(["--pid"], type=int, help="The supervisor's pid, when there are several servers."),
            click.Option(["--socket", "path"], help="Its control socket, when it is in no usual place."),
            click.Option(["--json", "as_json"], is_flag=True, help="Answer in JSON."),
            click.Option(["--wait"], is_flag=True, help="reload, upgrade: wait until it is done."),
            click.Option(
                ["--config-only"], is_flag=True,
                help="reload: read configuration and certificates again, and replace no worker.",
            ),
            click.Option(["--now"], is_flag=True, help="stop: finish nothing."),
            click.Option(
                ["--timeout"], type=click.FloatRange(0), default=600.0, show_default=True,
                help="Seconds to wait at most.",
            ),
        ],
        callback=_ctl,
        help=HELP,
    )


def _ctl(
    order: str | None, number: int | None, pid: int | None, path: str | None, as_json: bool, **more: Any
) -> int:
    if order is None:
        raise click.UsageError(f"ctl needs an order: {', '.join(_ORDERS)}")
    if number is None and order == "workers":
        raise SettingsError("ctl workers needs a number")
    if number is not None and order not in ("workers", "dump"):
        raise SettingsError(f"ctl {order} takes no number")
    for option, owners in (("wait", ("reload", "upgrade")), ("config_only", ("reload",)), ("now", ("stop",))):
        if more[option] and order not in owners:
            raise SettingsError(f"--{option.replace('_', '-')} is for ctl {' and '.join(owners)}")
    try:
        client = Client(find_server(pid, path))
        if order == "status":
            status = client.status()
            sys.stdout.write(json.dumps(status) + "\n" if as_json else "\n".join(draw(status)) + "\n")
            return 0
        return _tell(_ORDERS[order](client, number or 0, **more), as_json)
    except ServerGone as error:
        if not as_json:
            raise
        return _tell({"ok": False, "text": str(error)}, as_json)


def _tell(answer: dict[str, Any], as_json: bool) -> int:
    if as_json:
        sys.stdout.write(json.dumps(answer) + "\n")
    else:
        (sys.stdout if answer["ok"] else sys.stderr).write(f"{answer['text']}\n")
    return 0 if answer["ok"] else 1


def _workers(client: Client, number: int, **_: Any) -> dict[str, Any]:
    return client.order("workers", number)


def _drain(client: Client, _number: int, **_: Any) -> dict[str, Any]:
    return client.order("drain")


def _dump(client: Client, number: int, **_: Any) -> dict[str, Any]:
    return client.order("dump", number)


def _abort(client: Client, _number: int, **_: Any) -> dict[str, Any]:
    return client.order("abort")


def _reload(
    client: Client, _number: int, *, wait: bool, config_only: bool, timeout: float, **_: Any
) -> dict[str, Any]:
    if config_only:
        return client.order("config")
    before = _pids(client.status())
    answer = client.order("reload")
    if not wait or not answer["ok"]:
        return answer
    end, still = time.monotonic() + timeout, 0
    while (status := client.status()) and before & _pids(status):
        still = still + 1 if status["server"]["state"] == "running" else 0
        if still > _STILL_LOOKS:
            return {"ok": False, "text": "the old workers go on: see the log for their successors"}
        if time.monotonic() > end:
            return {"ok": False, "text": f"not all workers were replaced within {timeout:g} s"}
        time.sleep(_PAUSE_S)
    return {"ok": True, "text": f"replaced {len(before)} workers"}


def _upgrade(client: Client, _number: int, *, wait: bool, timeout: float, **_: Any) -> dict[str, Any]:
    old = client.status()["server"]["pid"]
    answer = client.order("upgrade")
    if not wait or not answer["ok"]:
        return answer
    end = time.monotonic() + timeout
    while server := _old_server(client, old):
        if not server["upgrading_to"]:
            return {"ok": False, "text": "the old supervisor goes on: the new one failed, as the log says"}
        if time.monotonic() > end:
            return {"ok": False, "text": f"the new supervisor has not taken over within {timeout:g} s"}
        time.sleep(_PAUSE_S)
    return {"ok": True, "text": f"supervisor pid {old} is replaced"}


def _old_server(client: Client, pid: int) -> dict[str, Any]:
    """What the supervisor with this pid says of itself; empty when its socket is gone, or another one's."""
    try:
        server: dict[str, Any] = client.status()["server"]
    except ServerGone:
        return {}
    return server if server["pid"] == pid else {}


def _pids(status: dict[str, Any]) -> set[int]:
    return {worker["pid"] for worker in status["workers"]}


def _stop(client: Client, _number: int, *, now: bool, timeout: float, **_: Any) -> dict[str, Any]:
    client.status()  # it is there; from here on an end is what was asked for
    end = time.monotonic() + timeout
    try:
        answer = client.order("hurry" if now else "drain")
        while answer["ok"] and client.status():
            if time.monotonic() > end:
                return {"ok": False, "text": f"it has not stopped within {timeout:g} s; try --now"}
            time.sleep(_PAUSE_S)
    except ServerGone:
        return {"ok": True, "text": "stopped"}
    return answer


_ORDERS: dict[str, Any] = {
    "status": None,
    "reload": _reload,
    "abort": _abort,
    "workers": _workers,
    "drain": _drain,
    "stop": _stop,
    "dump": _dump,
    "upgrade": _upgrade,
}
