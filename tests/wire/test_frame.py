"""Frames: golden bytes, every rule of docs/formats/frames.md, and mutated ones in numbers."""

from __future__ import annotations

import os
import random
import re
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgewise.errors import BadFrame
from edgewise.types import Best
from edgewise.wire import frame as wire
from edgewise.wire.frame import Frame, Kind, Open, Refusal, Welcome, pack, unpack

PAGE = Path(__file__).parents[2] / "docs" / "formats" / "frames.md"
MUTATIONS = int(os.environ.get("EDGEWISE_TEST_MUTATIONS", "30000"))  # 1,000,000 with `pytest -m slow`

ROWS = Frame(Kind.ROWS, 0x0123456789ABCDEF, 7, 300, 2, 1, codec=2, best=3, back=1, payload=bytes(range(8)))
TOKENS = Frame(
    Kind.TOKENS, 1, 0, 5, 1, 1, best=1, micros=1234, payload=wire.write_best(Best(np.array([[17]]), np.array([[-0.5]])))
)
GOLDEN = {
    "45570105efcdab8967452301070000002c01000002000100020301000000000008000000667bb9070001020304050607": ROWS,
    "45570106010000000000000000000000050000000100010000010000d204000008000000c9a540cb11000000000000bf": TOKENS,
    "455701080900000000000000020000000001000000000000000000000f00000000000000523a0ad1": Frame(
        Kind.HELD, 9, 2, 256, micros=15
    ),
}


@pytest.mark.parametrize("number", range(3))
def test_golden_bytes(number: int) -> None:
    golden, frame = list(GOLDEN.items())[number]
    message = pack(frame)
    assert message.hex() == golden
    assert len(message) == 40 + len(frame.payload)
    assert int.from_bytes(message[36:40], "little") == zlib.crc32(message[:36] + message[40:])
    assert unpack(message) == Frame(**{f: getattr(frame, f) for f in frame.__slots__} | {"payload": message[40:]})


def test_the_page_names_every_kind_with_its_number() -> None:
    named = dict(re.findall(r"^\| (\d+) \| `([A-Z]+)` \|", PAGE.read_text(), re.MULTILINE))
    assert {int(number): name for number, name in named.items()} == {kind.value: kind.name for kind in Kind}


@given(
    kind=st.sampled_from(Kind),
    session=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 2**32 - 1),
    position=st.integers(0, 2**32 - 1),
    rows=st.integers(0, 1024),
    best=st.integers(0, 20),
    payload=st.binary(max_size=300),
    data=st.data(),
)
def test_what_is_packed_comes_back(
    kind: Kind, session: int, epoch: int, position: int, rows: int, best: int, payload: bytes, data: st.DataObject
) -> None:
    want = data.draw(st.integers(0, rows))
    payload = payload[: wire.LIMITS[kind]]
    frame = Frame(kind, session, epoch, position, rows, want, 3, best, 2, 99, payload)
    assert unpack(pack(frame)) == frame


def resealed(message: bytes, offset: int, value: bytes) -> bytes:
    """Other bytes at an offset of the header, with the checksum that they need."""
    changed = bytearray(message)
    changed[offset : offset + len(value)] = value
    changed[36:40] = zlib.crc32(changed[40:], zlib.crc32(changed[:36])).to_bytes(4, "little")
    return bytes(changed)


@pytest.mark.parametrize(
    ("offset", "value", "told", "code"),
    [
        (0, b"XX", "begins with b'XX'", "frame"),
        (2, b"\x02", "version 2; this side speaks version 1", "version"),
        (3, b"\x00", "unknown kind 0", "frame"),
        (3, b"\x0b", "unknown kind 11; there are 1 to 10", "frame"),
        (20, b"\x01\x04", "of 1025 rows", "frame"),
        (22, b"\x03\x00", "of which 3 are wanted", "frame"),
        (25, b"\x15", "21 tokens each", "frame"),
        (27, b"\x01", "allowed are", "frame"),
        (32, b"\x09", "whose frame has 49", "frame"),
        (32, b"\xff\xff\xff\xff", "4294967295 bytes; at most 16777216", "frame"),
    ],
)
def test_a_broken_rule_is_named_with_what_is_allowed(offset: int, value: bytes, told: str, code: str) -> None:
    with pytest.raises(BadFrame, match=re.escape(told)) as caught:
        unpack(resealed(pack(ROWS), offset, value))
    assert caught.value.code == code


def test_a_damaged_byte_is_found_wherever_it_is() -> None:
    message = pack(ROWS)
    for at in range(len(message)):
        for bit in range(8):
            damaged = bytearray(message)
            damaged[at] ^= 1 << bit
            with pytest.raises(BadFrame):
                unpack(damaged)


def test_a_frame_cut_short_or_followed_by_more_is_refused() -> None:
    message = pack(ROWS)
    for end in range(len(message)):
        with pytest.raises(BadFrame):
            unpack(message[:end])
    with pytest.raises(BadFrame):
        unpack(message + b"\0")


def test_a_large_length_allocates_nothing() -> None:
    message = resealed(pack(ROWS), 32, (16 << 20).to_bytes(4, "little"))
    tracemalloc.start()
    with pytest.raises(BadFrame):
        unpack(message)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000


@pytest.mark.parametrize(
    "payload",
    [b"", b"{}", b"[1]", b'{"limit": "many", "cut": 3}', b"\xff\xfe", b"[" * 4000, b'{"limit": 1e400, "cut": 1}'],
)
def test_json_that_says_something_else_is_refused(payload: bytes) -> None:
    with pytest.raises(BadFrame, match="OPEN that cannot be read"):
        wire.read_body(Frame(Kind.OPEN, 1, payload=payload), Open)


def test_json_with_keys_of_a_later_minor_is_read() -> None:
    body = b'{"layers": [10, 30], "numerics": "native", "context": 64, "slots": 4, "more": true}'
    assert wire.read_body(Frame(Kind.WELCOME, payload=body), Welcome) == Welcome((10, 30), "native", 64, 4)
    told = wire.write_body(Refusal("gap", "held"))
    assert wire.read_body(Frame(Kind.ERROR, payload=told), Refusal) == Refusal("gap", "held")


def test_tokens_come_back_and_impossible_ones_do_not() -> None:
    best = Best(np.array([[3, 1], [70000, 0]]), np.array([[-0.25, -2.0], [0.0, -np.inf]], np.float32))
    payload = wire.write_best(best)
    assert len(payload) == 8 * 4
    back = wire.read_best(Frame(Kind.TOKENS, rows=2, want=2, best=2, payload=payload))
    assert np.array_equal(back.ids, best.ids)
    assert np.array_equal(back.logprobs, best.logprobs)
    for bad in (Best(best.ids, best.logprobs + 1), Best(best.ids, best.logprobs * np.float32(np.nan))):
        with pytest.raises(BadFrame, match="log-probability"):
            wire.read_best(Frame(Kind.TOKENS, rows=2, want=2, best=2, payload=wire.write_best(bad)))
    with pytest.raises(BadFrame, match="32 bytes for 2 times 3"):
        wire.read_best(Frame(Kind.TOKENS, rows=2, want=2, best=3, payload=payload))


def test_rows_must_be_as_long_as_their_codec_makes_them() -> None:
    assert wire.rows_of(ROWS, 4).shape == (2, 4)
    for row_bytes in (3, 5, 8):
        with pytest.raises(BadFrame, match="8 bytes for 2 rows"):
            wire.rows_of(ROWS, row_bytes)


def mutate(count: int) -> None:
    """Frames of all kinds with bits turned, bytes changed, cut, doubled and joined; half of them with a checksum that
    is right again. Each is a frame that keeps the rules, or a BadFrame; nothing else comes out."""
    rng = random.Random(11)
    seeds = [pack(frame) for frame in (ROWS, TOKENS, Frame(Kind.HELD, 9, 2, 256))]
    seeds += [pack(Frame(kind, 5, 1, payload=wire.write_body(Open(64, 3)))) for kind in (Kind.HELLO, Kind.OPEN)]
    for _ in range(count):
        message = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(message)) if message else 0
            action = rng.randrange(5)
            if action == 0 and message:
                message[at] ^= 1 << rng.randrange(8)
            elif action == 1 and message:
                message[at] = rng.choice((0, 1, 127, 128, 255))
            elif action == 2:
                del message[at : at + rng.randint(1, 30)]
            elif action == 3:
                message[at:at] = rng.randbytes(rng.randint(1, 30))
            else:
                message += rng.choice(seeds)[: rng.randint(1, 50)]
        if len(message) >= 40 and rng.random() < 0.5:
            message[32:36] = (len(message) - 40).to_bytes(4, "little") if rng.random() < 0.8 else message[32:36]
            message[36:40] = zlib.crc32(message[40:], zlib.crc32(message[:36])).to_bytes(4, "little")
        try:
            frame = unpack(message)
        except BadFrame:
            continue
        assert frame.want <= frame.rows <= wire.MOST_ROWS
        assert len(frame.payload) <= wire.LIMITS[frame.kind]
        for read in (
            lambda frame=frame: wire.read_best(frame),
            lambda frame=frame: wire.rows_of(frame, 4),
            lambda frame=frame: wire.read_body(frame, Open),
        ):
            try:
                read()
            except BadFrame:
                continue


def bounded(count: int) -> None:
    tracemalloc.start()
    mutate(count)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_mutated_frames() -> None:
    bounded(MUTATIONS)


@pytest.mark.slow
def test_a_million_mutated_frames() -> None:
    bounded(1_000_000)
