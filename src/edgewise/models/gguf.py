"""Reading GGUF files (versions 2 and 3, little-endian) through a memory map.

A file from anywhere is input, not truth: every count, length and offset is checked against the file's size before
anything is allocated, so a damaged or hostile file ends in a SourceError. Tensor bytes are never read here; `raw`
hands out a view, and the block writer decides what to do with the tensor's type.

    magic "GGUF" · version u32 · tensor count u64 · field count u64
    fields:   key string · value type u32 · value
    tensors:  name string · dimension count u32 · dimensions u64[], innermost first · type u32 · offset u64
    padding to `general.alignment` · tensor data (offsets count from here)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

import numpy as np
import numpy.typing as npt

from edgewise.errors import SourceError, UnsupportedModel

ByteArray = npt.NDArray[np.uint8]

VERSIONS: Final = (2, 3)
MAX_FIELDS: Final = 1 << 16
MAX_TENSORS: Final = 1 << 20
MAX_DIMENSIONS: Final = 4  # ggml's own limit
MAX_ARRAY_ITEMS: Final = 1 << 24  # the largest vocabularies have under 2**19 tokens
MAX_ARRAY_DEPTH: Final = 2  # an array in an array
MAX_STRING_BYTES: Final = 1 << 26
DEFAULT_ALIGNMENT: Final = 32

DOWNLOAD_AGAIN: Final = "the file is damaged: download it again"


@dataclass(frozen=True, slots=True)
class BlockType:
    """How a tensor type stores its rows: `nbytes` bytes hold `elements` neighbours of the innermost dimension."""

    name: str
    elements: int
    nbytes: int


# ggml's numbers. Numbers that are missing here were withdrawn by ggml or are newer than this table.
BLOCK_TYPES: Final[Mapping[int, BlockType]] = MappingProxyType(
    {
        number: BlockType(name, elements, nbytes)
        for number, name, elements, nbytes in (
            (0, "F32", 1, 4),
            (1, "F16", 1, 2),
            (2, "Q4_0", 32, 18),
            (3, "Q4_1", 32, 20),
            (6, "Q5_0", 32, 22),
            (7, "Q5_1", 32, 24),
            (8, "Q8_0", 32, 34),
            (9, "Q8_1", 32, 36),
            (10, "Q2_K", 256, 84),
            (11, "Q3_K", 256, 110),
            (12, "Q4_K", 256, 144),
            (13, "Q5_K", 256, 176),
            (14, "Q6_K", 256, 210),
            (15, "Q8_K", 256, 292),
            (16, "IQ2_XXS", 256, 66),
            (17, "IQ2_XS", 256, 74),
            (18, "IQ3_XXS", 256, 98),
            (19, "IQ1_S", 256, 50),
            (20, "IQ4_NL", 32, 18),
            (21, "IQ3_S", 256, 110),
            (22, "IQ2_S", 256, 82),
            (23, "IQ4_XS", 256, 136),
            (24, "I8", 1, 1),
            (25, "I16", 1, 2),
            (26, "I32", 1, 4),
            (27, "I64", 1, 8),
            (28, "F64", 1, 8),
            (29, "IQ1_M", 256, 56),
            (30, "BF16", 1, 2),
            (34, "TQ1_0", 256, 54),
            (35, "TQ2_0", 256, 66),
            (39, "MXFP4", 32, 17),
            (40, "NVFP4", 64, 36),
            (41, "Q1_0", 128, 18),
        )
    }
)

_STRING: Final = 8
_ARRAY: Final = 9
_BOOL: Final = 7
_NUMBERS: Final[Mapping[int, np.dtype[np.generic]]] = MappingProxyType(
    {
        number: np.dtype(code)
        for number, code in (
            (0, "u1"),
            (1, "i1"),
            (2, "<u2"),
            (3, "<i2"),
            (4, "<u4"),
            (5, "<i4"),
            (6, "<f4"),
            (_BOOL, "u1"),
            (10, "<u8"),
            (11, "<i8"),
            (12, "<f8"),
        )
    }
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor. `shape` is rows first (numpy's order). `type` is ggml's name, or "type N" for a number that this
    version does not know; its `nbytes` is then 0. `offset` counts from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True, eq=False)
class GGUF:
    """An open GGUF file. `fields` hold python scalars, strings, lists of strings and numpy arrays."""

    path: Path
    version: int
    fields: Mapping[str, object]
    tensors: Mapping[str, TensorInfo]
    _data: ByteArray

    @classmethod
    def open(cls, path: Path) -> GGUF:
        """Map the file and read its fields and tensor table. SourceError if it is no GGUF or is damaged."""
        data = _map(path)
        cursor = _Cursor(data.data, path)
        version, tensor_count, field_count = _read_header(cursor)
        fields = _read_fields(cursor, field_count)
        tensors = _read_tensors(cursor, tensor_count, _alignment(cursor, fields))
        return cls(path, version, MappingProxyType(fields), MappingProxyType(tensors), data)

    def raw(self, name: str) -> ByteArray:
        """The tensor's bytes as a read-only uint8 view of the map. SourceError if there is no such tensor,
        UnsupportedModel if its type is unknown and with it its size."""
        info = self.tensors.get(name)
        if info is None:
            raise SourceError(
                f"{self.path.name} has no tensor {name!r}",
                hint="the file is incomplete, or its model is of another family",
            )
        if not info.nbytes:
            raise UnsupportedModel(
                f"tensor {name!r} of {self.path.name} has the unknown {info.type}",
                hint="run the file with the llamacpp engine",
            )
        return self._data[info.offset : info.offset + info.nbytes]


class _Cursor:
    """A position in the file that never passes its end."""

    def __init__(self, data: memoryview, path: Path) -> None:
        self.data = data
        self.path = path
        self.at = 0

    def broken(self, what: str, hint: str = DOWNLOAD_AGAIN) -> SourceError:
        return SourceError(f"{self.path.name}: {what}", hint=hint)

    def need(self, nbytes: int, what: str) -> None:
        left = len(self.data) - self.at
        if nbytes > left:
            raise self.broken(f"{what} needs {nbytes} bytes at byte {self.at}, the file has {left} more")

    def take(self, nbytes: int, what: str) -> memoryview:
        self.need(nbytes, what)
        self.at += nbytes
        return self.data[self.at - nbytes : self.at]

    def u32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        return int.from_bytes(self.take(8, what), "little")

    def count(self, limit: int, item_bytes: int, what: str) -> int:
        """A u64 count of items of at least `item_bytes` each, all of which must fit the rest of the file."""
        number = self.u64(f"the count of {what}")
        if number > limit:
            raise self.broken(f"{number} {what} at byte {self.at - 8}, at most {limit} are allowed")
        self.need(number * item_bytes, f"{number} {what}")
        return number

    def string(self, what: str) -> str:
        return self.strings(1, what)[0]

    def strings(self, count: int, what: str) -> list[str]:
        # The loop runs once per token and merge of a vocabulary, so it keeps its position in a local.
        data, at, end = self.data, self.at, len(self.data)
        texts = []
        for _ in range(count):
            start = at + 8
            length = int.from_bytes(data[at:start], "little")
            at = start + length
            if at > end or length > MAX_STRING_BYTES:
                allowed = max(0, min(MAX_STRING_BYTES, end - start))
                raise self.broken(
                    f"{what} has {length} bytes of text at byte {start - 8}, at most {allowed} are possible"
                )
            try:
                texts.append(str(data[start:at], "utf-8"))
            except UnicodeDecodeError as error:
                raise self.broken(f"{what} has a string at byte {start} that is not UTF-8") from error
        self.at = at
        return texts

    def value(self, kind: int, what: str, depth: int = 0) -> object:
        """A value of the given type: python scalar, str, numpy array, list of str or list of arrays."""
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            return self.array(what, depth + 1)
        return self.numbers(kind, 1, what)[0].item()

    def array(self, what: str, depth: int) -> object:
        if depth > MAX_ARRAY_DEPTH:
            raise self.broken(f"{what} nests arrays deeper than {MAX_ARRAY_DEPTH}")
        kind = self.u32(f"the item type of {what}")
        count = self.count(MAX_ARRAY_ITEMS, self._least_bytes(kind, what), f"items of {what}")
        if kind == _STRING:
            return self.strings(count, what)
        if kind == _ARRAY:
            return [self.array(what, depth + 1) for _ in range(count)]
        return self.numbers(kind, count, what)

    def numbers(self, kind: int, count: int, what: str) -> npt.NDArray[np.generic]:
        item_bytes = self._least_bytes(kind, what)
        items = np.frombuffer(self.take(count * item_bytes, what), dtype=_NUMBERS[kind])
        if kind != _BOOL:
            return items.copy()  # own memory: aligned, and free of the map
        if (items > 1).any():
            raise self.broken(f"{what} has a boolean that is neither 0 nor 1")
        return items.astype(np.bool_)

    def _least_bytes(self, kind: int, what: str) -> int:
        if kind == _STRING:
            return 8
        if kind == _ARRAY:
            return 12
        if kind not in _NUMBERS:
            raise self.broken(f"{what} has the value type {kind}, known are 0..12")
        return _NUMBERS[kind].itemsize


def _map(path: Path) -> ByteArray:
    try:
        if not path.is_file():
            raise SourceError(f"{path} is not a file", hint="give the path of a .gguf file")
        if path.stat().st_size == 0:
            raise SourceError(f"{path} is empty", hint=DOWNLOAD_AGAIN)
        return np.memmap(path, dtype=np.uint8, mode="r")
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}", hint="check its permissions") from error


def _read_header(cursor: _Cursor) -> tuple[int, int, int]:
    """Version, tensor count, field count."""
    if bytes(cursor.take(4, "the magic")) != b"GGUF":
        raise cursor.broken(
            f"it starts with {bytes(cursor.data[:4])!r}, a GGUF file starts with b'GGUF'", "give a .gguf file"
        )
    version = cursor.u32("the version")
    if version and not version & 0xFFFF:
        raise cursor.broken("it is big-endian, only little-endian is read", "get the little-endian file of this model")
    if version not in VERSIONS:
        raise cursor.broken(f"it has GGUF version {version}, read are 2 and 3", "convert it with a current llama.cpp")
    tensor_count = cursor.count(MAX_TENSORS, 32, "tensors")
    field_count = cursor.count(MAX_FIELDS, 13, "fields")
    return version, tensor_count, field_count


def _read_fields(cursor: _Cursor, count: int) -> dict[str, object]:
    fields: dict[str, object] = {}
    for index in range(count):
        key = cursor.string(f"the key of field {index}")
        if key in fields:
            raise cursor.broken(f"the field {key!r} appears twice")
        kind = cursor.u32(f"the value type of {key!r}")
        fields[key] = cursor.value(kind, f"the field {key!r}")
    return fields


def _alignment(cursor: _Cursor, fields: Mapping[str, object]) -> int:
    alignment = fields.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise cursor.broken(f"general.alignment is {alignment!r}, it must be a power of two")
    return alignment


def _read_tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, TensorInfo]:
    table = [_read_tensor(cursor, alignment) for _ in range(count)]
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, shape, kind, offset in table:
        if name in tensors:
            raise cursor.broken(f"the tensor {name!r} appears twice")
        tensors[name] = _place(cursor, name, shape, kind, start + offset)
    _refuse_overlaps(cursor, tensors.values())
    return tensors


def _read_tensor(cursor: _Cursor, alignment: int) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape (rows first), type number, offset from the start of the data."""
    name = cursor.string("a tensor's name")
    dimensions = cursor.u32(f"the dimension count of {name!r}")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise cursor.broken(f"the tensor {name!r} has {dimensions} dimensions, allowed are 1..{MAX_DIMENSIONS}")
    shape = tuple(cursor.u64(f"the dimensions of {name!r}") for _ in range(dimensions))[::-1]
    if 0 in shape:
        raise cursor.broken(f"the tensor {name!r} has the empty shape {shape}")
    kind = cursor.u32(f"the type of {name!r}")
    offset = cursor.u64(f"the offset of {name!r}")
    if offset % alignment:
        raise cursor.broken(f"the tensor {name!r} lies at offset {offset}, not a multiple of {alignment}")
    return name, shape, kind, offset


def _place(cursor: _Cursor, name: str, shape: tuple[int, ...], kind: int, offset: int) -> TensorInfo:
    """The tensor with its size, once it is known to lie inside the file."""
    block = BLOCK_TYPES.get(kind, BlockType(f"type {kind}", 1, 0))
    if shape[-1] % block.elements:
        raise cursor.broken(
            f"the tensor {name!r} has rows of {shape[-1]}, {block.name} needs multiples of {block.elements}"
        )
    nbytes = math.prod(shape) // block.elements * block.nbytes
    if offset + nbytes > len(cursor.data):
        raise cursor.broken(f"the tensor {name!r} ends at byte {offset + nbytes}, the file at {len(cursor.data)}")
    return TensorInfo(name, shape, block.name, offset, nbytes)


def _refuse_overlaps(cursor: _Cursor, tensors: Iterable[TensorInfo]) -> None:
    end, before = 0, ""
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        if tensor.offset < end:
            raise cursor.broken(f"the tensors {before!r} and {tensor.name!r} overlap at byte {tensor.offset}")
        end, before = tensor.offset + tensor.nbytes, tensor.name
