"""The weights in a bundle's graphs, by name and without the onnx package: its import takes longer than reading
every graph of a model. Only what `blocks.py` writes is understood; the format is protobuf as onnx.proto defines it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgewise.errors import BundleError
from edgewise.models.bundle import Bundle
from edgewise.models.weights import Dense, Matrix, Quantized
from edgewise.types import FloatArray

Array = npt.NDArray[Any]

# Field numbers of onnx.proto.
_GRAPH, _INITIALIZER = 7, 5
_DIMS, _TYPE, _NAME, _RAW, _EXTERNAL = 1, 2, 8, 9, 13
_KEY, _VALUE = 1, 2
_TYPES: dict[int, Any] = {1: np.float32, 2: np.uint8, 6: np.int32, 7: np.int64, 10: np.float16}
_BFLOAT16 = 16


class Tensors(Mapping[str, Array]):
    """The initializers of one graph file; large ones are read-only views of the mapped data file. What is read is
    verified first. BundleError if it is not what a bundle holds."""

    def __init__(self, bundle: Bundle, graph: str) -> None:
        self._bundle, self._graph = bundle, graph
        self._data: dict[str, Array] = {}
        path = bundle.file(graph)
        bundle.verify([graph])
        with self._readable():
            model = memoryview(path.read_bytes())
            graphs = [part for number, part in _fields(model) if number == _GRAPH]
            protos = [part for number, part in _fields(graphs[0]) if number == _INITIALIZER]
            self._found = {tensor.name: tensor for tensor in map(_Tensor.read, protos)}

    def __getitem__(self, name: str) -> Array:
        tensor = self._found[name]
        if not tensor.file:
            raw = np.frombuffer(tensor.raw, np.uint8)
        else:
            raw = self._mapped(tensor.file)[tensor.offset : tensor.offset + tensor.length]
        with self._readable():
            values: Array = raw.view(tensor.dtype)
            return values.reshape(tensor.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def _mapped(self, name: str) -> Array:
        if name not in self._data:
            file = str(Path(self._graph).parent / name)
            path = self._bundle.file(file)
            self._bundle.verify([file])
            self._data[name] = np.memmap(path, dtype=np.uint8, mode="r")
        return self._data[name]

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (LookupError, ValueError, TypeError, OverflowError) as e:
            why = f"{self._graph} of {self._bundle.name!r} is not readable: {e}"
            raise BundleError(why, hint="pull the model again") from e


# The names that blocks.py gives to a layer's vectors (docs/formats/bundle.md), by what they are.
VECTORS = {
    "attention_norm": ("attention_norm.scale",),
    "q_norm": ("q_norm.normed.scale",),
    "k_norm": ("k_norm.normed.scale",),
    "attention_post_norm": ("attention_out_norm.scale",),
    "ffn_norm": ("ffn_norm.scale",),
    "ffn_post_norm": ("ffn_out_norm.scale",),
    "qkv_bias": ("qkv.bias", "q.bias", "k.bias", "v.bias"),
    "o_bias": ("o.bias",),
    "gate_up_bias": ("gate_up.bias", "gate.bias", "up.bias"),
    "down_bias": ("down.bias",),
}
EMBED, HEAD, FINAL_NORM = "embed", "head", "norm"


def matrices(bundle: Bundle) -> dict[str, Matrix]:
    """All that layers and head multiply by: `layerN.qkv` or `layerN.q`, …; `head`. Also `embed`, if it is another one
    and of blocks."""
    card = bundle.card
    found: dict[str, Matrix] = {}
    inputs = dict.fromkeys(("qkv", "q", "k", "v", "gate_up", "gate", "up"), card.hidden)
    inputs |= {"o": card.heads * card.head_dim, "down": card.ffn}
    for layers, there in _blocks(bundle):
        names = [(f"layer{n}.{name}", size) for n in layers for name, size in inputs.items()]
        found |= {name: _matrix(there, name, size) for name, size in names if _prefix(there, name)}
    there = Tensors(bundle, bundle.manifest.graphs.head)
    if _prefix(there, EMBED):
        return found | {HEAD: _matrix(there, EMBED, card.hidden)}
    found[HEAD] = _matrix(there, HEAD, card.hidden)
    table = embedding(bundle)
    return found | ({EMBED: table} if isinstance(table, Quantized) else {})


def embedding(bundle: Bundle) -> Matrix:
    """The table of embeddings, [vocab, hidden]."""
    return _matrix(Tensors(bundle, bundle.manifest.graphs.embed), EMBED, bundle.card.hidden)


def vectors(bundle: Bundle) -> dict[str, FloatArray]:
    """Norms and biases: `layerN.` and a key of VECTORS, of which the parts stand one after the other; `norm`."""
    found = {FINAL_NORM: Tensors(bundle, bundle.manifest.graphs.head)["normed.scale"].astype(np.float32)}
    for layers, there in _blocks(bundle):
        for n in layers:
            for name, parts in VECTORS.items():
                values = [there[f"layer{n}.{part}"] for part in parts if f"layer{n}.{part}" in there]
                if values:
                    found[f"layer{n}.{name}"] = np.concatenate(values).astype(np.float32)
    return found


def _blocks(bundle: Bundle) -> Iterator[tuple[range, Tensors]]:
    for block in bundle.manifest.graphs.blocks:
        yield range(block.first, block.last + 1), Tensors(bundle, block.file)


def _prefix(found: Tensors, name: str) -> str | None:
    """What a matrix is called: a product that more is added to has a name of its own, but for a table that embeds too
    (which in older bundles had one as well, and stood there twice). None if it is not there."""
    return next((prefix for prefix in (name, f"{name}.q") if f"{prefix}.weight" in found), None)


def _matrix(found: Tensors, name: str, inputs: int) -> Matrix:
    prefix = _prefix(found, name)
    weight, scales = found[f"{prefix}.weight"], found.get(f"{prefix}.scales")
    if scales is None:
        return Dense(weight)
    minima = found[f"{name}.minima_t"].T if f"{name}.minima_t" in found else found.get(f"{name}.minima")
    block = inputs // scales.shape[1]
    return Quantized(weight.shape[2] * 8 // block, weight, scales, minima, block)


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: str
    dtype: Any
    shape: tuple[int, ...]
    raw: memoryview
    file: str = ""
    offset: int = 0
    length: int = 0

    @staticmethod
    def read(proto: memoryview) -> _Tensor:
        shape: list[int] = []
        kind, name, raw, external = 0, "", memoryview(b""), {}
        for number, value in _fields(proto):
            if number == _DIMS:
                shape += [value] if isinstance(value, int) else _numbers(value)
            elif number == _TYPE:
                kind = value
            elif number == _NAME:
                name = bytes(value).decode()
            elif number == _RAW:
                raw = value
            elif number == _EXTERNAL:
                entry = {n: bytes(v).decode() for n, v in _fields(value)}
                external[entry[_KEY]] = entry[_VALUE]
        place = (external["location"], int(external["offset"]), int(external["length"])) if external else ()
        return _Tensor(name, _type(kind), tuple(shape), raw, *place)


def _type(kind: int) -> Any:
    if kind == _BFLOAT16:
        import ml_dtypes  # not needed where the packed weights are at hand

        return ml_dtypes.bfloat16
    return _TYPES[kind]


def _fields(message: memoryview) -> Iterator[tuple[int, Any]]:
    """(field number, value): an int, or the bytes of a string or a message."""
    at = 0
    value: Any
    while at < len(message):
        key, at = _number(message, at)
        wire = key & 7
        if wire == 0:
            value, at = _number(message, at)
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
            continue
        elif wire == 2:
            size, at = _number(message, at)
            if size > len(message) - at:
                raise ValueError(f"a field of {size} bytes ends after its message")
            value, at = message[at : at + size], at + size
        else:
            raise ValueError(f"wire type {wire}")
        yield key >> 3, value


def _numbers(packed: memoryview) -> list[int]:
    at, values = 0, []
    while at < len(packed):
        value, at = _number(packed, at)
        values.append(value)
    return values


def _number(message: memoryview, at: int) -> tuple[int, int]:
    """A varint and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number of more than ten bytes")
