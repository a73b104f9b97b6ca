"""Traces written and read back, through protobuf here; tests/bench/test_profile.py asks Perfetto's trace processor."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgewise.bench.trace import Counter, Span, Track, library, nested, read, write
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
    (track,) = read(path.read_bytes())
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
    (track,) = read(trace.SerializeToString())
    assert track == Track("thread 8", [Span(20, 30, "in|ner"), Span(10, 40, "outer")])


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
    assert read(trace.SerializeToString()) == [Track("9", [Span(105_000, 107_000, "infer")])]


def test_what_is_no_trace_or_never_ends_is_refused(protos: Any) -> None:
    with pytest.raises(UsageError, match="not a Perfetto trace"):
        read(b"\x0a\xff\xff\xff\xff")
    trace = protos.Trace()
    for at in range(5000):
        trace.packet.add(timestamp=at).track_event.type = protos.TrackEvent.TYPE_SLICE_BEGIN
    with pytest.raises(UsageError, match="open at once"):
        read(trace.SerializeToString())
