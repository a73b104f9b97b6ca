"""The file of a recording: rows are added in pieces, and a piece that a crash tore is cut off.

A `.gz` file is gzip members one behind the other, a piece each, which every reader of gzip takes as one file.
"""

from __future__ import annotations

import gzip
import os
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Literal

import msgspec

from edgewise.errors import UsageError
from edgewise.joint.pair import Pair
from edgewise.joint.replay import Row

Judge = Literal["gold", "teacher"]

GZIP: Final = 16 + zlib.MAX_WBITS  # as zlib says that a stream is gzip's
MAGIC: Final = b"\x1f\x8b"
OTHER: Final = "name another file, or remove this one"


class Recorded(Row, frozen=True, omit_defaults=True):
    """A row, and who judged it."""

    judge: Judge | None = None


class RecordFile:
    """UsageError if the file is there and `resume` is not, or if it is no replay. OSError where the disk fails."""

    def __init__(self, path: Path, *, resume: bool) -> None:
        self._path = path
        self._zipped = path.suffix == ".gz"
        if path.exists() and not resume:
            raise UsageError(f"{path} is there already", hint=f"go on from it with --resume, or {OTHER}")
        path.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes() if path.exists() else b""
        text, whole = _unzipped(data) if self._zipped else _lines(data)
        self._rows = self._parsed(text, torn=whole < len(data))
        self._file = path.open("ab", buffering=0)
        self._file.truncate(whole)

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    @property
    def judges(self) -> Counter[str]:
        """Of the rows that are there."""
        return Counter(str(row.judge) for row in self._rows)

    def done(self, pair: Pair, prompts: Mapping[str, str]) -> set[str]:
        """The names of the rows that are there. UsageError if they are of other models, or of other prompts than those
        that have these names."""
        for row in self._rows:
            if row.pair != pair:
                raise UsageError(f"{self._path} holds answers of other models", hint=OTHER)
            if prompts.get(row.id, row.prompt) != row.prompt:
                raise UsageError(f"{self._path} holds answers to other prompts, {row.id!r} among them", hint=OTHER)
        return {row.id for row in self._rows}

    def write(self, rows: Sequence[Recorded]) -> None:
        """Add a piece; it is on the disk when this returns."""
        data = b"".join(msgspec.json.encode(row) + b"\n" for row in rows)
        data = gzip.compress(data, mtime=0) if self._zipped and data else data
        while data:
            data = data[self._file.write(data) :]
        os.fsync(self._file.fileno())

    def _parsed(self, text: bytes, *, torn: bool) -> list[Recorded]:
        decoder = msgspec.json.Decoder(Recorded)
        try:
            rows = [decoder.decode(line) for line in text.splitlines() if line.strip()]
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise UsageError(f"{self._path} is no recording: {error}", hint=OTHER) from error
        if torn and not rows and not self._begun():
            raise UsageError(f"{self._path} is no recording", hint=OTHER)
        return rows

    def _begun(self) -> bool:
        """Whether what is there can be the beginning of the first piece."""
        with self._path.open("rb") as file:
            return MAGIC.startswith(file.read(2)) if self._zipped else file.read(1) == b"{"


def _lines(data: bytes) -> tuple[bytes, int]:
    """The whole lines, and where they end."""
    end = data.rfind(b"\n") + 1
    return data[:end], end


def _unzipped(data: bytes) -> tuple[bytes, int]:
    """What the whole members hold, and where the last of them ends."""
    text, end = [], 0
    while end < len(data):
        member = zlib.decompressobj(GZIP)
        try:
            piece = member.decompress(data[end:])
        except zlib.error:
            break
        if not member.eof:
            break
        text.append(piece)
        end = len(data) - len(member.unused_data)
    return b"".join(text), end
