"""What the native kernels record: the steps of each layer, and of the head."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

from edgewise.bench.runs import GraphRun, Operator, Recording, Time, now
from edgewise.engines import native_lm
from edgewise.models.bundle import Bundle


@contextmanager
def recording(bundle: Bundle) -> Iterator[Recording]:
    with native_lm.watching() as spans:
        yield _Native(bundle, spans)


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


def _passes(operators: tuple[Operator, ...]) -> Iterator[tuple[Operator, ...]]:
    """A model of one graph runs it again and again with nothing between: each pass, over the rows of however many
    sessions, begins with the first operator."""
    starts = [i for i, one in enumerate(operators) if one.node == operators[0].node]
    return (operators[start:end] for start, end in zip(starts, [*starts[1:], len(operators)], strict=True))


def _whole(graph: str, operators: tuple[Operator, ...]) -> GraphRun:
    return GraphRun(graph, Time(operators[0].time.start, operators[-1].time.end), operators)
