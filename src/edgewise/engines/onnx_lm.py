"""Bundles on onnxruntime: block graphs as a `TokenModel`.

Every layer's keys and values lie in one buffer per slot, bound as past and as present alike: a step writes its rows in
place, rewinding is setting a length, and no page of a buffer is touched before it is used.

Two numerics modes, fixed for a model: `fast` computes a lone row with one-row kernels; `stable` computes every row
with the kernels for two rows and more, so that a row has the same bits whether it was decoded, prefilled, chunked or
repeated after a rewind. For that, a row that would be alone in a tile of rows gets a second one; attention is computed
untiled; and for heads wider than WIDE_HEAD no run has positions on both sides of EARLY (the matrix product sums such
heads in two parts, but in one where it has at most 64 keys).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from edgewise.engines.local import LocalModel, untouched
from edgewise.engines.onnx_process import failed, shared_options
from edgewise.engines.slots import CHUNK, Part
from edgewise.errors import BundleError
from edgewise.models.bundle import BlockEntry, Bundle
from edgewise.settings import Mode, ModelSettings
from edgewise.types import FloatArray, IdArray

DEFAULTS = ModelSettings()
ROW_TILE = 16  # kernels work on tiles of so many rows, or of a multiple
WIDE_HEAD = 128
EARLY = 63  # positions before it are computed with at most 64 keys, the padding row's included


@dataclass(frozen=True)
class Profile:
    """onnxruntime's own profiles of the sessions that were made within `profiling`. They cost time at every node."""

    directory: Path
    sessions: list[tuple[str, ort.InferenceSession]] = field(default_factory=list)

    def finish(self) -> list[tuple[str, int, Path]]:
        """End the recording: per graph its name, when its clock started (ns since the epoch, or of the monotonic
        clock, as the platform has it) and the JSON file that onnxruntime wrote. To be called once."""
        return [
            (name, session.get_profiling_start_time_ns(), Path(session.end_profiling()))
            for name, session in self.sessions
        ]


@contextmanager
def profiling(directory: Path) -> Iterator[Profile]:
    """Models that are loaded within are profiled into files of that directory, for as long as they live."""
    profile = Profile(directory)
    token = _profile.set(profile)
    try:
        yield profile
    finally:
        _profile.reset(token)


_profile: ContextVar[Profile | None] = ContextVar("profile", default=None)


@dataclass
class _KV:
    """Per layer [key, value] float32 [1, kv_heads, capacity, head_dim], bound as past and as present alike."""

    layers: list[tuple[ort.OrtValue, ort.OrtValue]]
    bindings: dict[int, list[ort.IOBinding]] = field(default_factory=dict)  # rows -> one per block


class _Blocks:
    """Decoder layers over a run of block graphs: hidden in, hidden out."""

    def __init__(self, bundle: Bundle, entries: Sequence[BlockEntry], capacity: int, mode: Mode) -> None:
        self.card = bundle.card
        self.layers = range(entries[0].first, entries[-1].last + 1)
        self.starts = {entry.first: n for n, entry in enumerate(entries)} | {self.layers.stop: len(entries)}
        self._entries = entries
        self._capacity = capacity
        with _attention_tiles(mode == "fast"):
            self._sessions = [_session(bundle, entry.file) for entry in entries]
        self._last_position = np.zeros(1, dtype=np.int32)
        self._length = np.zeros((), dtype=np.int32)
        self._common = {"last_position": _value(self._last_position), "length": _value(self._length)}
        for prefix, rope in self.card.ropes.items():
            cos, sin = rope.tables(capacity)
            self._common |= {f"{prefix}cos": _value(cos), f"{prefix}sin": _value(sin)}
        # Blocks read and write in turn; all rows of a chunk pass through one before the next.
        self._buffers = [np.empty((CHUNK, self.card.hidden), dtype=np.float32) for _ in range(2)]

    def new_kv(self) -> _KV:
        shape = (1, self.card.kv_heads, self._capacity, self.card.head_dim)
        layers = [[_value(untouched(np.float32, *shape)) for _ in range(2)] for _ in self.layers]
        return _KV([(keys, values) for keys, values in layers])

    def entry(self, layer: int) -> FloatArray:
        """Where the block that begins with `layer` reads, float32 [CHUNK, hidden]: the caller writes its rows here."""
        return self._buffers[self.starts[layer] % 2]

    def run(self, kv: _KV, layers: range, position: int, rows: int) -> FloatArray:
        """Append `rows` rows of the entry of `layers` at `position`; their hidden states [rows, hidden], valid until
        the next run."""
        self._last_position[0] = position + rows - 1
        self._length[()] = position + rows
        first, end = self.starts[layers.start], self.starts[layers.stop]
        bindings = self._bindings(kv, rows)
        for session, binding in zip(self._sessions[first:end], bindings[first:end], strict=True):
            session.run_with_iobinding(binding)
        return self._buffers[end % 2][:rows]

    def _bindings(self, kv: _KV, rows: int) -> list[ort.IOBinding]:
        if rows not in kv.bindings:
            if rows > 2:  # decoding always comes back to one or two rows; of the prefill sizes, the latest is enough
                kv.bindings = {size: b for size, b in kv.bindings.items() if size <= 2}
            kv.bindings[rows] = [self._bind(kv, n, rows) for n in range(len(self._sessions))]
        return kv.bindings[rows]

    def _bind(self, kv: _KV, n: int, rows: int) -> ort.IOBinding:
        binding = self._sessions[n].io_binding()
        binding.bind_ortvalue_input("hidden", _value(self._buffers[n % 2][:rows]))
        binding.bind_ortvalue_output("hidden_out", _value(self._buffers[(n + 1) % 2][:rows]))
        for name, value in self._common.items():
            binding.bind_ortvalue_input(name, value)
        for layer in range(self._entries[n].first, self._entries[n].last + 1):
            for which, value in zip(("key", "value"), kv.layers[layer - self.layers.start], strict=True):
                binding.bind_ortvalue_input(f"past_{which}_{layer}", value)
                binding.bind_ortvalue_output(f"present_{which}_{layer}", value)
        return binding


class OnnxLM(LocalModel[_KV]):
    """A bundle as a TokenModel on the CPU provider; see engines/local.py."""

    KV_BYTES = 4

    def __init__(
        self,
        bundle: Bundle,
        *,
        mode: Mode = DEFAULTS.mode,
        slots: int = DEFAULTS.slots,
        context: int | None = DEFAULTS.context,
    ) -> None:
        super().__init__(bundle, slots=slots, context=context)
        self.mode = mode
        bundle.verify(bundle.manifest.files)
        graphs = bundle.manifest.graphs
        self._embed = _session(bundle, graphs.embed)
        self._blocks = _Blocks(bundle, graphs.blocks, self.context + 1, mode)  # room for the padding row
        self._head = _session(bundle, graphs.head)

    @property
    def numerics(self) -> str:
        return f"onnxruntime {ort.__version__} {self.mode}"

    def new_kv(self) -> _KV:
        return self._blocks.new_kv()

    def cuts_at(self, layer: int) -> bool:
        return layer in self._blocks.starts

    def _cuts(self, position: int, count: int) -> Sequence[int]:
        early = self.mode == "stable" and self.card.head_dim > WIDE_HEAD and position < EARLY < position + count
        return (EARLY - position,) if early else ()

    def _rows(self, count: int) -> int:
        """Rows to compute for that many."""
        return count + 1 if self.mode == "stable" and count % ROW_TILE == 1 else count

    def embed(self, ids: IdArray) -> FloatArray:
        return _call(self._embed, {"ids": ids})

    def run(self, parts: Sequence[Part[_KV]], hidden: FloatArray) -> FloatArray:
        """One after the other: the graphs take the rows of one session."""
        done = wanted = 0
        for part in parts:
            count = len(part.values)
            rows = self._rows(count)
            entry = self._blocks.entry(part.layers.start)
            entry[:count] = hidden[done : done + count]
            entry[count:rows] = entry[count - 1]  # a padding row repeats one; its KV lies beyond the length
            try:
                result = self._blocks.run(part.kv, part.layers, part.position, rows)
            except Exception as e:
                raise failed(e) from e
            done += count
            hidden[wanted : wanted + part.want] = result[count - part.want : count]
            wanted += part.want
        return hidden[:wanted]

    def project(self, hidden: FloatArray, out: FloatArray) -> None:
        rows = self._rows(len(hidden))
        padded = hidden if len(hidden) == rows else np.resize(hidden, (rows, hidden.shape[1]))
        out[:] = _call(self._head, {"hidden": padded})[: len(hidden)]

    def _release(self) -> None:
        del self._embed, self._blocks, self._head


def _value(array: Any) -> ort.OrtValue:
    return ort.OrtValue.ortvalue_from_numpy(array)


@contextmanager
def _attention_tiles(wanted: bool) -> Iterator[None]:
    """Whether sessions made inside compute attention in tiles; onnxruntime asks the environment, once per session."""
    name = "ORT_GQA_DISABLE_FLASH_ATTENTION"
    before = os.environ.get(name)
    if not wanted:
        os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


def _session(bundle: Bundle, file: str) -> ort.InferenceSession:
    options = shared_options()
    profile = _profile.get()
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile.directory / Path(file).stem)
    try:
        session = ort.InferenceSession(str(bundle.file(file)), options, providers=["CPUExecutionProvider"])
    except Exception as e:
        raise BundleError(f"onnxruntime cannot load {file} of {bundle.name!r}: {e}", hint="pull the model again") from e
    if profile is not None:
        profile.sessions.append((Path(file).stem, session))
    return session


def _call(session: ort.InferenceSession, feeds: dict[str, Any]) -> FloatArray:
    try:
        result: FloatArray = session.run(None, feeds)[0]
        return result
    except Exception as e:
        raise failed(e) from e
