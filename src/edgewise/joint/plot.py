"""Lines over a share as one SVG: above all a policy's accuracy beside its baselines, with its interval."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final
from xml.sax.saxutils import escape

import numpy as np
import numpy.typing as npt

from edgewise.evaluate.deferral import Curve, deferral_curve

Floats = npt.NDArray[np.float64]

WIDTH, HEIGHT, LEFT, TOP, LOW, RIGHT = 560, 360, 64, 48, 48, 220
POINTS: Final = 101
RESAMPLES: Final = 200
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
class Band:
    """Accuracy at `escalated` [k], with the interval in which it lies at 95 %."""

    escalated: Floats
    accuracy: Floats
    low: Floats
    high: Floats


def band(score: Floats, edge: Floats, cloud: Floats, points: int = POINTS, seed: int = 0) -> Band:
    """The curve with its interval over resampled requests [n]."""
    at = np.linspace(0.0, 1.0, points)
    random = np.random.default_rng(seed)
    draws = [random.integers(len(score), size=len(score)) for _ in range(RESAMPLES)]
    curves = [_at(deferral_curve(score[rows], edge[rows], cloud[rows]), at) for rows in draws]
    low, high = np.quantile(curves, [0.025, 0.975], axis=0)
    return Band(at, _at(deferral_curve(score, edge, cloud), at), low, high)


def plot(title: str, curves: Mapping[str, Curve], shaded: Band | None, escalated: float | None) -> str:
    """An SVG document. `shaded` belongs to the first curve, `escalated` is where its threshold stands."""
    at = np.linspace(0.0, 1.0, POINTS)
    named = {
        name + ("" if curve.apgr is None else f", APGR {curve.apgr:.2f}"): _at(curve, at)
        for name, curve in curves.items()
    }
    return lines(title, at, named, "accuracy (up) by share sent to the cloud (across)", shaded, escalated)


def lines(
    title: str,
    at: Floats,
    heights: Mapping[str, Floats],
    caption: str,
    shaded: Band | None = None,
    mark: float | None = None,
) -> str:
    """An SVG document of lines over `at` [k], shares 0..1. `shaded` belongs to the first, `mark` is a place to see."""
    values = np.concatenate(list(heights.values()))
    least, most = float(values.min()), float(values.max())
    span = max(most - least, 0.01)
    least, most = least - 0.05 * span, most + 0.05 * span

    def x(share: float) -> float:
        return LEFT + share * WIDTH

    def y(height: float) -> float:
        return TOP + (most - height) / (most - least) * HEIGHT

    def points(across: Floats, up: Floats) -> str:
        return " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in zip(across, up, strict=True))

    width, height = LEFT + WIDTH + RIGHT, TOP + HEIGHT + LOW
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        f"<style>{STYLE}</style>",
        f'<text class="title" x="{LEFT}" y="20">{escape(title)}</text>',
        *_grid(least, most, caption, x, y),
    ]
    if shaded is not None:
        around = f"{points(shaded.escalated, shaded.high)} {points(shaded.escalated[::-1], shaded.low[::-1])}"
        parts.append(f'<polygon class="band" fill="{COLOURS[0]}" points="{around}"/>')
    for number, (name, line) in enumerate(heights.items()):
        colour = COLOURS[number % len(COLOURS)]
        place = TOP + 14 + 20 * number
        parts.append(f'<polyline class="line" stroke="{colour}" points="{points(at, line)}"/>')
        parts.append(f'<text x="{LEFT + WIDTH + 10}" y="{place}" style="fill: {colour}">{escape(name)}</text>')
    if mark is not None:
        parts.append(f'<path class="mark" d="M{x(mark):.1f} {TOP}v{HEIGHT}"/>')
    return "\n".join([*parts, "</svg>", ""])


def _grid(
    least: float, most: float, caption: str, x: Callable[[float], float], y: Callable[[float], float]
) -> Iterator[str]:
    bottom = TOP + HEIGHT
    for tenth in range(0, 11, 2):
        place = x(tenth / 10)
        yield f'<path class="grid" d="M{place:.1f} {TOP}V{bottom}"/>'
        yield f'<text class="quiet" x="{place:.1f}" y="{bottom + 18}" text-anchor="middle">{tenth * 10} %</text>'
    for accuracy in np.linspace(least, most, 5):
        place = y(accuracy)
        yield f'<path class="grid" d="M{LEFT} {place:.1f}h{WIDTH}"/>'
        yield f'<text class="quiet" x="{LEFT - 6}" y="{place + 4:.1f}" text-anchor="end">{accuracy:.3f}</text>'
    yield f'<text class="quiet" x="{LEFT}" y="{bottom + 38}">{escape(caption)}</text>'


def _at(curve: Curve, shares: Floats) -> Floats:
    return np.interp(shares, curve.escalated, curve.accuracy)
