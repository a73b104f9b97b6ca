"""Sessions of a local model or stage: who has which KV, how long it is, how rows become what is computed at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from edgewise.errors import ContextFull, GapError, Overloaded

CHUNK = 256  # most positions of a session computed at once; longer rows are cut: 512 are no faster and take more memory
KV = TypeVar("KV")
Values = np.ndarray[Any, np.dtype[Any]]  # one per position: ids int64 [n], or hidden states float32 [n, hidden]


class Appended(Protocol):
    """What `Row` and `StageRow` have in common."""

    @property
    def session(self) -> str: ...
    @property
    def position(self) -> int: ...
    @property
    def values(self) -> Values: ...
    @property
    def want(self) -> int: ...


@dataclass
class _Slot(Generic[KV]):
    kv: KV
    layers: range
    length: int = 0
    limit: int = 0


@dataclass(frozen=True, slots=True)
class Part(Generic[KV]):
    """Values of one session, 1..CHUNK, computed at once by `layers`; the last `want` of them are to come out."""

    kv: KV
    layers: range
    position: int
    values: Values
    want: int


class Slots(Generic[KV]):
    """At most `slots` sessions at once, each of up to `context` positions. The KV of a closed session is used again,
    and a rewind is a length. `cuts` says where values at a position must be cut beside where they are too many."""

    def __init__(
        self,
        name: str,
        slots: int,
        context: int,
        new_kv: Callable[[], KV],
        cuts: Callable[[int, int], Sequence[int]],
    ) -> None:
        self._name, self._slots, self._context = name, slots, context
        self._new_kv, self._more_cuts = new_kv, cuts
        self._free: list[KV] = []
        self._open: dict[str, _Slot[KV]] = {}

    def open(self, session: str, limit: int, layers: range) -> None:
        if session in self._open:
            raise ValueError(f"session {session!r} is open already")
        if limit > self._context:
            raise ContextFull(limit, self._context)
        if len(self._open) >= self._slots:
            raise Overloaded(
                f"all {self._slots} slots of {self._name} are taken", hint="close a session, or load with more slots"
            )
        kv = self._free.pop() if self._free else self._new_kv()
        self._open[session] = _Slot(kv, layers, limit=limit)

    def length(self, session: str) -> int:
        return self._open[session].length

    def rewind(self, session: str, position: int) -> None:
        slot = self._open[session]
        if not 0 <= position <= slot.length:
            raise GapError(session, position, slot.length)
        slot.length = position

    def close(self, session: str) -> None:
        slot = self._open.pop(session, None)
        if slot is not None:
            self._free.append(slot.kv)

    def clear(self) -> None:
        self._open.clear()
        self._free.clear()

    def appending(self, rows: Sequence[Appended]) -> Iterator[list[Part[KV]]]:
        """The parts that are to be computed, those that can be at once together. The rows are in their sessions once
        all were taken from here; errors come before the first."""
        for row in rows:
            self._check(row)
        if len({row.session for row in rows}) < len(rows):
            raise ValueError("a session has more than one row in a forward")
        for row in rows:  # what stood behind its position is overwritten from here on
            slot = self._open[row.session]
            slot.length = min(slot.length, row.position)
        yield from self._passes(rows)
        for row in rows:
            self._open[row.session].length = row.position + len(row.values)

    def _check(self, row: Appended) -> None:
        slot, count = self._open[row.session], len(row.values)
        if not 0 <= row.position <= slot.length:
            raise GapError(row.session, row.position, slot.length)
        if row.position + count > slot.limit:
            raise ContextFull(row.position + count, slot.limit)
        if count == 0 or not 0 <= row.want <= count:
            raise ValueError(f"a row of {count} positions cannot give {row.want}")

    def _passes(self, rows: Sequence[Appended]) -> Iterator[list[Part[KV]]]:
        together: list[Part[KV]] = []
        for part in (part for row in rows for part in self._parts(row)):
            full = sum(len(other.values) for other in together) + len(part.values) > CHUNK + self._slots
            if together and (full or together[-1].kv is part.kv or together[-1].layers != part.layers):
                yield together
                together = []
            together.append(part)
        if together:
            yield together

    def _parts(self, row: Appended) -> Iterator[Part[KV]]:
        slot, count = self._open[row.session], len(row.values)
        first_wanted = count - row.want
        cuts = sorted({*range(0, count, CHUNK), *self._more_cuts(row.position, count), count})
        for start, end in pairwise(cuts):
            want = max(end - max(start, first_wanted), 0)
            yield Part(slot.kv, slot.layers, row.position + start, row.values[start:end], want)
