"""Traces written and read back, through protobuf here; tests/bench/test_profile.py asks Perfetto's trace processor."""

from __future__ import annotations

import errno
import os
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgewise.bench.trace import Counter, Span, Track, check_place, library, nested, read, write
from edgewise.errors import MissingExtra, UsageError

pairs = st.tuples(st.integers(0, 50), st.integers(0, 50)).map(sorted)


@pytest.fixture
def protos() -> Any:
    pytest.importorskip("perfetto", reason="the extra edgewise[profile] is not installed")
    return library()


@given(st.lists(pairs))
def test_moments_come_in_order_and_nest(times: list[list[int]]) -> None:
    moments = list(nested(Span(start, end, "") for start, end in times))
    assert [at for at, _ in moments] == sorted(at for at, _ in moments)
    depth = 0
    for _, span in moments:
        depth += 1 if span is not None else -1
        assert depth >= 0
    assert depth == 0
    assert sum(span is not None for _, span in moments) == len(times)


def test_a_span_ends_with_the_one_it_began_in() -> None:
    outer, inner, after = Span(0, 10, "outer"), Span(4, 12, "inner"), Span(10, 11, "after")
    assert list(nested([inner, after, outer])) == [
        (0, outer),
        (4, inner),
        (10, None),
        (10, None),
        (10, after),
        (11, None),
    ]


def test_what_is_written_is_read_back(protos: Any, tmp_path: Path) -> None:
    spans = [Span(1000, 5000, "step", {"rows": 2, "kind": "decode", "ms": 0.5}), Span(2000, 2000, "empty")]
    path = tmp_path / "out.pftrace"
    write(path, "edgewise", [Track("model", spans)], [Counter("rows", [(1000, 3), (9000, 0)], "rows")])
    (track,) = read(path.read_bytes()).tracks
    assert track.name == "model"
    assert {(span.name, span.start_ns, span.end_ns) for span in track.spans} == {
        ("step", 0, 4000),
        ("empty", 1000, 1000),
    }
    packets = protos.Trace.FromString(path.read_bytes()).packet
    assert [p.track_event.counter_value for p in packets if p.track_event.type == protos.TrackEvent.TYPE_COUNTER] == [
        3,
        0,
    ]
    begun = next(packet.track_event for packet in packets if packet.track_event.debug_annotations)
    assert [(one.name, one.int_value or one.string_value or one.double_value) for one in begun.debug_annotations] == [
        ("rows", 2),
        ("kind", "decode"),
        ("ms", 0.5),
    ]


def test_a_failed_write_leaves_what_was_there(protos: Any, tmp_path: Path) -> None:
    path = tmp_path / "out.pftrace"
    path.write_text("before")
    with pytest.raises(TypeError):
        write(path, "edgewise", [Track("model", [Span(0, 1, "ok"), Span(1, 2, 3)])])  # type: ignore[arg-type]
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("out.pftrace", "before")]


@pytest.mark.parametrize(
    ("place", "why"),
    [
        ("folder", "folder is a directory; a trace is a file"),
        ("nowhere/out.pftrace", "there is no directory .*nowhere"),
        ("pipe", "pipe is no regular file"),
    ],
)
def test_a_place_for_no_trace_is_refused(place: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for tried in (check_place, lambda path: write(path, "edgewise", [])):
        with pytest.raises(UsageError, match=why):
            tried(tmp_path / place)
    assert {file.name for file in tmp_path.iterdir()} == {"folder", "pipe"}


def test_what_the_system_refuses_is_told_of_the_users_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(part: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(part))

    path = tmp_path / "out.pftrace"
    for method in ("touch", "open"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, method, refuse)
            with pytest.raises(PermissionError, match="Permission denied") as refused:
                write(path, "edgewise", [])
            assert refused.value.filename == str(path)
    with pytest.raises(OSError, match="name too long") as long:
        check_place(tmp_path / ("x" * 254))
    assert long.value.filename == str(tmp_path / ("x" * 254))
    check_place(path)
    assert not list(tmp_path.iterdir())


def test_without_perfetto_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "perfetto"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "perfetto", None)
    with pytest.raises(MissingExtra, match=r"pip install 'edgewise\[profile\]'"):
        write(tmp_path / "out.pftrace", "edgewise", [])
    assert not list(tmp_path.iterdir())


def test_prints_of_apps_nest_in_the_order_of_time(protos: Any) -> None:
    """As Android writes them: by processor, so not in order, with an end whose begin was before the recording."""
    trace = protos.Trace()
    for processor in ([(30, "E|7"), (40, "E|7")], [(5, "E|7"), (10, "B|7|outer"), (20, "B|7|in|ner"), (50, "C|7|n|1")]):
        bundle = trace.packet.add().ftrace_events
        for at, text in processor:
            bundle.event.add(timestamp=at, pid=8).print.buf = text + "\n"
    found = read(trace.SerializeToString())
    assert found.tracks == [Track("thread 8", [Span(20, 30, "in|ner"), Span(10, 40, "outer")])]
    assert found.left_out == {"slices that began before the recording": 1}


def test_asynchronous_prints_of_apps_are_told_apart_by_their_cookies(protos: Any) -> None:
    """As android.os.Trace.beginAsyncSection writes them: from any thread, overlapping."""
    trace = protos.Trace()
    bundle = trace.packet.add().ftrace_events
    for at, thread, text in (
        (10, 8, "S|7|load|1"),
        (20, 8, "S|7|load|2"),
        (25, 8, "S|6|load|2"),
        (30, 9, "F|7|load|1"),
        (50, 9, "F|7|load|2"),
        (60, 8, "G|7|queue|job|1"),
        (65, 8, "S|7|queue|1"),
        (70, 9, "H|7|queue|1"),
        (75, 8, "G|7|queue|job|2"),
        (80, 9, "H|7|queue|job|2"),
        (85, 9, "F|7|queue|1"),
        (90, 9, "F|7|gone|3"),
        (95, 9, "S|7|cut"),
        (96, 9, "S|7||5"),
        (97, 9, "I|7|instant"),
    ):
        bundle.event.add(timestamp=at, pid=thread).print.buf = text + "\n\0"
    found = read(trace.SerializeToString())
    spans = {(track.name, span.name, span.start_ns, span.end_ns) for track in found.tracks for span in track.spans}
    assert spans == {
        ("load (process 7)", "load", 10, 30),
        ("load (process 7)", "load", 20, 50),
        ("queue (process 7)", "job", 60, 70),
        ("queue (process 7)", "job", 75, 80),
        ("queue (process 7)", "queue", 65, 85),
    }
    assert found.left_out == {
        "slices that began before the recording": 1,
        "slices that the recording does not see end": 1,
        "asynchronous slices without a name or cookie": 2,
    }


def sliced(protos: Any) -> Any:
    """A trace of one slice."""
    trace = protos.Trace()
    for at, kind in ((5, protos.TrackEvent.TYPE_SLICE_BEGIN), (9, protos.TrackEvent.TYPE_SLICE_END)):
        packet = trace.packet.add(timestamp=at, trusted_packet_sequence_id=2)
        packet.track_event.type, packet.track_event.name, packet.track_event.track_uuid = kind, "infer", 3
    return trace


def test_compressed_packets_are_read(protos: Any) -> None:
    """As traced writes them with `compression_type: COMPRESSION_TYPE_DEFLATE`: any number of packets in one."""
    packed = protos.Trace()
    packed.packet.add().compressed_packets = zlib.compress(sliced(protos).SerializeToString())
    assert read(packed.SerializeToString()) == read(sliced(protos).SerializeToString())
    assert read(packed.SerializeToString()).tracks == [Track("3", [Span(5, 9, "infer")])]


def test_compressed_packets_that_cannot_be_read_are_refused(protos: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = zlib.compress(sliced(protos).SerializeToString())

    def refused(why: str, *contents: bytes, field: str = "compressed_packets") -> None:
        trace = protos.Trace()
        for content in contents:
            setattr(trace.packet.add(), field, content)
        with pytest.raises(UsageError, match=why):
            read(trace.SerializeToString())

    refused("damaged", b"x" + whole)
    refused("cut off", whole[:-3])
    refused("not a Perfetto trace", zlib.compress(b"\x0a\xff\xff\xff\xff"))
    refused("compressed with zstd.*deflate", whole, field="zstd_compressed_packets")
    nested = protos.Trace()
    nested.packet.add().compressed_packets = whole
    refused("within compressed packets", zlib.compress(nested.SerializeToString()))
    monkeypatch.setattr("edgewise.bench.trace.MOST_INFLATED", 1 << 20)
    refused("hold more than 1048576 bytes", *[zlib.compress(b"\x12\x00" * 300_000)] * 2)
    refused("hold more than 1048576 bytes", zlib.compress(bytes(1 << 27)))


def test_events_of_another_form_are_counted(protos: Any) -> None:
    trace = sliced(protos)
    trace.packet.add(timestamp=6).track_event.legacy_event.phase = ord("X")
    found = read(trace.SerializeToString())
    assert len(found.tracks) == 1
    assert found.left_out == {"track events of the legacy form": 1}


@pytest.mark.timeout(20)
def test_clearing_a_sequences_state_again_and_again_takes_no_longer_each_time(protos: Any) -> None:
    """20,000 of them took 9 seconds once, as each went over the names of all sequences."""
    trace = protos.Trace()
    many = trace.packet.add(trusted_packet_sequence_id=1).interned_data
    for number in range(1, 20_001):
        many.event_names.add(iid=number, name="n")
    for _ in range(100_000):
        trace.packet.add(trusted_packet_sequence_id=2, sequence_flags=1)
    for at, kind in ((1, protos.TrackEvent.TYPE_SLICE_BEGIN), (2, protos.TrackEvent.TYPE_SLICE_END)):
        packet = trace.packet.add(trusted_packet_sequence_id=1, timestamp=at)
        packet.track_event.type, packet.track_event.name_iid = kind, 20_000
    assert read(trace.SerializeToString()).tracks == [Track("0", [Span(1, 2, "n")])]


def test_a_sequence_may_count_time_from_its_packet_before(protos: Any) -> None:
    """As the Perfetto SDK writes it: microseconds, each after the last, and everything else by default."""
    trace = protos.Trace()
    first = trace.packet.add(trusted_packet_sequence_id=3)
    first.clock_snapshot.clocks.add(clock_id=64, timestamp=100, is_incremental=True, unit_multiplier_ns=1000)
    first.trace_packet_defaults.timestamp_clock_id = 64
    first.trace_packet_defaults.track_event_defaults.track_uuid = 9
    for at, kind in ((5, protos.TrackEvent.TYPE_SLICE_BEGIN), (2, protos.TrackEvent.TYPE_SLICE_END)):
        packet = trace.packet.add(trusted_packet_sequence_id=3, timestamp=at)
        packet.track_event.type, packet.track_event.name = kind, "infer"
    assert read(trace.SerializeToString()).tracks == [Track("9", [Span(105_000, 107_000, "infer")])]


def test_what_is_no_trace_or_never_ends_is_refused(protos: Any) -> None:
    with pytest.raises(UsageError, match="not a Perfetto trace"):
        read(b"\x0a\xff\xff\xff\xff")
    trace = protos.Trace()
    for at in range(5000):
        trace.packet.add(timestamp=at).track_event.type = protos.TrackEvent.TYPE_SLICE_BEGIN
    with pytest.raises(UsageError, match="open at once"):
        read(trace.SerializeToString())
