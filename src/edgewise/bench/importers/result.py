"""What the importers share: an imported Measurement, and figures of what a file holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any, Final, TypeVar

import msgspec

from edgewise.bench.measure import Measurement, figure
from edgewise.errors import UsageError

T = TypeVar("T")
UNKNOWN: Final = "unknown"
RAW_LIMIT: Final = 1000  # raw samples kept of one figure; of more, a summary
NAME_LIMIT: Final = 100  # names kept of one kind, the dearest first


def imported(
    tool: str,
    results: dict[str, Any],
    *,
    date: str | None = None,
    machine: dict[str, Any] | None = None,
    versions: dict[str, str] | None = None,
    settings: dict[str, Any] | None = None,
) -> Measurement:
    """A Measurement of what a tool measured somewhere else. UsageError if the file held no result."""
    if not results:
        raise UsageError(f"the {tool} file holds no result")
    nothing = dict.fromkeys(("cpu", "cores", "simd", "memory_bytes", "system", "python"))
    return Measurement(
        name=tool,
        command=UNKNOWN,
        date=date or UNKNOWN,
        machine=nothing | (machine or {}),
        versions=versions or {},
        settings={"imported_from": tool} | (settings or {}),
        results=results,
    )


def spread(samples: Sequence[float], unit: str) -> dict[str, Any]:
    """A figure; of very many samples only count, total, least, median and most."""
    if len(samples) <= RAW_LIMIT:
        return figure(samples, unit)
    return {
        "unit": unit,
        "count": len(samples),
        "total": sum(samples),
        "min": min(samples),
        "median": median(samples),
        "max": max(samples),
    }


def total(samples: Sequence[float], unit: str) -> dict[str, Any]:
    """How often and how much: for parts of a whole."""
    return {"unit": unit, "count": len(samples), "total": sum(samples)}


def dearest(times: dict[str, list[float]]) -> dict[str, list[float]]:
    """The names that took most, in that order."""
    return dict(sorted(times.items(), key=lambda item: -sum(item[1]))[:NAME_LIMIT])


def decoded(data: bytes, type: type[T], what: str) -> T:
    """JSON of that shape. UsageError if it is not."""
    try:
        return msgspec.json.decode(data, type=type)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"this is not {what}: {error}") from error


def checked(value: float, name: str) -> float:
    """A time or a speed; UsageError if it is none."""
    if not math.isfinite(value) or value < 0:
        raise UsageError(f"{name} is {value!r}; times and speeds are finite and not negative")
    return value
