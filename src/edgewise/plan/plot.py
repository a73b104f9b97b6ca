"""Predicted against published speeds as one SVG: both axes logarithmic, a point a row, its 80 % interval upright."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Final
from xml.sax.saxutils import escape

from edgewise.plan.evaluate import Judged
from edgewise.plan.fit import Target

SIDE, LEFT, TOP, LOW = 440, 64, 48, 44  # of a panel's square, and around it
GAP = 40
STYLE: Final = """
svg { font: 13px system-ui, sans-serif; fill: #1f2328; background: #ffffff; }
.quiet { fill: #636c76; } .title { font-weight: 600; }
.frame, .grid { fill: none; stroke: #d0d7de; } .even { stroke: #1f2328; stroke-dasharray: 4 3; }
.published { fill: #0969da; stroke: #0969da; } .estimated { fill: #bf8700; stroke: #bf8700; }
.unsaid { fill: #8c959f; stroke: #8c959f; } .span { stroke-opacity: 0.35; }
@media (prefers-color-scheme: dark) {
svg { fill: #e6edf3; background: #0d1117; } .quiet { fill: #8d96a0; }
.frame, .grid { stroke: #3d444d; } .even { stroke: #e6edf3; }
}
"""


def plot(judged: Mapping[Target, Sequence[Judged]], title: str) -> str:
    """An SVG document with a panel for each target that has rows."""
    panels = [(name, rows) for name, rows in judged.items() if rows]
    width, height = len(panels) * (LEFT + SIDE) + GAP, TOP + SIDE + LOW
    parts = [f'<text class="title" x="{LEFT}" y="20">{escape(title)}</text>']
    for number, (name, rows) in enumerate(panels):
        parts += _panel(name, rows, LEFT + number * (SIDE + LEFT))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    return "\n".join([head, f"<style>{STYLE}</style>", *parts, "</svg>", ""])


def _panel(name: str, rows: Sequence[Judged], left: int) -> Iterator[str]:
    everything = [speed for one in rows for speed in (one.measured, one.predicted.value)]
    first, last = math.floor(math.log10(min(everything))), math.ceil(math.log10(max(everything)))
    last = max(last, first + 1)

    def at(speed: float) -> float:
        return (min(max(math.log10(speed), first), last) - first) / (last - first) * SIDE

    bottom = TOP + SIDE
    yield f'<rect class="frame" x="{left}" y="{TOP}" width="{SIDE}" height="{SIDE}"/>'
    for power in range(first, last + 1):
        place, label = at(10.0**power), f"{10.0**power:g}"
        yield f'<path class="grid" d="M{left + place:.1f} {TOP}V{bottom}M{left} {bottom - place:.1f}h{SIDE}"/>'
        yield f'<text class="quiet" x="{left + place:.1f}" y="{bottom + 18}" text-anchor="middle">{label}</text>'
        yield f'<text class="quiet" x="{left - 6}" y="{bottom - place + 4:.1f}" text-anchor="end">{label}</text>'
    yield f'<path class="even" d="M{left} {bottom}L{left + SIDE} {TOP}"/>'
    words = f"{name}: published tok/s (across), predicted (up); {len(rows)} rows"
    yield f'<text class="quiet" x="{left}" y="{bottom + 38}">{words}</text>'
    for one in rows:
        kind, x, y = one.row.basis or "unsaid", left + at(one.measured), bottom - at(one.predicted.value)
        low, high = bottom - at(one.predicted.low), bottom - at(one.predicted.high)
        name = f"{one.row.device}, {one.row.model}, {one.row.runtime}"
        label = escape(f"{name}: {one.measured:g} tok/s, predicted {one.predicted.value:.3g}")
        yield f'<line class="span {kind}" x1="{x:.1f}" y1="{low:.1f}" x2="{x:.1f}" y2="{high:.1f}"/>'
        yield f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{label}</title></circle>'
