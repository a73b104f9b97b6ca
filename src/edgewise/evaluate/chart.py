"""Lines as one SVG, readable in light and in dark."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from xml.sax.saxutils import escape

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Place = Callable[[float], float]

WIDTH, HEIGHT, LEFT, TOP, LOW, RIGHT = 560, 360, 64, 48, 48, 220
COLOURS: Final = ("#0969da", "#8c959f", "#bf8700", "#8250df", "#1a7f37", "#cf222e")
STYLE: Final = """
svg { font: 13px system-ui, sans-serif; fill: #1f2328; background: #ffffff; }
.quiet { fill: #636c76; } .title { font-weight: 600; }
.grid { fill: none; stroke: #d0d7de; } .line { fill: none; stroke-width: 2; } .band { fill-opacity: 0.15; }
.mark { stroke: #1f2328; stroke-dasharray: 4 3; }
@media (prefers-color-scheme: dark) {
svg { fill: #e6edf3; background: #0d1117; } .quiet { fill: #8d96a0; }
.grid { stroke: #3d444d; } .mark { stroke: #e6edf3; }
}
"""


@dataclass(frozen=True)
class Line:
    """Heights `up` [k] over places `across` [k], ascending, within the axis."""

    across: Floats
    up: Floats


@dataclass(frozen=True)
class Band:
    """What lies between two heights [k]."""

    across: Floats
    low: Floats
    high: Floats


@dataclass(frozen=True)
class Axis:
    """From 0 to `end`, with words at some places."""

    end: float
    ticks: Sequence[tuple[float, str]]


def chart(
    title: str,
    lines: Mapping[str, Line],
    axis: Axis,
    caption: str,
    *,
    shaded: Band | None = None,
    mark: float | None = None,
) -> str:
    """An SVG document. `caption` says what the axes are, `shaded` belongs to the first line, `mark` is a place to
    see."""
    values = np.concatenate([line.up for line in lines.values()])
    least, most = float(values.min()), float(values.max())
    span = max(most - least, 0.01)
    least, most = least - 0.05 * span, most + 0.05 * span

    def x(across: float) -> float:
        return LEFT + across / axis.end * WIDTH

    def y(height: float) -> float:
        return TOP + (most - height) / (most - least) * HEIGHT

    def points(across: Floats, up: Floats) -> str:
        return " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in zip(across, up, strict=True))

    width, height = LEFT + WIDTH + RIGHT, TOP + HEIGHT + LOW
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        f"<style>{STYLE}</style>",
        f'<text class="title" x="{LEFT}" y="20">{escape(title)}</text>',
        *_grid(least, most, axis, caption, x, y),
    ]
    if shaded is not None:
        around = f"{points(shaded.across, shaded.high)} {points(shaded.across[::-1], shaded.low[::-1])}"
        parts.append(f'<polygon class="band" fill="{COLOURS[0]}" points="{around}"/>')
    for number, (name, line) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        place = TOP + 14 + 20 * number
        parts.append(f'<polyline class="line" stroke="{colour}" points="{points(line.across, line.up)}"/>')
        parts.append(f'<text x="{LEFT + WIDTH + 10}" y="{place}" style="fill: {colour}">{escape(name)}</text>')
    if mark is not None:
        parts.append(f'<path class="mark" d="M{x(mark):.1f} {TOP}v{HEIGHT}"/>')
    return "\n".join([*parts, "</svg>", ""])


def _grid(least: float, most: float, axis: Axis, caption: str, x: Place, y: Place) -> Iterator[str]:
    bottom = TOP + HEIGHT
    for across, words in axis.ticks:
        place = x(across)
        yield f'<path class="grid" d="M{place:.1f} {TOP}V{bottom}"/>'
        yield f'<text class="quiet" x="{place:.1f}" y="{bottom + 18}" text-anchor="middle">{escape(words)}</text>'
    for up in np.linspace(least, most, 5):
        place = y(up)
        yield f'<path class="grid" d="M{LEFT} {place:.1f}h{WIDTH}"/>'
        yield f'<text class="quiet" x="{LEFT - 6}" y="{place + 4:.1f}" text-anchor="end">{up:.3f}</text>'
    yield f'<text class="quiet" x="{LEFT}" y="{bottom + 38}">{escape(caption)}</text>'
