"""Plots of operations as SVG: lines over time, and bars as in the other benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from benchmarks.operations import longtail, soak
from benchmarks.operations.results import Found
from benchmarks.plots import STYLE, bars
from benchmarks.report import spread

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 720, 300, 60, 110, 56, 30
_COLOURS = ("#1f7a4d", "#2f6fb4", "#b4562f", "#8a4fb0", "#7a7a1f")
_TAIL_ROWS = {"tail-connections": "block 70% connection each", "tail-pool": "block 70% pool"}

Points = Sequence[tuple[float, float]]


def lines(title: str, subtitle: str, series: dict[str, Points]) -> str:
    """A line per series, from zero up; seconds to the right."""
    last = max(point[0] for points in series.values() for point in points) or 1.0
    most = max(point[1] for points in series.values() for point in points) or 1.0
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}"',
        f' viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">',
        f"<style>{STYLE}</style>",
        f'<text class="title" x="0" y="18">{escape(title)}</text>',
        f'<text class="small" x="0" y="38">{escape(subtitle)}</text>',
    ]
    for share in (0, 0.5, 1):
        y, x = _TOP + height * (1 - share), _LEFT + width * share
        seconds = f"{last * share:,.0f} s"
        parts += [
            f'<text class="small" x="{_LEFT - 8}" y="{y + 4:g}" text-anchor="end">{most * share:,.0f}</text>',
            f'<line class="range" opacity="0.2" x1="{_LEFT}" x2="{_LEFT + width}" y1="{y:g}" y2="{y:g}"/>',
            f'<text class="small" x="{x:g}" y="{_HEIGHT - 8}" text-anchor="middle">{seconds}</text>',
        ]
    for number, (name, points) in enumerate(series.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        path = " ".join(
            f"{_LEFT + at / last * width:.1f},{_TOP + height * (1 - value / most):.1f}"
            for at, value in points
        )
        place = f'x="{_LEFT + width + 10}" y="{_TOP + 12 + 20 * number}"'
        parts += [
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>',
            f'<text {place} style="fill:{colour}">{escape(name)}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


def _series(found: list[Found], metric: str, scale: float) -> dict[str, Points]:
    drawn: dict[str, Points] = {}
    for one in found:
        if metric in one.series:
            pairs = zip(one.series[f"{metric} times"], one.series[metric], strict=True)
            drawn[one.case] = [(at, value / scale) for at, value in pairs]
    return drawn


def _of_soak(found: list[Found]) -> dict[str, str]:
    memory, tasks = _series(found, "rss", 1 << 20), _series(found, "tasks", 1)
    drawn = {}
    if memory:
        drawn["soak-rss"] = lines("Soak: resident memory", "RSS, MiB", memory)
    if tasks:
        drawn["soak-tasks"] = lines("Soak: asyncio tasks", "all tasks of a worker", tasks)
    return drawn


def _of_tail(found: list[Found]) -> dict[str, str]:
    drawn = {}
    for name, case in _TAIL_ROWS.items():
        values = {
            server: spread(
                1000 * one.figures["p99"] for one in found
                if (one.case, one.server) == (case, server) and one.figures
            )
            for server in longtail.SERVERS
        }
        rows = [(server, value) for server, value in values.items() if value]
        if rows:
            drawn[name] = bars(f"Long tail: {case}", "p99, ms: median, least and most; less is better", rows)
    return drawn


def drawings(part: str, found: list[Found]) -> dict[str, str]:
    """File name without ending to SVG, for a part."""
    if part == soak.PART:
        return _of_soak(found)
    return _of_tail(found) if part == longtail.PART else {}
