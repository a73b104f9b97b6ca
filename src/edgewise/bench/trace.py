"""Perfetto traces (.pftrace): spans on tracks and counters, written and read as track events.

The format is the protobuf `perfetto.protos.Trace` of google/perfetto, docs/reference/synthetic-track-event.md. The
`perfetto` package brings its classes; its trace processor, a program of its own, is not needed here.
"""

from __future__ import annotations

import errno
import importlib
import os
import zlib
from collections import Counter as Tally
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgewise.errors import MissingExtra, UsageError

SEQUENCE = 1  # all packets come from one writer
PROCESS = 1  # uuid of the process track; the other tracks count on from there
SEQUENCE_CLOCKS = 64  # clock ids from here on belong to one packet sequence
MOST_OPEN = 4096  # slices open at once on one track of a file that we read
MOST_INFLATED = 512 << 20  # bytes of all its compressed packets


@dataclass(frozen=True, slots=True)
class Span:
    """Something with a beginning and an end, in nanoseconds of one clock, and what is to be said about it."""

    start_ns: int
    end_ns: int
    name: str
    facts: Mapping[str, int | float | str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Track:
    """A row of the viewer. Its spans lie beside or within each other."""

    name: str
    spans: Sequence[Span]


@dataclass(frozen=True, slots=True)
class Counter:
    """A value over time: (nanoseconds, value), each valid until the next."""

    name: str
    points: Sequence[tuple[int, int]]
    unit: str = ""


def library() -> Any:
    """The protobuf classes of Perfetto; MissingExtra without the package."""
    try:
        return importlib.import_module("perfetto.protos.perfetto.trace.perfetto_trace_pb2")
    except ImportError as error:
        raise MissingExtra("perfetto", "profile") from error


def check_place(path: Path) -> None:
    """Whether `write` can put a trace there, tried out without a trace. UsageError if the path cannot be that of a
    file, OSError with the path if the system refuses it."""
    if path.is_dir():
        raise UsageError(f"{path} is a directory; a trace is a file", hint=f"name one in it: {path / 'out.pftrace'}")
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is no regular file, and a trace replaces what is there", hint="name another file")
    if not path.parent.is_dir():
        raise UsageError(f"{path} cannot be written: there is no directory {path.parent}", hint="make it first")
    with _named(path):
        part = _part(path)
        part.touch()
        part.unlink()


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """The system's refusals tell of the user's file, not of the one that we write first."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")


def write(path: Path, process: str, tracks: Iterable[Track], counters: Iterable[Counter] = ()) -> None:
    """A trace of one process, whole or not at all. Time zero is the earliest moment in it. As `check_place` if it
    cannot be written."""
    check_place(path)
    tracks, counters = list(tracks), list(counters)
    starts = [span.start_ns for track in tracks for span in track.spans]
    zero = min([*starts, *(at for counter in counters for at, _ in counter.points)], default=0)
    part = _part(path)
    try:
        with _named(path):
            with part.open("wb") as file:
                writer = _Writer(file, library(), zero)
                writer.process(process)
                for track in tracks:
                    writer.track(track)
                for counter in counters:
                    writer.counter(counter)
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def nested(spans: Iterable[Span]) -> Iterator[tuple[int, Span | None]]:
    """Begins (time, span) and ends (time, None) in the order of time, properly nested. A span that outlives the one it
    began in is cut there: clocks of different grain differ by a microsecond."""
    ends: list[int] = []
    for span in sorted(spans, key=lambda span: (span.start_ns, -span.end_ns)):
        while ends and ends[-1] <= span.start_ns:
            yield ends.pop(), None
        yield span.start_ns, span
        ends.append(min(span.end_ns, ends[-1]) if ends else span.end_ns)
    while ends:
        yield ends.pop(), None


class _Writer:
    """Packets into a file, one after the other. Names are written once and then named by number."""

    def __init__(self, file: Any, protos: Any, zero: int) -> None:
        self._file, self._protos, self._zero = file, protos, zero
        self._names: dict[str, int] = {}
        self._uuid = PROCESS
        self._fresh = True

    def process(self, name: str) -> None:
        packet = self._packet()
        packet.track_descriptor.uuid = PROCESS
        packet.track_descriptor.process.pid = os.getpid()
        packet.track_descriptor.process.process_name = name
        self._write(packet)

    def track(self, track: Track) -> None:
        uuid = self._describe(track.name)
        for at, span in nested(track.spans):
            self._event(uuid, at, span)

    def counter(self, counter: Counter) -> None:
        uuid = self._describe(counter.name, counter)
        for at, value in counter.points:
            packet = self._packet(at)
            packet.track_event.type = self._protos.TrackEvent.TYPE_COUNTER
            packet.track_event.track_uuid = uuid
            packet.track_event.counter_value = value
            self._write(packet)

    def _describe(self, name: str, counter: Counter | None = None) -> int:
        self._uuid += 1
        packet = self._packet()
        descriptor = packet.track_descriptor
        descriptor.uuid, descriptor.parent_uuid, descriptor.name = self._uuid, PROCESS, name
        descriptor.sibling_order_rank = self._uuid
        if counter is not None:
            descriptor.counter.unit_name = counter.unit
        self._write(packet)
        return self._uuid

    def _event(self, uuid: int, at: int, span: Span | None) -> None:
        packet = self._packet(at)
        event = packet.track_event
        event.track_uuid = uuid
        if span is None:
            event.type = self._protos.TrackEvent.TYPE_SLICE_END
        else:
            event.type = self._protos.TrackEvent.TYPE_SLICE_BEGIN
            event.name_iid = self._number(packet, span.name)
            for name, value in span.facts.items():
                _annotate(event.debug_annotations.add(), name, value)
        self._write(packet)

    def _number(self, packet: Any, name: str) -> int:
        if name not in self._names:
            self._names[name] = len(self._names) + 1
            packet.interned_data.event_names.add(iid=self._names[name], name=name)
        return self._names[name]

    def _packet(self, at: int | None = None) -> Any:
        flags = self._protos.TracePacket
        packet = self._protos.TracePacket(trusted_packet_sequence_id=SEQUENCE)
        packet.sequence_flags = flags.SEQ_NEEDS_INCREMENTAL_STATE
        if self._fresh:
            packet.sequence_flags |= flags.SEQ_INCREMENTAL_STATE_CLEARED
            self._fresh = False
        if at is not None:
            packet.timestamp = at - self._zero
        return packet

    def _write(self, packet: Any) -> None:
        self._file.write(self._protos.Trace(packet=[packet]).SerializeToString())


def _annotate(annotation: Any, name: str, value: int | float | str) -> None:
    annotation.name = name
    if isinstance(value, str):
        annotation.string_value = value
    elif isinstance(value, int):
        annotation.int_value = value
    else:
        annotation.double_value = value


@dataclass(frozen=True, slots=True)
class Trace:
    """The tracks that hold slices, in order of first appearance, and how much of what the file holds is not in them."""

    tracks: list[Track]
    left_out: dict[str, int]


def read(data: bytes) -> Trace:
    """Track events, and what Android apps print through atrace in ftrace events. UsageError if the bytes are no trace
    or are compressed as cannot be read, MissingExtra without the perfetto package."""
    reader = _Reader(library())
    reader.take_all(data)
    return reader.trace()


class _Reader:
    """Begins and ends out of packets, then slices out of those. Names and clocks hold for a packet sequence, until it
    clears its state."""

    def __init__(self, protos: Any) -> None:
        self._protos, self._types = protos, protos.TrackEvent
        self._cleared = protos.TracePacket.SEQ_INCREMENTAL_STATE_CLEARED
        self._names: dict[int, dict[int, str]] = defaultdict(dict)  # sequence -> number -> name
        self._labels: dict[object, str] = {}
        self._defaults: dict[int, Any] = {}  # sequence -> what its packets mean when they say nothing
        self._clocks: dict[tuple[int, int], tuple[int, int, bool]] = {}  # -> (time, ns per unit, counts from the last)
        self._moments: list[tuple[int, object, str | None]] = []  # (time, track, name of what begins, None: it ends)
        self._left_out: Tally[str] = Tally()
        self._room = MOST_INFLATED

    def take_all(self, data: bytes, *, inflated: bool = False) -> None:
        try:
            packets = self._protos.Trace.FromString(data).packet
        except Exception as error:  # protobuf's own class differs from one implementation to the next
            raise UsageError(f"this is not a Perfetto trace: {error}") from error
        for packet in packets:
            if packet.HasField("zstd_compressed_packets"):
                raise UsageError("this trace has packets compressed with zstd", hint="record with deflate or without")
            if not packet.HasField("compressed_packets"):
                self._take(packet)
            elif inflated:
                raise UsageError("this trace has compressed packets within compressed packets")
            else:
                self.take_all(self._inflated(packet.compressed_packets), inflated=True)

    def _inflated(self, data: bytes) -> bytes:
        """A few bytes may stand for gigabytes, so no more than there is room for is made of them."""
        inflater = zlib.decompressobj()
        try:
            packets = inflater.decompress(data, self._room + 1)
        except zlib.error as error:
            raise UsageError(f"this trace has compressed packets that are damaged: {error}") from error
        self._room -= len(packets)
        if self._room < 0:
            raise UsageError(f"the compressed packets of this trace hold more than {MOST_INFLATED} bytes")
        if not inflater.eof:
            raise UsageError("this trace has compressed packets that are cut off")
        return packets

    def _take(self, packet: Any) -> None:
        sequence = packet.trusted_packet_sequence_id
        if packet.sequence_flags & self._cleared:
            self._names.pop(sequence, None)
        if packet.HasField("trace_packet_defaults"):
            self._defaults[sequence] = packet.trace_packet_defaults
        for entry in packet.interned_data.event_names:
            self._names[sequence][entry.iid] = entry.name
        if packet.HasField("clock_snapshot"):
            self._set_clocks(sequence, packet.clock_snapshot)
        elif packet.HasField("track_descriptor"):
            self._describe(packet.track_descriptor)
        elif packet.HasField("track_event"):
            self._track_event(sequence, self._time(sequence, packet), packet.track_event)
        elif packet.HasField("ftrace_events"):
            for event in packet.ftrace_events.event:
                if event.HasField("print"):
                    self._print(event.pid, event.timestamp, event.print.buf)

    def trace(self) -> Trace:
        """Ftrace events lie in the file by processor; only in the order of time do they nest."""
        spans: dict[object, list[Span]] = {}
        opened: dict[object, list[tuple[int, str]]] = defaultdict(list)
        for at, track, name in sorted(self._moments, key=lambda moment: moment[0]):
            if name is not None:
                if len(opened[track]) >= MOST_OPEN:
                    raise UsageError(f"this trace has more than {MOST_OPEN} slices open at once on one track")
                opened[track].append((at, name))
            elif opened[track]:
                start, begun = opened[track].pop()
                spans.setdefault(track, []).append(Span(start, at, begun))
            else:
                self._left_out["slices that began before the recording"] += 1
        self._left_out["slices that the recording does not see end"] = sum(map(len, opened.values()))
        tracks = [Track(self._labels.get(track, str(track)), found) for track, found in spans.items()]
        return Trace(tracks, {what: count for what, count in self._left_out.items() if count})

    def _set_clocks(self, sequence: int, snapshot: Any) -> None:
        for clock in snapshot.clocks:
            if clock.clock_id >= SEQUENCE_CLOCKS:
                unit = clock.unit_multiplier_ns or 1
                self._clocks[sequence, clock.clock_id] = clock.timestamp * unit, unit, clock.is_incremental

    def _time(self, sequence: int, packet: Any) -> int:
        """Nanoseconds. A sequence may count in larger units, or from its packet before."""
        defaults = self._defaults.get(sequence)
        clock = packet.timestamp_clock_id or (defaults.timestamp_clock_id if defaults is not None else 0)
        key = sequence, clock
        if key not in self._clocks:
            return int(packet.timestamp)
        last, unit, incremental = self._clocks[key]
        at = int(packet.timestamp) * unit + (last if incremental else 0)
        self._clocks[key] = at, unit, incremental
        return at

    def _describe(self, descriptor: Any) -> None:
        name = descriptor.name or descriptor.thread.thread_name or descriptor.process.process_name
        if name:
            self._labels[descriptor.uuid] = name

    def _track_event(self, sequence: int, at: int, event: Any) -> None:
        defaults = self._defaults.get(sequence)
        track = event.track_uuid or (defaults.track_event_defaults.track_uuid if defaults is not None else 0)
        if event.type == self._types.TYPE_SLICE_BEGIN:
            name = event.name or self._names[sequence].get(event.name_iid, "")
            self._moments.append((at, track, name))
        elif event.type == self._types.TYPE_SLICE_END:
            self._moments.append((at, track, None))
        elif event.type == self._types.TYPE_UNSPECIFIED and event.HasField("legacy_event"):
            self._left_out["track events of the legacy form"] += 1

    def _print(self, thread: int, at: int, text: str) -> None:
        """What atrace writes: `B|process|name` and `E|process` for slices of a thread; `S|process|name|cookie` and
        `F|…`, `G|process|track|name|cookie` and `H|process|track|cookie` for those that may end in another one."""
        kind, *fields = text.rstrip("\n\0").split("|")
        if kind == "B":
            self._moments.append((at, f"thread {thread}", "|".join(fields[1:])))
        elif kind == "E":
            self._moments.append((at, f"thread {thread}", None))
        elif kind in ("S", "F", "G", "H"):
            self._asynchronous(kind, at, fields)

    def _asynchronous(self, kind: str, at: int, fields: list[str]) -> None:
        """Each on a track of its own: only the cookie tells which end is whose."""
        row_at = 3 if kind == "G" or (kind == "H" and len(fields) > 3) else 2
        if len(fields) <= row_at or not fields[1]:
            self._left_out["asynchronous slices without a name or cookie"] += 1
            return
        process, row, cookie = fields[0], fields[1], fields[row_at]
        track = ("G" if kind in "GH" else "S", process, row, cookie)
        self._labels[track] = f"{row} (process {process})"
        begins = {"S": row, "G": fields[2]}
        self._moments.append((at, track, begins.get(kind)))
