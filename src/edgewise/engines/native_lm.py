"""Bundles on our own kernels (engines/native, C): quantized matrices times int8 activations, attention, norms.

Every row is computed by the same sequence of operations whatever is computed beside it, so that a row has the same bits
whether it was decoded, prefilled, chunked or repeated after a rewind: both numerics modes in one.
"""

from __future__ import annotations

import ctypes as c
import errno
import os
import weakref
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from edgewise.engines import packed
from edgewise.engines.local import LocalModel, fixed_threads, untouched
from edgewise.engines.slots import CHUNK, Part
from edgewise.errors import BundleError, EngineError, UsageError
from edgewise.models.bundle import MANIFEST, Bundle, sha256
from edgewise.models.card import Card, Rope
from edgewise.models.tensors import EMBED, FINAL_NORM, HEAD, VECTORS, Array, embedding, matrices, vectors
from edgewise.models.weights import BLOCK, Dense, Matrix, Quantized
from edgewise.settings import ModelSettings
from edgewise.types import FloatArray, IdArray

DEFAULTS = ModelSettings()
LIBRARY = Path(__file__).parent / "native" / "blocks.so"
MOST_SPANS = 1 << 22  # of a recording: 100 MB at most
COLUMNS = packed.COLUMNS
MOST_HEAD = 256  # dimensions of the largest head
MOST_SIZE, MOST_ROWS = 1 << 20, 1 << 30  # of rows, of a table of rows: C's ints hold what is made of them
FIRST_TURNS = 8192  # positions whose rotation is computed at first


class _Card(c.Structure):
    _fields_ = (
        *((name, c.c_int) for name in ("hidden", "heads", "kv_heads", "head_dim", "ffn", "capacity")),
        *((name, c.c_int) for name in ("gelu", "whole_norm")),
        *((name, c.c_float) for name in ("norm_eps", "attention_scale", "attention_cap", "residual_scale")),
    )


class _Layer(c.Structure):
    _fields_ = (
        ("qkv", c.c_void_p * 3),
        ("o", c.c_void_p),
        ("gate_up", c.c_void_p * 2),
        ("down", c.c_void_p),
        *((name, c.c_void_p) for name in ("attention_norm", "q_norm", "k_norm", "attention_post_norm")),
        *((name, c.c_void_p) for name in ("ffn_norm", "ffn_post_norm")),
        *((name, c.c_void_p) for name in ("qkv_bias", "o_bias", "gate_up_bias", "down_bias", "cos", "sin")),
        ("turned", c.c_int),
        ("window", c.c_int),
    )


class _Matrix(c.Structure):
    _fields_ = (
        *((name, c.c_int) for name in ("outputs", "inputs", "bits", "block", "factor_bytes")),
        *((name, c.c_void_p) for name in ("codes", "scales", "minima")),
    )


class _KV(c.Structure):
    _fields_ = (("keys", c.c_void_p), ("values", c.c_void_p))


class _Session(c.Structure):
    _fields_ = (("kv", c.POINTER(_KV)), *((name, c.c_int) for name in ("position", "rows", "wanted")))


@cache
def _library() -> c.CDLL | None:
    """The compiled kernels; None where they were not built (no C compiler, or not x86-64)."""
    if not LIBRARY.is_file():
        return None
    library = c.CDLL(str(LIBRARY))
    p, i = c.c_void_p, c.c_int
    for name, result, arguments in (
        ("ew_start", c.c_char_p, (c.c_char_p, i)),
        ("ew_fits_half", i, (p, p, p, i, i)),
        ("ew_pack", None, (p, p, p, p, i, i)),
        ("ew_rows", None, (p, p, i, p)),
        ("ew_checksum", c.c_uint64, (p, c.c_size_t)),
        ("ew_workspace_new", p, (p, i, i)),
        ("ew_workspace_free", None, (p,)),
        ("ew_layers", None, (p, p, i, p, p, i, p)),
        ("ew_head", None, (p, p, p, p, i, p, p, i)),
        ("ew_watch", i, (p, i)),
        ("ew_steps", c.c_char_p, ()),
        ("ew_expect", None, (i,)),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def start(kernels: str = "") -> str | None:
    """Start the threads and choose an instruction set for the process, the best one for "". The one in use; None, and
    no change, if this machine has none such."""
    library = _library()
    name: bytes | None = library.ew_start(kernels.encode(), fixed_threads()) if library else None
    return name.decode() if name else None


@cache
def probe() -> str | None:
    """The best instruction set that the kernels have for this machine, in use from now on; None if there is none."""
    return start()


if hasattr(os, "register_at_fork"):
    # A forked child has no threads but its own: its first model starts new ones. One that came with it computes alone.
    os.register_at_fork(after_in_child=probe.cache_clear)


class _Span(c.Structure):
    _fields_ = (("start", c.c_int64), ("end", c.c_int64), ("layer", c.c_int), ("step", c.c_int))


@dataclass(frozen=True, slots=True)
class Watched:
    """One step of one layer (-1: the head); times in nanoseconds of the system's monotonic clock."""

    layer: int
    step: str
    start: int
    end: int


class Watch:
    """The steps of all native models of the process since it began."""

    def __init__(self, library: c.CDLL) -> None:
        self._library = library
        library.ew_watch(_room_of_spans().ctypes.data, MOST_SPANS)

    def finish(self) -> Iterator[Watched]:
        """End it. UsageError if there were more steps than there is room for."""
        count = self._library.ew_watch(None, 0)
        if count >= MOST_SPANS:
            raise UsageError(f"this ran more than the {MOST_SPANS} steps that can be recorded", hint="record less")
        names = self._library.ew_steps().decode().split()
        spans = (_Span * count).from_address(_room_of_spans().ctypes.data)
        return (Watched(one.layer, names[one.step], one.start, one.end) for one in spans)


@cache
def _room_of_spans() -> Array:
    """For the life of the process: a model that computes as a watch ends may still note a step."""
    return untouched(np.uint8, MOST_SPANS * c.sizeof(_Span))  # memory comes as it is written


@contextmanager
def watching() -> Iterator[Watch]:
    """Record what the native models of this process do. One recording at a time."""
    library = _library()
    assert library is not None  # callers know that the kernels are there
    watch = Watch(library)
    try:
        yield watch
    finally:
        library.ew_watch(None, 0)


@dataclass
class _Memory:
    """Keys and values of every layer for one session, bfloat16 as uint16, in the layouts of native.h."""

    arrays: list[tuple[Array, Array]]
    entries: Any  # an array of _KV that points to them


class NativeLM(LocalModel[_Memory]):
    """A bundle as a TokenModel on the native kernels. EngineError if `why_not` says so, or if memory is out;
    BundleError if its tensors are not those of its card."""

    KV_BYTES = 2

    def __init__(self, bundle: Bundle, *, slots: int = DEFAULTS.slots, context: int | None = DEFAULTS.context) -> None:
        super().__init__(bundle, slots=slots, context=context)
        reason = _unfit(bundle)
        if reason is not None:
            raise _cannot(bundle, reason)
        with _enough_memory():
            self._weights = _Weights(bundle, self.context, slots)
        self.weight_bytes = self._weights.bytes  # that decoding one token reads

    @staticmethod
    def why_not(bundle: Bundle) -> str | None:
        """Why these kernels cannot run the bundle; None if they can."""
        reason = _unfit(bundle)
        if reason is None and packed.indexed(bundle) is None:
            with _as_on_the_card(bundle):
                dense = [name for name, matrix in matrices(bundle).items() if isinstance(matrix, Dense)]
            return next(map(_not_quantized, dense), None)
        return reason

    @property
    def numerics(self) -> str:
        return f"native {probe()}"

    def new_kv(self) -> _Memory:
        with _enough_memory():
            return self._weights.new_kv()

    def embed(self, ids: IdArray) -> FloatArray:
        return self._weights.embedded(ids)

    def run(self, parts: Sequence[Part[_Memory]], hidden: FloatArray) -> FloatArray:
        """All at once: reading the weights is most of what a row costs, and it is paid once."""
        self._weights.run(parts, hidden)
        return hidden

    def project(self, hidden: FloatArray, out: FloatArray) -> None:
        self._weights.project(hidden, out)

    def expect(self, soon: bool) -> None:
        self._weights.expect(soon)

    def give_back(self) -> None:
        self._weights.give_back()

    def cuts_at(self, layer: int) -> bool:
        return 0 <= layer <= self.card.layers

    def _release(self) -> None:
        self._weights.close()
        del self._weights


class _Weights:
    """The packed model, and the calls that run it."""

    def __init__(self, bundle: Bundle, context: int, slots: int) -> None:
        library = _library()
        assert library is not None  # why_not was asked
        card = bundle.card
        self._library, self._card, self._capacity = library, card, -(-context // COLUMNS) * COLUMNS
        self._packed = packed.opened(bundle, partial(_shapes, card), library.ew_checksum) or self._pack(bundle)
        self._matrices = {name: _placed(place, self._packed.address) for name, place in self._packed.matrices.items()}
        self._turns = {
            name: _Turns(rope, self._capacity) for name, rope in card.ropes.items() if rope.inverse_frequencies
        }
        self._layers = (_Layer * card.layers)()
        for n, layer in enumerate(self._layers):
            self._fill(layer, n)
        self._table = None if card.tied or EMBED in self._matrices else self._embedding(bundle)
        self._norm = self._vector(FINAL_NORM)
        self._numbers = _numbers(card, self._capacity)
        self._space = library.ew_workspace_new(c.byref(self._numbers), CHUNK + slots, slots)
        if self._space is None:
            raise MemoryError("the workspace")
        self._free = weakref.finalize(self, library.ew_workspace_free, self._space)
        self._free.atexit = False  # a step thread may compute to the very end of the process

    @property
    def bytes(self) -> int:
        """Of what decoding reads."""
        return len(self._packed.memory)

    def give_back(self) -> None:
        self._packed.give_back()

    def expect(self, soon: bool) -> None:
        self._library.ew_expect(soon)

    def new_kv(self) -> _Memory:
        card, shape = self._card, (self._card.kv_heads, self._capacity, self._card.head_dim)
        arrays = [(untouched(np.uint16, *shape), untouched(np.uint16, *shape)) for _ in range(card.layers)]
        entries = (_KV * card.layers)(*(_KV(keys.ctypes.data, values.ctypes.data) for keys, values in arrays))
        return _Memory(arrays, entries)

    def run(self, parts: Sequence[Part[_Memory]], hidden: FloatArray) -> None:
        """Append the parts to their sessions; `hidden` goes through their layers in place, the wanted come first."""
        for turns in self._turns.values():
            turns.reach(max(part.position + len(part.values) for part in parts))
        layers = parts[0].layers
        sessions = (
            _Session(
                c.cast(c.byref(part.kv.entries, layers.start * c.sizeof(_KV)), c.POINTER(_KV)),
                part.position,
                len(part.values),
                part.want,
            )
            for part in parts
        )
        self._library.ew_layers(
            c.byref(self._numbers),
            c.byref(self._layers, layers.start * c.sizeof(_Layer)),
            len(layers),
            self._space,
            (_Session * len(parts))(*sessions),
            len(parts),
            hidden.ctypes.data,
        )

    def embedded(self, ids: IdArray) -> FloatArray:
        hidden = self._rows(ids)
        if self._card.embedding_scale != 1:
            hidden *= np.float32(self._card.embedding_scale)
        return hidden

    def _rows(self, ids: IdArray) -> FloatArray:
        if self._table is not None:
            return self._table.rows(ids).dense()
        rows = np.empty((len(ids), self._card.hidden), np.float32)
        self._library.ew_rows(
            self._matrix(HEAD if self._card.tied else EMBED), ids.ctypes.data, len(ids), rows.ctypes.data
        )
        return rows

    def project(self, hidden: FloatArray, out: FloatArray) -> None:
        card, padded = self._card, -(-self._card.vocab // COLUMNS) * COLUMNS
        to = out if padded == card.vocab else np.empty((len(out), padded), dtype=np.float32)
        self._library.ew_head(
            c.byref(self._numbers),
            self._norm,
            c.byref(self._matrices[HEAD]),
            self._space,
            len(hidden),
            hidden.ctypes.data,
            to.ctypes.data,
            padded,
        )
        if to is not out:
            out[:] = to[:, : card.vocab]
        if card.logit_scale != 1:
            out *= np.float32(card.logit_scale)
        if card.logit_cap:
            np.tanh(np.divide(out, np.float32(card.logit_cap), out=out), out=out)
            out *= np.float32(card.logit_cap)

    def close(self) -> None:
        self._free()

    def _fill(self, layer: _Layer, n: int) -> None:
        for place, names in ((layer.qkv, ("qkv", "q", "k", "v")), (layer.gate_up, ("gate_up", "gate", "up"))):
            there = [name for name in names if f"layer{n}.{name}" in self._matrices]
            for i, name in enumerate(there):
                place[i] = self._matrix(f"layer{n}.{name}")
        layer.o, layer.down = self._matrix(f"layer{n}.o"), self._matrix(f"layer{n}.down")
        for field in VECTORS:
            setattr(layer, field, self._vector(f"layer{n}.{field}"))
        turn = self._card.rope_of(n)
        if turn in self._turns:
            turns = self._turns[turn]
            layer.cos, layer.sin, layer.turned = turns.cos.ctypes.data, turns.sin.ctypes.data, 2 * turns.cos.shape[1]
        layer.window = self._card.window(n)

    def _matrix(self, name: str) -> int:
        return c.addressof(self._matrices[name])

    def _vector(self, name: str) -> int | None:
        values = self._packed.vector(name)
        return None if values is None else int(values.ctypes.data)

    def _pack(self, bundle: Bundle) -> packed.Packed:
        manifest = sha256(bundle.path / MANIFEST)
        with _as_on_the_card(bundle):
            found = {name: _quantized(bundle, name, matrix) for name, matrix in matrices(bundle).items()}
            rows = vectors(bundle)
            shapes = {name: m.shape for name, m in found.items()} | {name: (v.size,) for name, v in rows.items()}
            _compare(shapes, _shapes(bundle.card, shapes))
        return packed.made(
            bundle,
            manifest,
            found,
            rows,
            fits_half=self._fits_half,
            pack=self._pack_one,
            checksum=self._library.ew_checksum,
        )

    def _embedding(self, bundle: Bundle) -> Matrix:
        """A table of embeddings that is not packed."""
        with _as_on_the_card(bundle):
            table = embedding(bundle)
            if isinstance(table, Quantized):
                table = _quantized(bundle, EMBED, table)
            _compare({EMBED: table.shape}, {EMBED: (self._card.vocab, self._card.hidden)})
            return table

    def _fits_half(self, matrix: Quantized) -> bool:
        kind = _Matrix(*matrix.shape, matrix.bits, matrix.block)
        return bool(self._library.ew_fits_half(c.byref(kind), *_factors(matrix)))

    def _pack_one(self, matrix: Quantized, place: packed.Place, address: int) -> None:
        codes = np.ascontiguousarray(matrix.packed)
        self._library.ew_pack(c.byref(_placed(place, address)), codes.ctypes.data, *_factors(matrix))


class _Turns:
    """`cos` and `sin` of a rope, float32 [capacity, dims / 2], as far as positions have come: those of a context of a
    million would take half a gigabyte, and seconds to compute."""

    def __init__(self, rope: Rope, capacity: int) -> None:
        self.cos, self.sin = (untouched(np.float32, capacity, len(rope.inverse_frequencies)) for _ in range(2))
        self._rope, self._ready = rope, 0

    def reach(self, end: int) -> None:
        """Make those of the positions below `end`."""
        if end > self._ready:
            positions = min(max(end, 2 * self._ready, FIRST_TURNS), len(self.cos))
            for room, numbers in zip((self.cos, self.sin), self._rope.tables(positions), strict=True):
                room[self._ready : positions] = numbers[self._ready :]
            self._ready = positions


def _placed(place: packed.Place, address: int) -> _Matrix:
    minima = None if place.minima is None else address + place.minima
    kind = (place.outputs, place.inputs, place.bits, place.block, place.factor_bytes)
    return _Matrix(*kind, address + place.codes, address + place.scales, minima)


def _factors(matrix: Quantized) -> tuple[int, int | None, int, int]:
    """Scales and minima as the library takes them; the matrix keeps them alive."""
    scales, minima = matrix.scales, matrix.minima
    if minima is None:
        return scales.ctypes.data, None, 0, 0
    return scales.ctypes.data, minima.ctypes.data, minima.strides[0] // 4, minima.strides[1] // 4


def _quantized(bundle: Bundle, name: str, matrix: Matrix) -> Quantized:
    """The matrix with its numbers where C can read them. ValueError if its parts are not of one matrix."""
    if isinstance(matrix, Dense):
        raise _cannot(bundle, _not_quantized(name))
    codes, *factors = matrix.arrays
    blocks = matrix.scales.shape
    kinds = codes.dtype == np.uint8 and all(part.dtype == np.float32 for part in factors)
    shapes = codes.shape == (*blocks, matrix.block * matrix.bits // 8) and all(part.shape == blocks for part in factors)
    if not (kinds and shapes and len(blocks) == 2 and matrix.bits in (4, 8) and matrix.block in (16, 32)):
        raise ValueError(f"{name} has the parts {[(part.shape, str(part.dtype)) for part in matrix.arrays]}")
    scales, *minima = (
        np.require(part, requirements="A") for part in factors
    )  # small ones lie where their graph has them
    return matrix.of([np.ascontiguousarray(codes), np.ascontiguousarray(scales), *minima])


def _shapes(card: Card, there: Container[str]) -> packed.Shapes:
    """Of every matrix and vector of a model of this card. Of what may be fused or not, or be an embedding of its own,
    as it is there."""
    heads, kept, hidden = card.heads * card.head_dim, card.kv_heads * card.head_dim, card.hidden
    normed = card.qk_norm_sizes or (0, 0)
    vectors = {
        "attention_norm": hidden * card.pre_norm,
        "q_norm": normed[0],
        "k_norm": normed[1],
        "attention_post_norm": hidden * card.post_norm,
        "ffn_norm": hidden * card.pre_norm,
        "ffn_post_norm": hidden * card.post_norm,
        "qkv_bias": (heads + 2 * kept) * card.qkv_bias,
        "o_bias": hidden * card.attention_out_bias,
        "gate_up_bias": 2 * card.ffn * card.ffn_bias,
        "down_bias": hidden * card.ffn_bias,
    }
    shapes: dict[str, tuple[int, ...]] = {FINAL_NORM: (hidden,), HEAD: (card.vocab, hidden)}
    if EMBED in there and not card.tied:
        shapes[EMBED] = shapes[HEAD]
    for n in range(card.layers):
        shapes |= {f"layer{n}.{name}": (count,) for name, count in vectors.items() if count}
        shapes |= {f"layer{n}.o": (hidden, heads), f"layer{n}.down": (hidden, card.ffn)}
        for fused, parts in (
            ("qkv", {"q": heads, "k": kept, "v": kept}),
            ("gate_up", dict.fromkeys(("gate", "up"), card.ffn)),
        ):
            outputs = {fused: sum(parts.values())} if f"layer{n}.{fused}" in there else parts
            shapes |= {f"layer{n}.{name}": (size, hidden) for name, size in outputs.items()}
    return shapes


def _compare(found: packed.Shapes, wanted: packed.Shapes) -> None:
    """ValueError if they differ."""
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise ValueError(f"{name} has the shape {found.get(name)} where {wanted.get(name)} is wanted")


@contextmanager
def _as_on_the_card(bundle: Bundle) -> Iterator[None]:
    """BundleError where a bundle that somebody else made has not the tensors that its card tells of."""
    try:
        yield
    except (LookupError, ValueError, TypeError, ArithmeticError) as e:
        why = f"the tensors of {bundle.name!r} are not those of its card: {e}"
        raise BundleError(why, hint="pull the model again") from e


@contextmanager
def _enough_memory() -> Iterator[None]:
    try:
        yield
    except (MemoryError, OverflowError, OSError) as e:
        if isinstance(e, OSError) and e.errno != errno.ENOMEM:
            raise
        raise EngineError("there is not enough memory for the model", hint="take a smaller model or context") from e


def _unfit(bundle: Bundle) -> str | None:
    """Why the kernels cannot run it, as far as its manifest tells."""
    card = bundle.card
    if probe() is None:
        return "the native kernels were not built for this machine"
    if bundle.manifest.quantization.get("activations") != "int8":
        return "its activations are not int8"
    sizes = (card.hidden, card.ffn, card.heads * card.head_dim)
    if any(size % BLOCK for size in sizes):
        return f"its sizes {sizes} are not multiples of {BLOCK}"
    if card.head_dim % COLUMNS or card.head_dim > MOST_HEAD:
        return f"its heads of {card.head_dim} are not multiples of {COLUMNS} up to {MOST_HEAD}"
    if max(*sizes, card.layers) > MOST_SIZE or max(card.vocab, card.context) > MOST_ROWS:
        return f"its sizes {(*sizes, card.layers, card.vocab, card.context)} are beyond all models"
    return None


def _not_quantized(name: str) -> str:
    return f"{name} is not quantized"


def _cannot(bundle: Bundle, reason: str) -> EngineError:
    return EngineError(f"the native kernels cannot run {bundle.name}: {reason}", hint="use the onnx engine")


def _numbers(card: Card, capacity: int) -> _Card:
    return _Card(
        hidden=card.hidden,
        heads=card.heads,
        kv_heads=card.kv_heads,
        head_dim=card.head_dim,
        ffn=card.ffn,
        capacity=capacity,
        gelu=card.activation == "gelu_tanh",
        whole_norm=card.qk_norm == "whole",
        norm_eps=card.norm_eps,
        attention_scale=card.head_dim**-0.5 if card.attention_scale is None else card.attention_scale,
        attention_cap=card.attention_cap,
        residual_scale=card.residual_scale,
    )
