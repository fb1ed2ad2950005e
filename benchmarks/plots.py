"""Horizontal bars as SVG, readable on light and on dark pages."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from benchmarks.peers import REFERENCE
from benchmarks.report import Sample, Spread, figures, spread
from benchmarks.workloads import WORKLOADS

_WIDTH, _LABELS, _VALUES, _BAR, _STEP, _TOP = 720, 170, 110, 18, 30, 56
STYLE = """\
text { font: 14px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #24292f; }
.title { font-weight: 600; font-size: 15px; }
.small { fill: #57606a; font-size: 12px; }
.bar { fill: #9aa4af; }
.own { fill: #1f7a4d; }
.range { stroke: #24292f; stroke-width: 1.5; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; }
  .small { fill: #9198a1; }
  .bar { fill: #5c6671; }
  .own { fill: #3fb27a; }
  .range { stroke: #e6edf3; }
}
"""

# File name to (workload, figure).
PLOTS = {"get-cpu": ("get", "cpu"), "websocket-cpu": ("ws-64", "cpu"), "upload-cpu": ("upload", "cpu")}


def bars(title: str, subtitle: str, rows: Sequence[tuple[str, Spread]]) -> str:
    """One bar per row, as long as its median, with a line from its least to its most; the smallest first."""
    rows = sorted(rows, key=lambda row: row[1].median)
    most = max(value.most for _, value in rows)
    room = _WIDTH - _LABELS - _VALUES
    height = _TOP + _STEP * len(rows) + 4
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}"',
        f' viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}">',
        f"<style>{STYLE}</style>",
        f'<text class="title" x="0" y="18">{escape(title)}</text>',
        f'<text class="small" x="0" y="38">{escape(subtitle)}</text>',
    ]
    for number, (name, value) in enumerate(rows):
        top = _TOP + number * _STEP
        middle, length = top + _BAR / 2, max(value.median / most * room, 1)
        low, high = (_LABELS + edge / most * room for edge in (value.least, value.most))
        kind = "bar own" if name.startswith(REFERENCE) else "bar"
        parts += [
            f'<text x="{_LABELS - 10}" y="{middle + 5:g}" text-anchor="end">{escape(name)}</text>',
            f'<rect class="{kind}" x="{_LABELS}" y="{top}" width="{length:.1f}" height="{_BAR}" rx="2"/>',
            f'<line class="range" x1="{low:.1f}" x2="{high:.1f}" y1="{middle:g}" y2="{middle:g}"/>',
            f'<text x="{max(_LABELS + length, high) + 8:.1f}" y="{middle + 5:g}">{value.median:,.1f}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


def plots(samples: list[Sample]) -> dict[str, str]:
    """File name without ending to SVG, for what was measured."""
    found = {}
    for name, (workload, key) in PLOTS.items():
        figure = WORKLOADS[workload].figures[key]
        rows = []
        for peer in WORKLOADS[workload].peers:
            value = spread(one / figure.scale for one in figures(samples, workload, key, peer).values())
            if value:
                rows.append((peer, value))
        if rows:
            subtitle = f"{figure.title}, {figure.unit}: median, least and most of {rows[0][1].rounds} rounds"
            found[name] = bars(WORKLOADS[workload].title, f"{subtitle}; less is better", rows)
    return found
