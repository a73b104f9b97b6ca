"""The file of a recording: rows are added in pieces, and a piece that a crash tore is cut off. Nothing that is there
changes before the first write.

A `.gz` file is gzip members one behind the other, a piece each, which every reader of gzip takes as one file.
"""

from __future__ import annotations

import gzip
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import msgspec

from edgewise.errors import UsageError
from edgewise.joint.pair import Pair
from edgewise.joint.replay import Row

Judge = Literal["gold", "teacher"]

GZIP: Final = 16 + zlib.MAX_WBITS  # as zlib says that a stream is gzip's
MEMBER: Final = b"\x1f\x8b\x08"  # how each begins
BEGINNING: Final = b'{"id":"'  # of a row as we write it
OTHER: Final = "name another file, or remove this one"


@dataclass(frozen=True, slots=True)
class Plan:
    """How prompts are put and judged."""

    max_tokens: int = 48
    longest: int = 512  # tokens of a prompt, in either model's; what is longer is left out
    plain: bool = False  # prompts go in without the models' chat templates
    judge: Literal["auto", "teacher"] = "auto"  # teacher: of all prompts, whatever is known

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.longest < 1:
            raise UsageError(
                f"answers of {self.max_tokens} and prompts of {self.longest} tokens; allowed are 1 or more"
            )

    def __str__(self) -> str:
        flags = f"--max-tokens {self.max_tokens} --longest {self.longest} --judge {self.judge}"
        return f"{flags} --plain" if self.plain else flags


class Recorded(Row, frozen=True, omit_defaults=True):
    """A row, who judged it, and the plan of its recording."""

    judge: Judge | None = None
    plan: Plan | None = None


class RecordFile:
    """UsageError if the file is there and `resume` is not, if it is no recording, or if it is damaged elsewhere than at
    its end. OSError where the disk fails."""

    def __init__(self, path: Path, *, resume: bool) -> None:
        self._path = path
        self._zipped = path.suffix == ".gz"
        if path.exists() and not resume:
            raise UsageError(f"{path} is there already", hint=f"go on from it with --resume, or {OTHER}")
        data = path.read_bytes() if path.exists() else b""
        text, self._whole = _unzipped(data) if self._zipped else _lines(data)
        self._torn = data[self._whole :]
        self._rows = self._parsed(text)

    @property
    def judges(self) -> Counter[str]:
        """Of the rows that are there."""
        return Counter(str(row.judge) for row in self._rows)

    def done(self, pair: Pair, plan: Plan, prompts: Mapping[str, str]) -> set[str]:
        """The names of the rows that are there. UsageError if they are of other models or another plan, or answer
        anything but the `prompts`, which are there by their names."""
        for row in self._rows:
            if row.pair != pair:
                raise UsageError(f"{self._path} holds answers of other models", hint=OTHER)
            if row.plan != plan:
                its = "by a plan that it does not name" if row.plan is None else f"by `{row.plan}`"
                raise UsageError(
                    f"{self._path} holds answers {its}; these would be by `{plan}`",
                    hint=f"go on from it as it was begun, or {OTHER}",
                )
            if row.id not in prompts or prompts[row.id] != row.prompt:
                raise UsageError(f"{self._path} holds answers to other prompts, {row.id!r} among them", hint=OTHER)
        return {row.id for row in self._rows}

    def write(self, rows: Sequence[Recorded]) -> None:
        """Add a piece, in the place of what a crash tore; it is on the disk when this returns. No rows are no piece."""
        if self._torn:
            os.truncate(self._path, self._whole)
            self._torn = b""
        if not rows:
            return
        data = b"".join(msgspec.json.encode(row) + b"\n" for row in rows)
        data = gzip.compress(data, mtime=0) if self._zipped else data
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab", buffering=0) as file:
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())

    def _parsed(self, text: bytes) -> list[Recorded]:
        decoder = msgspec.json.Decoder(Recorded)
        try:
            rows = [decoder.decode(line) for line in text.splitlines() if line.strip()]
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise UsageError(f"{self._path} is no recording: {error}", hint=OTHER) from error
        if self._zipped and any(_beginning(self._torn[at:]) == BEGINNING for at in _members_behind(self._torn)):
            raise UsageError(
                f"{self._path} is damaged behind its byte {self._whole}, and whole rows follow",
                hint="bring it back from a copy, or name another file",
            )
        begun = _beginning(self._torn) if self._zipped else self._torn[: len(BEGINNING)]
        if not rows and (begun is None or not BEGINNING.startswith(begun)):
            raise UsageError(f"{self._path} is no recording: it does not begin with a row", hint=OTHER)
        return rows


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


def _members_behind(torn: bytes) -> Iterator[int]:
    """Where in what is left of one member others may begin."""
    at = torn.find(MEMBER, 1)
    while at >= 0:
        yield at
        at = torn.find(MEMBER, at + 1)


def _beginning(member: bytes) -> bytes | None:
    """What a row's beginning would be, of a gzip member of which the end may be missing; None if it is none."""
    try:
        return zlib.decompressobj(GZIP).decompress(member, len(BEGINNING))
    except zlib.error:
        return None
