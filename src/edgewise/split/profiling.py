"""Measuring a profile (split/profile.py): what crosses at each cut, and the seconds of both halves."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from edgewise.devices.links import link_named
from edgewise.devices.machine import this_machine
from edgewise.engines.onnx_part import OnnxPart
from edgewise.errors import CodecOverflow, UsageError
from edgewise.models.graph import Graph
from edgewise.plan.mincut import sweep
from edgewise.split.halves import Halves, checked
from edgewise.split.profile import Coding, CutProfile, Profile, TensorProfile, UnitProfile
from edgewise.wire.feature import HEADER_BYTES, decode, encode

Array = npt.NDArray[Any]
Tensors = Mapping[str, Array]
Edge = frozenset[int]
Tell = Callable[[str], None]

CODECS: Final = ("fp16", "int8", "int6", "int4")
WIDEST: Final = 8  # tensors that cross
SLACK: Final = 1.5  # coded, more bytes may be fewer
ROUNDS: Final = 12
CODED: Final = 2  # times that each input's tensor is coded
QUIET: Final = 0.25  # the quantile of the rounds that counts
TOGETHER: Final = 12  # cuts whose halves are in memory at once
SLOWNESS: Final = (1.0, 3.0, 10.0)  # of an edge, for which cuts are proposed
JUDGED: Final = 4  # inputs that an error is made of


def profiled(
    graph: Graph,
    inputs: Sequence[Tensors],
    *,
    upload: Mapping[str, Coding] | None = None,
    codecs: Sequence[str] = CODECS,
    slack: float | None = SLACK,
    rounds: int = ROUNDS,
    tell: Tell = lambda doing: None,
) -> Profile:
    """The profile of a file on this machine: of the cuts along its order, and of those that min-cuts propose. Each of
    `inputs` is one request's, of the shapes that the graph was opened with; `upload` says what the cloud alone is sent
    in place of an input. Cuts where more than `slack` times as many bytes cross as at an earlier one are left out: the
    earlier one spares the link and a slow edge. With None there are all. Takes some twenty times as many runs of the
    whole file as there are cuts. UsageError without inputs."""
    if not inputs:
        raise UsageError("no inputs were given to measure with", hint="give a few that are like those to come")
    given = [checked(graph, one) for one in inputs]
    bench = _Bench(graph, given, codecs, rounds, tell)
    bench.measure(_promising(graph, slack))
    cuts = bench.cuts()
    machine = this_machine()
    first = Profile(
        model=graph.name,
        digest=graph.digest,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        machine={"cpu": machine.cpu, "cores": machine.cores, "system": machine.system},
        versions={library: version(library) for library in ("edgewise", "numpy", "onnxruntime")},
        inputs=len(inputs),
        upload=dict(upload or {}),
        units=_units(graph, cuts),
        tensors=bench.tensors(),
        cuts=tuple(cuts.values()),
        results=bench.results(),
    )
    bench.measure([edge for edge in _proposed(first) if edge not in cuts])
    cuts = bench.cuts()
    return msgspec.structs.replace(first, units=_units(graph, cuts), cuts=tuple(cuts.values()))


def _promising(graph: Graph, slack: float | None) -> list[Edge]:
    """The cuts along the file's order, both ends included."""
    found, least = [], float("inf")
    for edge, crossing in graph.chain(WIDEST):
        size = sum(graph.tensors[name].raw_bytes or 0 for name in crossing)
        if slack is None or not edge or not crossing or size <= slack * least:
            found.append(edge)
            least = min(least, size)
    return found


class _Bench:
    """A graph, the inputs that it is measured with, and what is the same for all cuts."""

    def __init__(self, graph: Graph, inputs: Sequence[Tensors], codecs: Sequence[str], rounds: int, tell: Tell) -> None:
        self._graph, self._inputs, self._codecs, self._rounds, self._tell = graph, inputs, codecs, rounds, tell
        self._whole = Halves(graph, frozenset())
        self._outputs = [self._whole.back(one) for one in inputs]
        self._whole_s = float("inf")
        self._shares: dict[Edge, tuple[float, float]] = {}  # of the whole file's time
        self._found: dict[Edge, CutProfile] = {}  # but for the times

    # Times

    def measure(self, edges: Sequence[Edge]) -> None:
        for start in range(0, len(edges), TOGETHER):
            halves = [Halves(self._graph, edge) for edge in edges[start : start + TOGETHER]]
            self._tell(f"cuts {start + 1} to {start + len(halves)} of {len(edges)}")
            for one, shares in zip(halves, self._take_turns(halves), strict=True):
                mask = f"{sum(1 << number for number in one.edge):x}"
                held = self._graph.weight_bytes(one.edge)
                self._shares[one.edge] = shares
                self._found[one.edge] = CutProfile(mask, one.crossing, 0.0, 0.0, held, self._errors(one))
                one.close()

    def cuts(self) -> dict[Edge, CutProfile]:
        """All that were measured so far. The whole file has one time, wherever it runs and whenever it was quickest."""
        return {
            edge: msgspec.structs.replace(cut, front_s=front * self._whole_s, back_s=back * self._whole_s)
            for edge, cut in self._found.items()
            for front, back in [self._shares[edge]]
        }

    def _take_turns(self, halves: Sequence[Halves]) -> list[tuple[float, float]]:
        """What share of the whole file's time the two halves of each take. All take turns, the whole file among them:
        what slows the machine down for a while slows all of them. What it does to a few rounds is left out."""
        calls = [self._whole.runs(self._inputs[0])[1], *(call for one in halves for call in one.runs(self._inputs[0]))]
        taken = [[_timed(call) for call in calls] for _ in range(self._rounds + 1)][1:]  # the first warms up
        whole_s, *seconds = (float(one) for one in np.quantile(taken, QUIET, axis=0))
        self._whole_s = min(self._whole_s, whole_s)
        ends = {frozenset[int](): (0.0, 1.0), frozenset(range(len(self._graph.units))): (1.0, 0.0)}
        pairs = zip(seconds[::2], seconds[1::2], strict=True)
        return [
            ends.get(one.edge, (front_s / whole_s, back_s / whole_s))
            for one, (front_s, back_s) in zip(halves, pairs, strict=True)
        ]

    # What crosses

    def tensors(self) -> tuple[TensorProfile, ...]:
        """Of all that may cross somewhere, and of the outputs; the file is run once an input for it."""
        graph = self._graph
        names = [one.name for one in graph.tensors.values() if one.dtype and (one.readers or one.name in graph.outputs)]
        self._tell(f"{len(names)} tensors")
        part = OnnxPart(graph.exposed(names))
        seen = [{**one, **part.run(one)} for one in self._inputs]
        part.close()
        return tuple(self._tensor(name, [one[name] for one in seen]) for name in names)

    def _tensor(self, name: str, values: Sequence[Array]) -> TensorProfile:
        tensor = self._graph.tensors[name]
        return TensorProfile(
            name,
            tensor.producer,
            tensor.readers,
            str(values[0].dtype),
            values[0].shape,
            values[0].nbytes,
            {codec: coding for codec in self._codecs if (coding := _coding(name, values, codec)) is not None},
        )

    def results(self) -> dict[str, float]:
        """Bytes of each output."""
        return {
            name: float(np.mean([len(encode({name: one[name]}, "exact")) - HEADER_BYTES for one in self._outputs]))
            for name in self._graph.outputs
        }

    def _errors(self, halves: Halves) -> dict[str, float]:
        """By codec, without those that cannot hold what crosses."""
        if not halves.crossing:
            return dict.fromkeys(self._codecs, 0.0)
        off = dict.fromkeys(self._codecs, 0.0)
        for given, outputs in zip(self._inputs[:JUDGED], self._outputs, strict=False):
            crossing, early = halves.front(given)
            for codec in tuple(off):
                try:
                    received = decode(encode(crossing, codec))
                except CodecOverflow:
                    del off[codec]
                    continue
                found = {**early, **halves.back(received)}
                off[codec] += sum(
                    float(((found[n] - exact.astype(np.float64)) ** 2).sum()) for n, exact in outputs.items()
                )
        spread = sum(
            float(((value - value.mean(dtype=np.float64)) ** 2).sum())
            for outputs in self._outputs[:JUDGED]
            for value in outputs.values()
        )
        return {codec: one / spread if spread else 0.0 for codec, one in off.items()}


def _timed(call: Callable[[], object] | None) -> float:
    if call is None:
        return 0.0
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _coding(name: str, values: Sequence[Array], codec: str) -> Coding | None:
    """None if the codec cannot hold them."""
    try:
        payloads = [encode({name: value}, codec) for value in values]
    except CodecOverflow:
        return None
    pairs = [*zip(values, payloads, strict=True)] * CODED
    encode_s = [_timed(partial(encode, {name: value}, codec)) for value, _ in pairs]
    decode_s = [_timed(partial(decode, payload)) for _, payload in pairs]
    return Coding(
        float(np.mean([len(payload) - HEADER_BYTES for payload in payloads])),
        float(np.quantile(encode_s, QUIET)),
        float(np.quantile(decode_s, QUIET)),
    )


# Units, and the cuts that they propose


def _units(graph: Graph, cuts: Mapping[Edge, CutProfile]) -> tuple[UnitProfile, ...]:
    """A unit's seconds are those by which front halves differ; units between two cuts share them. Only to propose cuts:
    what is chosen was measured."""
    counts = sorted(len(edge) for edge in cuts)
    ends_s = np.maximum.accumulate([cuts[frozenset(range(count))].front_s for count in counts])
    seconds = [0.0] * len(graph.units)
    for (first, last), (before_s, after_s) in zip(pairwise(counts), pairwise(ends_s), strict=True):
        for number in range(first, last):
            seconds[number] = float(after_s - before_s) / (last - first)
    return tuple(UnitProfile(unit.name, unit.operators, one) for unit, one in zip(graph.units, seconds, strict=True))


def _proposed(profile: Profile) -> list[Edge]:
    """The cuts that are the best by sums over some uplink, for some codec and slowness of the edge."""
    found: dict[Edge, None] = {}
    for codec in profile.codecs:
        for slow in SLOWNESS:
            table = sweep(profile.dag(codec, edge=slow), link_named("cable"))
            found |= dict.fromkeys(frozenset(map(int, way.edge)) for way in table.unmeasured)
    return list(found)
