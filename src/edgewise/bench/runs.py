"""What a runtime records of itself: each run of each graph of a bundle, and the operators in it, on one clock."""

from __future__ import annotations

import importlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final

from edgewise.bench.trace import Span
from edgewise.engines.load import Chosen
from edgewise.models.bundle import Bundle

now = time.perf_counter_ns  # the clock of all spans


@dataclass(frozen=True, slots=True)
class Time:
    """From start to end, in nanoseconds of `now`."""

    start: int
    end: int

    @property
    def ms(self) -> float:
        return (self.end - self.start) / 1e6

    def span(self, name: str, **facts: int | float | str) -> Span:
        return Span(self.start, self.end, name, facts)


@dataclass(frozen=True, slots=True)
class Operator:
    time: Time
    type: str
    node: str


@dataclass(frozen=True, slots=True)
class GraphRun:
    """One run of one graph, and the operators in it."""

    graph: str
    time: Time
    operators: tuple[Operator, ...]


class Recording(ABC):
    runtime: str  # name and version
    timed: str  # how the times come about and what they cost, as a sentence

    @abstractmethod
    def finish(self) -> list[GraphRun]:
        """All runs since the recording began. To be called once, within it."""


# Imported when it is used: a profile of one runtime does not load the other.
RECORDERS: Final[dict[Chosen, str]] = {
    "native": "edgewise.bench.runs_native:recording",
    "onnxruntime": "edgewise.bench.runs_onnx:recording",
}


def recording(runtime: Chosen, bundle: Bundle) -> AbstractContextManager[Recording]:
    """Models of the bundle that are loaded within are recorded, for as long as it lasts."""
    module, attribute = RECORDERS[runtime].split(":")
    recorder: Callable[[Bundle], AbstractContextManager[Recording]]
    recorder = getattr(importlib.import_module(module), attribute)
    return recorder(bundle)
