"""A model on this machine as a `TokenModel`, ranges of its layers as a `Stage`. What computes is the subclass."""

from __future__ import annotations

import math
import mmap
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from edgewise.devices.machine import usable_cores
from edgewise.engines.base import Row, StageRow
from edgewise.engines.slots import Part, Slots
from edgewise.errors import ContextFull, EngineClosed, EngineError, UsageError
from edgewise.models.bundle import Bundle
from edgewise.models.card import Card
from edgewise.models.gains import Gains
from edgewise.types import FloatArray, IdArray

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
        self._sessions = self._new_slots()
        self._closed = False
        self._bundle = bundle
        self._gains: Gains | None = None
        self._logits = np.empty((0, card.vocab), dtype=np.float32)

    @property
    @abstractmethod
    def numerics(self) -> str:
        """What computes, in words: models of one bundle with the same numerics give the same bits."""

    @abstractmethod
    def new_kv(self) -> KV:
        """Room for `context` positions of all layers; no page of it is touched before it is used."""

    @abstractmethod
    def embed(self, ids: IdArray) -> FloatArray:
        """Hidden states before the first layer, float32 [n, hidden], of ids int64 [n]."""

    @abstractmethod
    def run(self, parts: Sequence[Part[KV]], hidden: FloatArray) -> FloatArray:
        """Append the parts, of different sessions, the same layers and at most CHUNK + slots positions in all, whose
        `hidden` [their number, hidden] come one behind the other and may be overwritten. The hidden states that they
        want, float32, in their order, valid until the next run."""

    @abstractmethod
    def project(self, hidden: FloatArray, out: FloatArray) -> None:
        """The logits of hidden states behind the last layer, [n, hidden], n at most CHUNK + slots, into `out`
        [n, vocab]."""

    @abstractmethod
    def cuts_at(self, layer: int) -> bool:
        """Whether a stage may begin or end between layer - 1 and layer."""

    @abstractmethod
    def _release(self) -> None:
        """Free the weights now, whoever still holds this object."""

    def gains(self, cut: int) -> FloatArray:
        """How much each number of the boundary before layer `cut` (0 .. layers) matters, float32 [hidden]: for its
        codec. Of one bundle they are the same everywhere."""
        if self._gains is None:
            self._gains = Gains.of(self._bundle)
        return self._gains.at(cut)

    def give_back(self) -> None:
        """All weights were read to be checked: memory of those that nobody uses need not stay. A hint like `expect`."""
        return

    def expect(self, soon: bool) -> None:
        """Rows come within some 100 microseconds, as long as a sleeping thread takes to wake up; or nothing comes for
        longer than that, and other processes may have the cores. A hint: results are the same without."""
        return

    async def open(self, session: str, limit: int) -> None:
        self.check_alive()
        self._sessions.open(session, limit, range(self.card.layers))

    async def forward(self, rows: Sequence[Row]) -> list[FloatArray]:
        self.check_alive()
        for row in rows:
            if len(row.ids) and (row.ids.min() < 0 or row.ids.max() >= self.vocab):
                least, most = row.ids.min(), row.ids.max()
                raise ValueError(f"token ids must be 0..{self.vocab - 1}, the row holds {least}..{most}")
        ends = list(accumulate((row.want for row in rows), initial=0))
        out, done = self._room_for(ends[-1]), 0
        for parts in self._sessions.appending(rows):
            hidden = self.run(parts, self.embed(np.concatenate([part.values for part in parts], dtype=np.int64)))
            want = sum(part.want for part in parts)
            if want:
                self.project(hidden[:want], out[done : done + want])
            done += want
        return [out[start:end] for start, end in pairwise(ends)]

    async def rewind(self, session: str, position: int) -> None:
        self._sessions.rewind(session, position)

    async def close(self, session: str) -> None:
        self._sessions.close(session)

    async def shutdown(self) -> None:
        if not self._closed:
            self._closed = True
            self._sessions.clear()
            self._logits = self._logits[:0]
            self._release()

    def stage(self, layers: range | None = None) -> LocalStage[KV]:
        """The layers `layers` (None: all), with sessions of their own. It ends with this model."""
        return LocalStage(self, range(self.card.layers) if layers is None else layers)

    def check_alive(self) -> None:
        if self._closed:
            raise EngineClosed(f"{self.name} was shut down")

    def _new_slots(self) -> Slots[KV]:
        return Slots(self.name, self.slots, self.context, self.new_kv, self._cuts)

    def _room_for(self, rows: int) -> FloatArray:
        """The logits buffer; grown when a forward wants more rows than any before."""
        if len(self._logits) < rows:
            self._logits = np.empty((rows, self.vocab), dtype=np.float32)
        return self._logits

    def _cuts(self, position: int, count: int) -> Sequence[int]:
        """Where `count` values at `position` must be cut for the runs, beside where they are too many."""
        return ()


class LocalStage(Generic[KV]):
    """A range of a local model's layers as a `Stage`; see engines/base.py."""

    def __init__(self, model: LocalModel[KV], layers: range) -> None:
        self.name, self.layers, self.hidden = model.name, layers, model.card.hidden
        self.context, self.slots = model.context, model.slots
        self._model = model
        self._sessions = model._new_slots()
        self.check_layers(layers)

    def check_layers(self, layers: range) -> None:
        """UsageError if a session cannot have them."""
        inside = self.layers.start <= layers.start < layers.stop <= self.layers.stop and layers.step == 1
        ends = [layer for layer in (layers.start, layers.stop) if not self._model.cuts_at(layer)]
        if not inside:
            raise UsageError(
                f"layers {layers.start} to {layers.stop} are wanted of {self.name}",
                hint=f"this stage holds {self.layers.start} to {self.layers.stop}",
            )
        if ends:
            allowed = [n for n in range(self._model.card.layers + 1) if self._model.cuts_at(n)]
            raise UsageError(f"{self.name} cannot be cut at layer {ends[0]} here", hint=f"it can at {allowed}")

    async def open(self, session: str, limit: int, layers: range) -> None:
        self._model.check_alive()
        self.check_layers(layers)
        self._sessions.open(session, limit, layers)

    async def forward(self, rows: Sequence[StageRow]) -> list[FloatArray]:
        self._model.check_alive()
        for row in rows:
            if row.hidden.shape[1:] != (self.hidden,) or row.hidden.dtype != np.float32:
                raise ValueError(f"hidden states must be float32 [n, {self.hidden}], the row has {row.hidden.shape}")
        ends = list(accumulate((row.want for row in rows), initial=0))
        out, done = np.empty((ends[-1], self.hidden), np.float32), 0
        for parts in self._sessions.appending(rows):
            hidden = self._model.run(parts, np.concatenate([part.values for part in parts], dtype=np.float32))
            want = sum(part.want for part in parts)
            out[done : done + want] = hidden[:want]
            done += want
        return [out[start:end] for start, end in pairwise(ends)]

    def length(self, session: str) -> int:
        """Positions that the session holds; KeyError if it is not open."""
        return self._sessions.length(session)

    async def rewind(self, session: str, position: int) -> None:
        self._sessions.rewind(session, position)

    async def close(self, session: str) -> None:
        self._sessions.close(session)

    async def shutdown(self) -> None:
        self._sessions.clear()
