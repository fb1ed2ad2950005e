"""``leanserve top``: the status in a terminal, again and again."""

from __future__ import annotations

import shutil
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import click

from leanserve.admin.client import Client, find_server
from leanserve.tally import Histogram

__all__ = ["build_top", "draw"]

_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"  # the other screen, without a cursor
_HOME, _REST_OF_LINE, _REST = "\x1b[H", "\x1b[K", "\x1b[J"
_BAR = 40


def draw(status: dict[str, Any], before: dict[str, Any] | None = None, *, block: str = "#") -> list[str]:
    """The status as lines of text.

    Args:
        status: as /status has it.
        before: an earlier one; rates and the distribution are of the time since then, else since the start.
        block: what bars are made of.
    """
    if before is not None and before["server"]["pid"] != status["server"]["pid"]:
        before = None
    return [
        *_draw_server(status), "", *_draw_traffic(status, before), "", *_draw_workers(status, before), "",
        *_draw_times(status, before, block),
    ]  # fmt: skip


def _draw_server(status: dict[str, Any]) -> Iterator[str]:
    server = status["server"]
    yield (
        f"leanserve {server['version']}  pid {server['pid']}  {server['state']}  "
        f"up {_duration(server['uptime_s'])}  crashes {server['crashes']}  restarts {server['restarts']}"
    )
    yield f"{status['live']['text']}; {status['ready']['text']}"


def _draw_traffic(status: dict[str, Any], before: dict[str, Any] | None) -> Iterator[str]:
    rates = {name: _growth(status, before, name) for name in ("requests", "connections_total")}
    sizes = {name: _growth(status, before, name) for name in ("bytes_in", "bytes_out")}
    yield (
        f"requests {rates['requests']:.1f}/s  in flight {status['in_flight']}  "
        f"connections {status['connections']} (+{rates['connections_total']:.1f}/s)  "
        f"websockets {status['websockets']}  "
        f"in {_size(sizes['bytes_in'])}/s  out {_size(sizes['bytes_out'])}/s"
    )
    for title, name in (("responses", "statuses"), ("early ends", "causes")):
        shown = "  ".join(f"{key} {value}" for key, value in status[name].items() if value)
        yield f"{title}  {shown or 'none'}"
    share = status["fastpath"]["heads"]
    fast = "" if share is None else f"  plain heads {share:.1%}"
    yield f"limited {status['limited']}  refused {status['refused']}{fast}"


def _draw_workers(status: dict[str, Any], before: dict[str, Any] | None) -> Iterator[str]:
    yield "worker      pid state         beat     lag flight  conns    req/s"
    old = {each["pid"]: each for each in before["workers"]} if before is not None else {}
    for each in status["workers"]:
        state = each["state"] if each["app_ready"] else "not ready"
        state = "stalled" if each["stalled"] else state
        rate = 0.0
        if before is not None and each["pid"] in old:
            rate = _per_second(status, before, each["requests"] - old[each["pid"]]["requests"])
        yield (
            f"{each['worker']:>6} {each['pid']:>8} {state:<10} {_time(each['heartbeat_age_s']):>7} "
            f"{_time(each['loop_lag_s']):>7} {each['in_flight']:>6} {each['connections']:>6} {rate:>8.1f}"
        )


def _draw_times(status: dict[str, Any], before: dict[str, Any] | None, block: str) -> Iterator[str]:
    grown = {name: _grown(status, before, name) for name in ("duration", "first_byte", "gap")}
    for title, histogram in zip(("duration", "first byte", "chunk gap"), grown.values(), strict=True):
        shown = "  ".join(f"{name} < {_time(histogram.quantile(part))}" for name, part in _PARTS)
        yield f"{title:<10}  {shown if histogram.total else 'nothing to tell'}"
    histogram = grown["duration"]
    places = [place for place, number in enumerate(histogram.buckets) if number]
    limits = [*status["limits_s"], float("inf")]
    for place in range(places[0], places[-1] + 1) if places else ():
        number = histogram.buckets[place]
        bar = block * -(-_BAR * number // max(histogram.buckets))
        yield f"  < {_time(limits[place]):>7} {bar:<{_BAR}} {number}"


_PARTS = (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))


def _grown(status: dict[str, Any], before: dict[str, Any] | None, name: str) -> Histogram:
    now = status[name]["buckets"]
    then = before[name]["buckets"] if before is not None else [0] * len(now)
    return Histogram(tuple(one - other for one, other in zip(now, then, strict=True)), 0)


def _growth(status: dict[str, Any], before: dict[str, Any] | None, name: str) -> float:
    return _per_second(status, before, status[name] - (before[name] if before is not None else 0))


def _per_second(status: dict[str, Any], before: dict[str, Any] | None, number: float) -> float:
    begin: float = before["server"]["counted_s"] if before is not None else 0.0
    end: float = status["server"]["counted_s"]
    return number / max(end - begin, 0.001)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds == float("inf"):
        return "for ever"
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.4g} s"


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _size(number: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f} B"


def build_top() -> click.Command:
    """The click command; calling it returns the exit code."""
    return click.Command(
        "leanserve top",
        params=[
            click.Option(["--pid"], type=int, help="The supervisor's pid, when there are several servers."),
            click.Option(["--socket", "path"], help="Its control socket, when it is in no usual place."),
            click.Option(
                ["--interval"], type=click.FloatRange(0.1), default=1.0, help="Seconds from look to look."
            ),
            click.Option(
                ["--count"], type=click.IntRange(1),
                help="How many looks; default is without end, or one when the output is no terminal.",
            ),
        ],
        callback=_top,
        help="Show a running server, live: rates, workers, latencies. End it with ^C.",
    )


def _top(pid: int | None, path: str | None, interval: float, count: int | None) -> int:
    client = Client(find_server(pid, path))
    live = sys.stdout.isatty()
    left = count if count is not None or live else 1
    last, before = client.status(), None
    interrupted: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        interrupted.append(number)  # Python drops what is raised while it clears something away
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    sys.stdout.write(_ENTER if live else "")
    try:
        # The first picture is of the whole life, those behind it are of the time since the one before.
        _show(draw(last, block=_block()), live=live)
        while not interrupted and (left is None or left > 1):
            time.sleep(interval)
            status = client.status()
            if status["server"]["counted_s"] != last["server"]["counted_s"]:  # else its counters are the same
                before, last = last, status
            _show(draw(status, before, block=_block()), live=live)
            left = None if left is None else left - 1
    except KeyboardInterrupt:
        pass  # the way out
    finally:
        sys.stdout.write(_LEAVE if live else "")
        sys.stdout.flush()
    return 0


def _block() -> str:
    return "█" if (sys.stdout.encoding or "").lower().replace("-", "") == "utf8" else "#"


def _show(lines: list[str], *, live: bool) -> None:
    if live:
        width, height = shutil.get_terminal_size()
        shown = [line[:width] + _REST_OF_LINE for line in lines[: height - 1]]
        sys.stdout.write(_HOME + "\r\n".join(shown) + "\r\n" + _REST)
    else:
        sys.stdout.write("\n".join(lines) + "\n\n")
    sys.stdout.flush()
