"""A measured figure: its samples, their median, and how far to trust it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import median
from typing import Final

import msgspec

UNITS: Final = {"_bytes_per_s": "B/s", "_mac_per_s": "MAC/s", "_ms": "ms", "_s": "s"}  # by the end of a figure's name
CONFIDENCE: Final = 0.95


class Reading(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Samples in the order taken. The true median lies within `low` and `high` with 95 %; of fewer than six samples
    they are the least and the most, which is less sure."""

    unit: str
    samples: tuple[float, ...]
    median: float
    low: float
    high: float


def reading(name: str, samples: Iterable[float]) -> Reading:
    """The figure of that name, whose end says its unit, of one sample or more."""
    taken = tuple(float(f"{sample:.6g}") for sample in samples)
    ordered = sorted(taken)
    cut = _cut(len(ordered))
    unit = next(unit for end, unit in UNITS.items() if name.endswith(end))
    return Reading(unit, taken, median(ordered), ordered[cut], ordered[-1 - cut])


def _cut(count: int) -> int:
    """How many of the sorted samples can be left out at either end: that so many or fewer of them lie on one side of
    the true median is a matter of tossed coins."""
    cut, tail = 0, 0.5**count
    while tail + math.comb(count, cut + 1) * 0.5**count <= (1 - CONFIDENCE) / 2:
        cut += 1
        tail += math.comb(count, cut) * 0.5**count
    return cut
