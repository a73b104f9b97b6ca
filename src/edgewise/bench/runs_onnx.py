"""What onnxruntime's own profiler records of the graphs of a bundle."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

from edgewise.bench.importers.onnxruntime import KERNEL, Event, events, runs
from edgewise.bench.runs import GraphRun, Operator, Recording, Time, now
from edgewise.engines import onnx_lm, onnx_process
from edgewise.models.bundle import Bundle


@contextmanager
def recording(bundle: Bundle) -> Iterator[Recording]:
    with TemporaryDirectory() as directory, onnx_lm.profiling(Path(directory)) as profile:
        yield _Onnxruntime(profile)


class _Onnxruntime(Recording):
    timed = (
        "Graphs and operators are timed by onnxruntime's profiler, in whole microseconds; it slows down what it times, "
        "most of all small operators."
    )

    def __init__(self, profile: onnx_lm.Profile) -> None:
        self.runtime = f"onnxruntime {onnx_process.probe()[0]}"
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
