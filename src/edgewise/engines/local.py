"""A model on this machine as a `TokenModel`: sessions, lengths and checks. What computes is a subclass's affair."""

from __future__ import annotations

import math
import mmap
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from edgewise.devices.machine import usable_cores
from edgewise.engines.base import Row
from edgewise.errors import ContextFull, EngineClosed, EngineError, GapError, Overloaded
from edgewise.models.bundle import Bundle
from edgewise.models.card import Card
from edgewise.types import FloatArray, IdArray

CHUNK = 256  # most ids of a session computed at once; longer rows are cut: 512 are no faster and take more memory
KV = TypeVar("KV")


@dataclass
class _Process:
    """The runtimes fix their pools at their first use in a process."""

    threads: int | None = None
    fixed: bool = False


_process = _Process()


def set_threads(threads: int) -> None:
    """How many threads compute, for all models of the process. EngineError once a model is there and has another
    number; without a call it is one per core."""
    if _process.fixed and _process.threads != threads:
        raise EngineError(
            f"the thread pool has {_process.threads} threads already and cannot be given {threads}",
            hint="call set_threads once, before the first model is loaded",
        )
    _process.threads = threads


def fixed_threads() -> int:
    """The number that a runtime starts with, from now on for good."""
    _process.fixed = True
    if _process.threads is None:
        _process.threads = usable_cores()
    return _process.threads


Number = TypeVar("Number", bound=np.generic)


def untouched(dtype: type[Number], *shape: int) -> npt.NDArray[Number]:
    """Zeros whose pages come one by one as they are used. numpy would ask for huge pages, and one row of keys in each
    of many heads would bring in 2 MiB of memory a head."""
    memory = mmap.mmap(-1, np.dtype(dtype).itemsize * math.prod(shape))
    return np.frombuffer(memory, dtype=dtype).reshape(shape)


@dataclass
class _Slot(Generic[KV]):
    kv: KV
    length: int = 0
    limit: int = 0


@dataclass(frozen=True, slots=True)
class Part(Generic[KV]):
    """Ids of one session, 1..CHUNK, computed at once; the last `want` of them need logits."""

    kv: KV
    position: int
    ids: IdArray
    want: int


class LocalModel(ABC, Generic[KV]):
    """See engines/base.py for its promises. `slots` sessions at once, each of up to `context` positions (None: what the
    model was trained for). KV belongs to slots: a closed session's is used again, and a rewind is a length."""

    KV_BYTES: int  # of one number of keys and values

    def __init__(self, bundle: Bundle, *, slots: int, context: int | None) -> None:
        card = bundle.card
        if context is not None and not 0 < context <= card.context:
            raise ContextFull(context, card.context)
        self.name = bundle.name
        self.card: Card = card
        self.vocab = card.vocab
        self.context = context or card.context
        self.slots = slots
        self._free: list[_Slot[KV]] = []
        self._open: dict[str, _Slot[KV]] = {}
        self._closed = False
        self._logits = np.empty((0, card.vocab), dtype=np.float32)

    @abstractmethod
    def _new_kv(self) -> KV:
        """Room for `context` positions; no page of it is touched before it is used."""

    @abstractmethod
    def _compute(self, parts: Sequence[Part[KV]], out: FloatArray) -> None:
        """Append the parts, of different sessions and at most CHUNK + slots ids in all, and write the logits that they
        want, in their order, into `out` [their number, vocab]."""

    @abstractmethod
    def _release(self) -> None:
        """Free the weights now, whoever still holds this object."""

    async def open(self, session: str, limit: int) -> None:
        self._check_alive()
        if session in self._open:
            raise ValueError(f"session {session!r} is open already")
        if limit > self.context:
            raise ContextFull(limit, self.context)
        if len(self._open) >= self.slots:
            raise Overloaded(
                f"all {self.slots} slots of {self.name} are taken", hint="close a session, or load with more slots"
            )
        slot = self._free.pop() if self._free else _Slot(self._new_kv())
        slot.length, slot.limit = 0, limit
        self._open[session] = slot

    async def forward(self, rows: Sequence[Row]) -> list[FloatArray]:
        self._check_alive()
        for row in rows:
            self._check_row(row)
        if len({row.session for row in rows}) < len(rows):
            raise ValueError("a session has more than one row in a forward")
        for row in rows:  # what stood behind its position is overwritten from here on
            slot = self._open[row.session]
            slot.length = min(slot.length, row.position)
        ends = list(accumulate((row.want for row in rows), initial=0))
        out = self._room_for(ends[-1])
        done = 0
        for parts in self._passes(rows):
            want = sum(part.want for part in parts)
            self._compute(parts, out[done : done + want])
            done += want
        for row in rows:
            self._open[row.session].length = row.position + len(row.ids)
        return [out[start:end] for start, end in pairwise(ends)]

    async def rewind(self, session: str, position: int) -> None:
        slot = self._open[session]
        if not 0 <= position <= slot.length:
            raise GapError(session, position, slot.length)
        slot.length = position

    async def close(self, session: str) -> None:
        slot = self._open.pop(session, None)
        if slot is not None:
            self._free.append(slot)

    async def shutdown(self) -> None:
        if not self._closed:
            self._closed = True
            self._open.clear()
            self._free.clear()
            self._logits = self._logits[:0]
            self._release()

    def _check_alive(self) -> None:
        if self._closed:
            raise EngineClosed(f"{self.name} was shut down")

    def _check_row(self, row: Row) -> None:
        slot, count = self._open[row.session], len(row.ids)
        if not 0 <= row.position <= slot.length:
            raise GapError(row.session, row.position, slot.length)
        if row.position + count > slot.limit:
            raise ContextFull(row.position + count, slot.limit)
        if count == 0 or not 0 <= row.want <= count:
            raise ValueError(f"a row of {count} ids cannot give {row.want} logits")
        if row.ids.min() < 0 or row.ids.max() >= self.vocab:
            raise ValueError(f"token ids must be 0..{self.vocab - 1}, the row holds {row.ids.min()}..{row.ids.max()}")

    def _room_for(self, rows: int) -> FloatArray:
        """The logits buffer; grown when a forward wants more rows than any before."""
        if len(self._logits) < rows:
            self._logits = np.empty((rows, self.vocab), dtype=np.float32)
        return self._logits

    def _passes(self, rows: Sequence[Row]) -> Iterator[list[Part[KV]]]:
        """The rows in parts, and the parts in groups that can be computed together."""
        together: list[Part[KV]] = []
        for part in (part for row in rows for part in self._parts(row)):
            full = sum(len(other.ids) for other in together) + len(part.ids) > CHUNK + self.slots
            if together and (full or together[-1].kv is part.kv):
                yield together
                together = []
            together.append(part)
        if together:
            yield together

    def _parts(self, row: Row) -> Iterator[Part[KV]]:
        kv, first_wanted = self._open[row.session].kv, len(row.ids) - row.want
        for start, end in pairwise(self._cuts(row.position, len(row.ids))):
            yield Part(kv, row.position + start, row.ids[start:end], max(end - max(start, first_wanted), 0))

    def _cuts(self, position: int, count: int) -> list[int]:
        """Where `count` ids at `position` are cut for the runs: 0, …, count."""
        return [*range(0, count, CHUNK), count]
