from __future__ import annotations

from contextlib import suppress
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgewise.errors import RemoteBroken
from edgewise.wire.sse import Decoder, Event, comment, event

# Lines and fragments of lines, so that every line end, comment, field and character gets cut somewhere.
PIECES = st.sampled_from(
    [
        b"data: one", b"data:two", b"data", b"data:  padded", b"event: error", b": comment", b"id: 7", b"unknown: x",
        b"\n", b"\r\n", b"\r", b"\n\n", b"\r\n\r\n", "日é👍".encode(), b"\xff\xfe", b":", b"\xef\xbb\xbf",
    ]
)  # fmt: skip


def decoded(*pieces: bytes, limit: int = 1 << 20) -> list[Event]:
    decoder = Decoder(limit=limit)
    return [event for piece in pieces for event in decoder.feed(piece)] + decoder.end()


@given(stream=st.lists(PIECES, max_size=30).map(b"".join), data=st.data())
def test_any_cut_gives_the_same_events(stream: bytes, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    pieces = [stream[start:end] for start, end in pairwise([0, *cuts, len(stream)])]
    assert decoded(*pieces) == decoded(stream)
    assert decoded(*(bytes([byte]) for byte in stream)) == decoded(stream)


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b"data: a\n\ndata: b\n\n", [Event(b"a"), Event(b"b")]),
        (b"data: a\r\n\r\ndata: b\r\r", [Event(b"a"), Event(b"b")]),
        (b"data: a\ndata: b\n\n", [Event(b"a\nb")]),
        (b": ping\n\ndata:a\n\n: ping\n\n", [Event(b"a")]),
        (b"event: error\ndata: {}\n\ndata: x\n\n", [Event(b"{}", "error"), Event(b"x")]),
        (b"data:  two spaces\n\n", [Event(b" two spaces")]),
        (b"data\n\n", [Event(b"")]),
        (b"event: lonely\n\ndata: x\n\n", [Event(b"x")]),
        (b"\xef\xbb\xbfdata: a\n\n", [Event(b"a")]),
        (b"data: [DONE]", [Event(b"[DONE]")]),
        (b"data: [DONE]\n", [Event(b"[DONE]")]),
        (b"", []),
    ],
)
def test_events_of_known_streams(stream: bytes, events: list[Event]) -> None:
    assert decoded(stream) == events


@given(st.lists(st.binary(max_size=50).filter(lambda data: b"\r" not in data and not data.startswith(b" "))))
def test_what_is_encoded_is_decoded(datas: list[bytes]) -> None:
    stream = comment("start") + b"".join(event(data) for data in datas)
    assert decoded(stream) == [Event(data) for data in datas]


@pytest.mark.parametrize("endless", [b"data: 0123456789\n", b"x", b"data:\n"])
def test_an_event_without_end_is_refused_before_it_fills_the_memory(endless: bytes) -> None:
    decoder = Decoder(limit=1000)
    taken = 0
    with suppress(RemoteBroken):
        for _ in range(10_000):
            decoder.feed(endless)
            taken += len(endless)
    assert 0 < taken <= 6000


def test_many_events_of_the_allowed_size_pass() -> None:
    assert len(decoded(*[event(b"x" * 900)] * 50, limit=1000)) == 50
