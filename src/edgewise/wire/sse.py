"""Server-sent events, without any input or output: bytes in, events out, and the other way round."""

from __future__ import annotations

import re
from dataclasses import dataclass

from edgewise.errors import RemoteBroken

EVENT_LIMIT = 4 << 20  # bytes; a chunk with 20 alternatives for each of its tokens stays far below

_LINE_END = re.compile(rb"\r\n|\r|\n")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Event:
    """One event; `name` is empty where the sender gave none."""

    data: bytes
    name: str = ""


def event(data: bytes) -> bytes:
    """The bytes of one event without a name."""
    return b"".join(b"data: %b\n" % line for line in _LINE_END.split(data)) + b"\n"


def comment(text: str) -> bytes:
    """A line that receivers skip: it keeps the connection from looking dead. No line break in `text`."""
    return b": %b\n\n" % text.encode()


class Decoder:
    """Events out of any byte pieces: where the pieces are cut makes no difference.

    A line ends with LF, CR or CRLF; `id` and `retry` mean nothing to us. RemoteBroken once a line or an event is
    longer than `limit` bytes; the decoder is of no use after that.
    """

    def __init__(self, *, limit: int = EVENT_LIMIT) -> None:
        self._limit = limit
        self._line = bytearray()  # of the line whose end has not come
        self._data: list[bytes] = []
        self._size = 0  # of the lines in _data, their ends included
        self._name = ""
        self._after_cr = False  # a LF that comes next belongs to the line end before it
        self._at_start = True

    def feed(self, piece: bytes) -> list[Event]:
        """The events that became complete with this piece."""
        if not piece:
            return []
        text = piece.removeprefix(b"\n") if self._after_cr else piece
        self._after_cr = piece.endswith(b"\r")
        *ended, rest = _LINE_END.split(text)
        events = []
        for line in ended:
            self._grow(line)
            if done := self._end_line():
                events.append(done)
        self._grow(rest)
        return events

    def end(self) -> list[Event]:
        """The event that the stream's end completes, if any: some senders leave out the last empty line."""
        last = self._end_line() or self._dispatch()
        return [last] if last else []

    def _grow(self, part: bytes) -> None:
        self._line += part
        if self._size + len(self._line) > self._limit:
            raise RemoteBroken(f"an event of the stream is longer than {self._limit} bytes")

    def _end_line(self) -> Event | None:
        line = bytes(self._line)
        self._line.clear()
        if self._at_start:
            line = line.removeprefix(_BYTE_ORDER_MARK)
            self._at_start = False
        if not line:
            return self._dispatch()
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            self._data.append(value)
            self._size += len(value) + 1
        elif field == b"event":
            self._name = value.decode("utf-8", "replace")
        return None

    def _dispatch(self) -> Event | None:
        data, name = self._data, self._name
        self._data, self._size, self._name = [], 0, ""
        return Event(b"\n".join(data), name) if data else None
