"""Which range of a tensor its few integers are spread over, by what it held on calibration rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from edgewise.export.work.job import Array

Range = tuple[float, float]

SAMPLE: Final = 16384  # numbers of each tensor that its range is chosen by, over all rows
STEPS: Final = 32  # ranges that are tried
NARROWEST: Final = 0.2  # of the whole range


@dataclass(frozen=True, slots=True)
class Seen:
    """What a tensor held over the calibration rows: its ends, and some of its numbers."""

    least: float
    most: float
    sample: Array


def seen_of(value: Array, each: int, row: int) -> Seen:
    """Of one row, by its number, with `each` numbers for the sample."""
    flat = value.ravel()
    # by chance, and other ones in each row: else it would be the same channels and tokens again and again
    places = np.random.default_rng((flat.size, row)).integers(0, flat.size, each) if flat.size > each else slice(None)
    return Seen(float(flat.min()), float(flat.max()), flat[places].astype(np.float32))


def together(parts: Sequence[Seen]) -> Seen:
    sample = np.concatenate([one.sample for one in parts])
    return Seen(min(one.least for one in parts), max(one.most for one in parts), sample)


def fitted(seen: Seen, bits: int, *, symmetric: bool, whole: bool) -> Range:
    """The whole range, or the one in which rounding to so many bits costs the least squared error. In a convolution's
    inputs a few large numbers are not worth coarse steps for all others; in a transformer's they are: the cosine of
    all-MiniLM-L6-v2's embeddings is 0.87 with cut ranges, 0.988 with whole ones. All hold zero, as padding is zero."""
    low, high = min(seen.least, 0.0), max(seen.most, 0.0)
    if symmetric:
        high = max(high, -low)
        low = -high
    if whole or bits > 8 or high == low:
        return low, high
    best = low, high
    for ends in ((True, True),) if symmetric else ((True, True), (True, False), (False, True)):
        tried = [
            (best[0] * share if ends[0] else best[0], best[1] * share if ends[1] else best[1])
            for share in np.linspace(1, NARROWEST, STEPS)
        ]
        best = min(tried, key=lambda one: _cost(seen.sample, one, bits))
    return best


def _cost(sample: Array, ends: Range, bits: int) -> float:
    step = max(ends[1] - ends[0], 1e-12) / (2**bits - 1)
    near = np.rint(np.clip(sample, *ends) / step) * step
    return float(np.square(near - sample, dtype=np.float64).mean())
