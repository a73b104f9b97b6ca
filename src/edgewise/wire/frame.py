"""Frames between an edge and the worker that holds the rest of its model's layers: docs/formats/frames.md."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, TypeVar

import msgspec
import numpy as np

from edgewise.errors import BadFrame
from edgewise.types import Best

VERSION: Final = 1
MAGIC: Final = b"EW"
HEADER: Final = struct.Struct("<2sBBQIIHHBBBBIII")
CHECKED: Final = HEADER.size - 4  # bytes of the header that the checksum covers
JSON_LIMIT: Final = 4096
ROWS_LIMIT: Final = 16 << 20
MOST_ROWS: Final = 1024
MOST_BEST: Final = 20
FRAME_LIMIT: Final = HEADER.size + ROWS_LIMIT
TOKEN: Final = np.dtype([("id", "<u4"), ("logprob", "<f4")])

Bytes = bytes | bytearray | memoryview


class Kind(IntEnum):
    HELLO = 1
    WELCOME = 2
    OPEN = 3
    OPENED = 4
    ROWS = 5
    TOKENS = 6
    HIDDEN = 7
    HELD = 8
    CLOSE = 9
    ERROR = 10


LIMITS: Final = {
    Kind.HELLO: JSON_LIMIT,
    Kind.WELCOME: JSON_LIMIT,
    Kind.OPEN: JSON_LIMIT,
    Kind.OPENED: 0,
    Kind.ROWS: ROWS_LIMIT,
    Kind.TOKENS: MOST_ROWS * MOST_BEST * TOKEN.itemsize,
    Kind.HIDDEN: ROWS_LIMIT,
    Kind.HELD: 0,
    Kind.CLOSE: 0,
    Kind.ERROR: JSON_LIMIT,
}


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame; the fields are those of the header. `payload` is not copied out of the message it came in."""

    kind: Kind
    session: int = 0
    epoch: int = 0
    position: int = 0
    rows: int = 0
    want: int = 0
    codec: int = 0
    best: int = 0
    back: int = 0
    micros: int = 0
    payload: Bytes = b""


class Hello(msgspec.Struct, frozen=True):
    """What an edge says first. Keys that it does not know a reader passes over: an older one may be asked."""

    model: str
    weights: str
    numerics: str


class Welcome(msgspec.Struct, frozen=True):
    """`layers` are first and end, the end excluded."""

    layers: tuple[int, int]
    numerics: str
    context: int
    slots: int


class Open(msgspec.Struct, frozen=True):
    limit: int
    cut: int


class Refusal(msgspec.Struct, frozen=True):
    """What an ERROR holds."""

    code: str
    message: str


Body = TypeVar("Body", Hello, Welcome, Open, Refusal)


def pack(frame: Frame) -> bytes:
    """The bytes of a frame."""
    start = HEADER.pack(
        MAGIC,
        VERSION,
        frame.kind,
        frame.session,
        frame.epoch,
        frame.position,
        frame.rows,
        frame.want,
        frame.codec,
        frame.best,
        frame.back,
        0,
        frame.micros,
        len(frame.payload),
        0,
    )[:CHECKED]
    crc = zlib.crc32(frame.payload, zlib.crc32(start))
    return b"".join((start, crc.to_bytes(4, "little"), frame.payload))


def unpack(message: Bytes) -> Frame:
    """The frame of one message. BadFrame where it breaks a rule of the format, with what it says and what is allowed;
    nothing is allocated for it then."""
    if len(message) < HEADER.size:
        raise BadFrame(f"a message of {len(message)} bytes; a frame has {HEADER.size} and more")
    magic, version, number, session, epoch, position, rows, want, codec, best, back, zero, micros, length, crc = (
        HEADER.unpack_from(message)
    )
    if magic != MAGIC:
        raise BadFrame(f"a message that begins with {magic!r}; frames begin with {MAGIC!r}")
    if version != VERSION:
        raise BadFrame(f"a frame of version {version}; this side speaks version {VERSION}", code="version")
    if number not in LIMITS:
        raise BadFrame(f"a frame of the unknown kind {number}; there are 1 to {max(Kind)}")
    kind = Kind(number)
    if length > LIMITS[kind]:
        raise BadFrame(f"a {kind.name} of {length} bytes; at most {LIMITS[kind]} are allowed")
    if len(message) != HEADER.size + length:
        raise BadFrame(f"a message of {len(message)} bytes whose frame has {HEADER.size + length}")
    if rows > MOST_ROWS or want > rows or best > MOST_BEST or zero:
        raise BadFrame(
            f"a {kind.name} of {rows} rows of which {want} are wanted, {best} tokens each, and {zero}; allowed are up "
            f"to {MOST_ROWS} rows, as many of them, {MOST_BEST} tokens, and 0"
        )
    view = memoryview(message)
    payload = view[HEADER.size :]
    if zlib.crc32(payload, zlib.crc32(view[:CHECKED])) != crc:
        raise BadFrame(f"a {kind.name} whose checksum is wrong: it was damaged on its way")
    return Frame(kind, session, epoch, position, rows, want, codec, best, back, micros, payload)


def write_body(body: Hello | Welcome | Open | Refusal) -> bytes:
    return msgspec.json.encode(body)


def read_body(frame: Frame, kind: type[Body]) -> Body:
    """What the JSON of a frame says; BadFrame if it says something else."""
    try:
        return msgspec.json.decode(frame.payload, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise BadFrame(f"a {frame.kind.name} that cannot be read: {e}") from e


def write_best(best: Best) -> bytes:
    """The payload of TOKENS."""
    table = np.empty(best.ids.shape, TOKEN)
    table["id"], table["logprob"] = best.ids, best.logprobs
    return table.tobytes()


def read_best(frame: Frame) -> Best:
    """The tokens of a TOKENS. BadFrame if there are not `want` times `best` of them, or if one cannot be."""
    if len(frame.payload) != frame.want * frame.best * TOKEN.itemsize or not frame.best:
        raise BadFrame(f"{len(frame.payload)} bytes for {frame.want} times {frame.best} tokens of {TOKEN.itemsize}")
    table = np.frombuffer(frame.payload, TOKEN).reshape(frame.want, frame.best)
    if not (table["logprob"] <= 0).all():
        raise BadFrame("a token whose log-probability is above 0 or no number")
    return Best(table["id"].astype(np.int64), table["logprob"].astype(np.float32))


def rows_of(frame: Frame, row_bytes: int) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """The rows of a ROWS or the wanted ones of a HIDDEN, uint8 [n, row_bytes]; BadFrame if they are not as long."""
    count = frame.rows if frame.kind == Kind.ROWS else frame.want
    if not count or len(frame.payload) != count * row_bytes:
        raise BadFrame(f"{len(frame.payload)} bytes for {count} rows of {row_bytes}")
    return np.frombuffer(frame.payload, np.uint8).reshape(count, row_bytes)
