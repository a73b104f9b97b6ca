"""What a runtime records of itself: each run of each graph of a bundle, and the operators in it, on one clock."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from tempfile import TemporaryDirectory

from edgewise.bench.importers.onnxruntime import KERNEL, Event, events, runs
from edgewise.bench.trace import Span
from edgewise.engines import native_lm, onnx_lm
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


@contextmanager
def recording(runtime: Chosen, bundle: Bundle) -> Iterator[Recording]:
    """Models of the bundle that are loaded within are recorded, for as long as it lasts."""
    if runtime == "native":
        with native_lm.watching() as spans:
            yield _Native(bundle, spans)
    else:
        with TemporaryDirectory() as directory, onnx_lm.profiling(Path(directory)) as profile:
            yield _Onnxruntime(profile)


class _Native(Recording):
    timed = "Operators are timed by the kernels themselves, two readings of the clock each."

    def __init__(self, bundle: Bundle, spans: native_lm.Watch) -> None:
        self.runtime = f"native {native_lm.probe()}"
        self._spans, self._head = spans, Path(bundle.manifest.graphs.head).stem
        self._graphs = {
            layer: Path(block.file).stem
            for block in bundle.manifest.graphs.blocks
            for layer in range(block.first, block.last + 1)
        }

    def finish(self) -> list[GraphRun]:
        offset = now() - time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        found: list[GraphRun] = []
        spans = ((self._graphs.get(one.layer, self._head), one) for one in self._spans.finish())
        for graph, inside in groupby(spans, key=lambda pair: pair[0]):
            operators = tuple(_operator(one, offset) for _, one in inside)
            found += (_whole(graph, part) for part in _passes(operators))
        return found


def _operator(one: native_lm.Watched, offset: int) -> Operator:
    node = one.step if one.layer < 0 else f"layer{one.layer}.{one.step}"
    return Operator(Time(one.start + offset, one.end + offset), one.step, node)


def _passes(operators: tuple[Operator, ...]) -> Iterable[tuple[Operator, ...]]:
    """A model of one graph runs it again and again with nothing between: each pass begins with the first operator."""
    starts = [i for i, one in enumerate(operators) if one.node == operators[0].node]
    return (operators[start:end] for start, end in zip(starts, [*starts[1:], len(operators)], strict=True))


def _whole(graph: str, operators: tuple[Operator, ...]) -> GraphRun:
    return GraphRun(graph, Time(operators[0].time.start, operators[-1].time.end), operators)


class _Onnxruntime(Recording):
    timed = (
        "Graphs and operators are timed by onnxruntime's profiler, in whole microseconds; it slows down what it times, "
        "most of all small operators."
    )

    def __init__(self, profile: onnx_lm.Profile) -> None:
        self.runtime = f"onnxruntime {onnx_lm.probe()[0]}"
        self._profile = profile

    def finish(self) -> list[GraphRun]:
        return list(chain.from_iterable(graph_runs(*one) for one in self._profile.finish()))


def graph_runs(graph: str, zero_ns: int, path: Path) -> Iterator[GraphRun]:
    """The runs in onnxruntime's profile of one graph, on our clock."""
    zero = zero_ns + _offset(zero_ns)

    def timed(event: Event) -> Time:
        start = zero + int(event.ts) * 1000
        return Time(start, start + int(event.dur) * 1000)

    for run in runs(events(path.read_bytes())):
        operators = (Operator(timed(one), one.operator, one.name.removesuffix(KERNEL)) for one in run.operators)
        yield GraphRun(graph, timed(run.whole), tuple(operators))


def _offset(zero_ns: int) -> int:
    """From onnxruntime's clock to ours. Its high-resolution clock is the wall clock with one C++ library and the
    monotonic clock with another; the nearer one is it."""
    clock = min((time.time_ns, time.monotonic_ns), key=lambda clock: abs(clock() - zero_ns))
    return now() - clock()
