"""Lines over a share as one SVG: above all a policy's accuracy beside its baselines, with its interval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from edgewise.evaluate.chart import Axis, Line, chart
from edgewise.evaluate.chart import Band as Between
from edgewise.evaluate.deferral import Curve, deferral_curve

Floats = npt.NDArray[np.float64]

POINTS: Final = 101
RESAMPLES: Final = 200
SHARES: Final = Axis(1.0, [(tenth / 10, f"{tenth * 10} %") for tenth in range(0, 11, 2)])


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
    return chart(
        title,
        {name: Line(at, up) for name, up in heights.items()},
        SHARES,
        caption,
        shaded=None if shaded is None else Between(shaded.escalated, shaded.low, shaded.high),
        mark=mark,
    )


def _at(curve: Curve, shares: Floats) -> Floats:
    return np.interp(shares, curve.escalated, curve.accuracy)
