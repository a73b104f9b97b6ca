"""The profile that onnxruntime writes for a session with `enable_profiling`: Chrome trace events as one JSON array.

Source of the format: onnxruntime.ai/docs/performance/tune-performance/profiling-tools.html, the example
onnxruntime.ai/docs/api/python/auto_examples/plot_profiling.html, and what onnxruntime 1.32 writes in our own tests.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from edgewise.bench.importers.result import checked, dearest, decoded, imported, spread, total
from edgewise.bench.measure import Measurement
from edgewise.errors import UsageError

WHAT = "a profile of onnxruntime"
EVENT_LIMIT = 1_000_000  # onnxruntime drops what comes after
LOADING = ("model_loading_uri", "model_loading_array", "session_initialization")
KERNEL = "_kernel_time"


class Event(msgspec.Struct):
    """What we read of an event; times in microseconds since the session's own start."""

    cat: str
    name: str
    ts: float = 0
    dur: float = 0
    args: dict[str, Any] = {}

    @property
    def operator(self) -> str:
        return str(self.args.get("op_name", "unknown"))


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the session, and the operators in it."""

    whole: Event
    operators: list[Event]


def events(data: bytes) -> list[Event]:
    """UsageError for other JSON, and for a profile that was cut at onnxruntime's limit: what is missing from it would
    look like time saved."""
    found = decoded(data, list[Event], WHAT)
    if len(found) >= EVENT_LIMIT:
        raise UsageError(f"this profile has {len(found)} events; onnxruntime dropped the rest", hint="record less")
    return found


def runs(events: Iterable[Event]) -> list[Run]:
    """A run's operators stand before it."""
    found, operators = [], []
    for event in events:
        if event.cat == "Node" and event.name.endswith(KERNEL):
            operators.append(event)
        elif event.name == "model_run":
            found.append(Run(event, operators))
            operators = []
    return found


def read(data: bytes) -> Measurement:
    """Times of loading and of each run; of the operators, sums by type and provider over all runs."""
    everything = events(data)
    if not any(event.cat in ("Session", "Node") for event in everything):
        raise UsageError(f"this is not {WHAT}: no event is of the category Session or Node")
    results: dict[str, Any] = {}
    for event in everything:
        if event.name in LOADING:
            results[event.name] = spread([_ms(event)], "ms")
    found = runs(everything)
    if found:
        results["model_run"] = spread([_ms(run.whole) for run in found], "ms")
    times: dict[str, list[float]] = defaultdict(list)
    for run in found:
        for one in run.operators:
            times[f"{one.operator} ({one.args.get('provider', 'unknown')})"].append(_ms(one))
    results |= {f"operator {name}": total(took, "ms") for name, took in dearest(times).items()}
    return imported("onnxruntime", results)


def _ms(event: Event) -> float:
    return checked(event.dur, f"the duration of {event.name}") / 1000
