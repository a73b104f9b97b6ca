"""The constant tensors of a bundle's graphs, by name and without the onnx package: its import takes longer than reading
every graph of a model. Only what `blocks.py` writes is understood; the format is protobuf as onnx.proto defines it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from edgewise.errors import BundleError
from edgewise.models.bundle import Bundle

Array = npt.NDArray[Any]

# Field numbers of onnx.proto.
_GRAPH, _INITIALIZER = 7, 5
_DIMS, _TYPE, _NAME, _RAW, _EXTERNAL = 1, 2, 8, 9, 13
_KEY, _VALUE = 1, 2
_TYPES: dict[int, Any] = {1: np.float32, 2: np.uint8, 6: np.int32, 7: np.int64, 10: np.float16, 16: ml_dtypes.bfloat16}


def tensors(bundle: Bundle, graph: str) -> dict[str, Array]:
    """The initializers of one graph file; large ones are read-only views of the mapped data file. BundleError if the
    file is not what a bundle holds."""
    path = bundle.file(graph)
    data: dict[str, Array] = {}
    try:
        model = memoryview(path.read_bytes())
        graphs = [part for number, part in _fields(model) if number == _GRAPH]
        protos = [part for number, part in _fields(graphs[0]) if number == _INITIALIZER]
        found = [_Tensor.read(proto) for proto in protos]
        for name in {t.file for t in found if t.file}:
            data[name] = np.memmap(bundle.file(str(Path(graph).parent / name)), dtype=np.uint8, mode="r")
        return {t.name: t.array(data) for t in found}
    except (LookupError, ValueError, TypeError, OverflowError) as e:
        raise BundleError(f"{graph} of {bundle.name!r} is not readable: {e}", hint="pull the model again") from e


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
        return _Tensor(name, _TYPES[kind], tuple(shape), raw, *place)

    def array(self, data: dict[str, Array]) -> Array:
        inside = np.frombuffer(self.raw, np.uint8)
        raw: Array = data[self.file][self.offset : self.offset + self.length] if self.file else inside
        values: Array = raw.view(self.dtype)
        return values.reshape(self.shape)


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
