"""What the importers share: an imported Measurement, and figures of what a file holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, Final, TypeVar

import msgspec

from edgewise.bench.measure import Measurement, figure
from edgewise.errors import UsageError

T = TypeVar("T")
UNKNOWN: Final = "unknown"
RAW_LIMIT: Final = 1000  # raw samples kept of one figure; of more, a summary
NAME_LIMIT: Final = 100  # names kept of one kind, the dearest first
MOST: Final = 1e18  # of any unit that occurs here; 30 years in nanoseconds


def imported(
    tool: str,
    results: dict[str, Any],
    *,
    date: str | None = None,
    machine: dict[str, Any] | None = None,
    versions: dict[str, str] | None = None,
    settings: dict[str, Any] | None = None,
    left_out: Mapping[str, int] | None = None,
) -> Measurement:
    """A Measurement of what a tool measured somewhere else. `left_out` counts what the file holds and the results do
    not. UsageError if the file held no result."""
    skipped = {what: count for what, count in (left_out or {}).items() if count}
    if not results:
        besides = "".join(f"; {count} {what} were left out" for what, count in skipped.items())
        raise UsageError(f"the {tool} file holds no result{besides}")
    nothing = dict.fromkeys(("cpu", "cores", "simd", "memory_bytes", "system", "python"))
    return Measurement(
        name=tool,
        command=UNKNOWN,
        date=date or UNKNOWN,
        machine=nothing | (machine or {}),
        versions=versions or {},
        settings={"imported_from": tool} | (settings or {}) | ({"left_out": skipped} if skipped else {}),
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
    """A time, a speed or a size; UsageError if it is none. What is finite but beyond all machines would overflow in
    sums and become null in JSON."""
    if not math.isfinite(value) or value < 0:
        raise UsageError(f"{name} is {value!r}; times, speeds and sizes are finite and not negative")
    if value > MOST:
        raise UsageError(f"{name} is {value!r}; no time, speed or size is above {MOST:.0e}")
    return value


def printable(text: str) -> str:
    """Names come from files that others made: what a terminal would obey is shown as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
