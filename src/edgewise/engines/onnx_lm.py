"""Bundles on onnxruntime: block graphs as a `TokenModel`.

Every layer's keys and values lie in one buffer per slot, bound as past and as present alike: a step writes its rows in
place, rewinding is setting a length, and no page of a buffer is touched before it is used.

Two numerics modes, fixed for a model: `fast` computes a lone row with one-row kernels; `stable` computes every row
with the kernels for two rows and more (a lone row is padded to two), so that a row has the same bits whether it was
decoded, prefilled, chunked or repeated after a rewind.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import onnxruntime as ort

from edgewise.engines.base import Row
from edgewise.errors import BundleError, ContextFull, EngineClosed, EngineError, GapError, Overloaded
from edgewise.models.bundle import BlockEntry, Bundle
from edgewise.models.card import Card
from edgewise.settings import ModelSettings
from edgewise.types import FloatArray, IdArray

Mode = Literal["fast", "stable"]
DEFAULTS = ModelSettings()
CHUNK = 512  # most rows computed at once; longer ones are split here


def set_threads(threads: int) -> None:
    """Size the process-wide thread pool that all sessions share. Only the first call before any model counts; a library
    user who never calls it gets one thread per core."""
    if _pool.threads is None:
        ort.set_global_thread_pool_sizes(threads, 1)
        _pool.threads = threads
    elif _pool.threads != threads:
        raise EngineError(
            f"the thread pool has {_pool.threads} threads already and cannot be given {threads}",
            hint="call set_threads once, before the first model is loaded",
        )


def probe() -> tuple[str, list[str]]:
    """The runtime's version and the providers it was built with, for `doctor`."""
    return ort.__version__, ort.get_available_providers()


@dataclass
class _Pool:
    """onnxruntime's global pool is fixed at its first use in a process."""

    threads: int | None = None


_pool = _Pool()


@dataclass
class _Slot:
    """The KV of one session: per layer [key, value] float32 [1, kv_heads, capacity, head_dim]."""

    kv: list[tuple[ort.OrtValue, ort.OrtValue]]
    length: int = 0
    limit: int = 0
    bindings: dict[int, list[ort.IOBinding]] = field(default_factory=dict)  # rows -> one per block


class _Blocks:
    """Decoder layers first..last over a run of block graphs: hidden in, hidden out. The local half of a Stage."""

    def __init__(self, bundle: Bundle, entries: Sequence[BlockEntry], capacity: int) -> None:
        self.card = bundle.card
        self.layers = range(entries[0].first, entries[-1].last + 1)
        self._entries = entries
        self._capacity = capacity
        self._sessions = [_session(bundle, entry.file) for entry in entries]
        self._last_position = np.zeros(1, dtype=np.int32)
        self._length = np.zeros((), dtype=np.int32)
        cos, sin = self.card.rope.tables(capacity)
        self._common = {
            "last_position": _value(self._last_position),
            "length": _value(self._length),
            "cos": _value(cos),
            "sin": _value(sin),
        }
        # Blocks read and write in turn; all rows of a chunk pass through one before the next.
        self._buffers = [np.empty((CHUNK, self.card.hidden), dtype=np.float32) for _ in range(2)]

    def slot(self) -> _Slot:
        shape = (1, self.card.kv_heads, self._capacity, self.card.head_dim)
        return _Slot([(_value(np.empty(shape, np.float32)), _value(np.empty(shape, np.float32))) for _ in self.layers])

    @property
    def entry(self) -> FloatArray:
        """Where the first block reads, float32 [CHUNK, hidden]: the caller writes its rows here."""
        return self._buffers[0]

    def run(self, slot: _Slot, position: int, rows: int) -> FloatArray:
        """Append `rows` rows of `entry` at `position`; their hidden states [rows, hidden], valid until the next run."""
        self._last_position[0] = position + rows - 1
        self._length[()] = position + rows
        for session, binding in zip(self._sessions, self._bindings(slot, rows), strict=True):
            session.run_with_iobinding(binding)
        return self._buffers[len(self._sessions) % 2][:rows]

    def _bindings(self, slot: _Slot, rows: int) -> list[ort.IOBinding]:
        if rows not in slot.bindings:
            if rows > 2:  # decoding always comes back to one or two rows; of the prefill sizes, the latest is enough
                slot.bindings = {size: b for size, b in slot.bindings.items() if size <= 2}
            slot.bindings[rows] = [self._bind(slot, n, rows) for n in range(len(self._sessions))]
        return slot.bindings[rows]

    def _bind(self, slot: _Slot, n: int, rows: int) -> ort.IOBinding:
        binding = self._sessions[n].io_binding()
        binding.bind_ortvalue_input("hidden", _value(self._buffers[n % 2][:rows]))
        binding.bind_ortvalue_output("hidden_out", _value(self._buffers[(n + 1) % 2][:rows]))
        for name, value in self._common.items():
            binding.bind_ortvalue_input(name, value)
        for layer in range(self._entries[n].first, self._entries[n].last + 1):
            for which, value in zip(("key", "value"), slot.kv[layer - self.layers.start], strict=True):
                binding.bind_ortvalue_input(f"past_{which}_{layer}", value)
                binding.bind_ortvalue_output(f"present_{which}_{layer}", value)
        return binding


class OnnxLM:
    """A bundle as a TokenModel on the CPU provider; see engines/base.py for its promises.

    `slots` sessions at once, each of up to `context` positions (default: what the model was trained for).
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        mode: Mode = DEFAULTS.mode,
        slots: int = DEFAULTS.slots,
        context: int | None = DEFAULTS.context,
    ) -> None:
        card = bundle.card
        if context is not None and not 0 < context <= card.context:
            raise ContextFull(context, card.context)
        self.name = bundle.name
        self.card: Card = card
        self.vocab = card.vocab
        self.context = context or card.context
        self.slots = slots
        self.mode = mode
        self._least = 2 if mode == "stable" else 1  # rows per run
        if _pool.threads is None:
            set_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
        graphs = bundle.manifest.graphs
        self._embed = _session(bundle, graphs.embed)
        self._blocks = _Blocks(bundle, graphs.blocks, self.context + self._least - 1)  # room for the padding row
        self._head = _session(bundle, graphs.head)
        self._free: list[_Slot] = []
        self._open: dict[str, _Slot] = {}
        self._closed = False
        self._logits = np.empty((0, card.vocab), dtype=np.float32)

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
        slot = self._free.pop() if self._free else self._blocks.slot()
        slot.length, slot.limit = 0, limit
        self._open[session] = slot

    async def forward(self, rows: Sequence[Row]) -> list[FloatArray]:
        self._check_alive()
        for row in rows:
            self._check_row(row)
        if len({row.session for row in rows}) < len(rows):
            raise ValueError("a session has more than one row in a forward")
        out = self._room_for(sum(row.want for row in rows))
        done, answers = 0, []
        for row in rows:
            self._append(row, out[done : done + row.want])
            answers.append(out[done : done + row.want])
            done += row.want
        return answers

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
        self._closed = True
        self._open.clear()
        self._free.clear()
        for weights in ("_embed", "_blocks", "_head", "_logits"):  # memory goes now, whoever still holds this object
            self.__dict__.pop(weights, None)

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

    def _append(self, row: Row, out: FloatArray) -> None:
        slot, count = self._open[row.session], len(row.ids)
        slot.length = row.position
        first_wanted = count - row.want
        for start, end in pairwise([*range(0, count, CHUNK), count]):
            hidden = self._hidden(slot, row.position + start, row.ids[start:end])
            slot.length = row.position + end
            if end > first_wanted:
                skip = max(first_wanted - start, 0)
                self._project(hidden[skip:], out[max(start - first_wanted, 0) : end - first_wanted])

    def _hidden(self, slot: _Slot, position: int, ids: IdArray) -> FloatArray:
        """Hidden states of the ids, float32 [len(ids), hidden], before the final norm."""
        rows = max(len(ids), self._least)
        padded = np.resize(ids, rows)  # a padding row repeats the id; its KV lies beyond the length
        self._blocks.entry[:rows] = _call(self._embed, {"ids": padded})
        try:
            return self._blocks.run(slot, position, rows)[: len(ids)]
        except Exception as e:
            raise _mapped(e) from e

    def _project(self, hidden: FloatArray, out: FloatArray) -> None:
        rows = max(len(hidden), self._least)
        padded = hidden if len(hidden) == rows else np.repeat(hidden, rows, axis=0)
        out[:] = _call(self._head, {"hidden": padded})[: len(hidden)]


def _value(array: Any) -> ort.OrtValue:
    return ort.OrtValue.ortvalue_from_numpy(array)


def _session(bundle: Bundle, file: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.use_per_session_threads = False  # one pool for all graphs: 30 pools would fight for the cores
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(str(bundle.file(file)), options, providers=["CPUExecutionProvider"])
    except Exception as e:
        raise BundleError(f"onnxruntime cannot load {file} of {bundle.name!r}: {e}", hint="pull the model again") from e


def _call(session: ort.InferenceSession, feeds: dict[str, Any]) -> FloatArray:
    try:
        result: FloatArray = session.run(None, feeds)[0]
        return result
    except Exception as e:
        raise _mapped(e) from e


def _mapped(e: Exception) -> EngineError:
    """onnxruntime raises classes of its C extension that share only Exception."""
    return EngineError(f"onnxruntime failed: {e}", hint="this request cannot be answered here; others can")
