"""Coded tensors: what goes from one half of a network to the other (docs/formats/features.md)."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from edgewise.errors import BadFrame, CodecOverflow, UsageError
from edgewise.wire import steps
from edgewise.wire.steps import NEIGHBOURS, NO_CHANNELS, Steps

Array = npt.NDArray[Any]

MAGIC: Final = b"EWFT"
FORMAT: Final = 1
LIMIT_BYTES: Final = 256 << 20  # of all tensors together, decoded
MOST_TENSORS, MOST_NAME, MOST_AXES, MOST_PLANES = 256, 1024, 16, 5
EXACT, HALF, STEPS = 0, 1, 2
CODECS: Final = ("exact", "fp16", "int8", "int7", "int6", "int5", "int4", "int3", "int2")
HALF_LIMIT: Final = float(np.finfo(np.float16).max)
DTYPES: Final = tuple(
    np.dtype(name)
    for name in (
        *("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
        *("float16", "float32", "float64"),
    )
)

_HEADER = struct.Struct("<4sBBHHHI")
_TENSOR = struct.Struct("<HBBBBI")
_STEPS = struct.Struct("<fBBBB")
HEADER_BYTES: Final = _HEADER.size


@dataclass(frozen=True, slots=True)
class Coded:
    """A tensor as it lies in a container, not unpacked yet. `coded_bytes` are those of its whole record."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    codec: int
    packed: bool
    coded_bytes: int
    parameters: tuple[float, int, int, int] | None  # step, channel axis, prediction, planes
    payload: memoryview

    @property
    def raw_bytes(self) -> int:
        """As it lies in memory, decoded; as if no axis were empty, for numpy has limits there too."""
        return self.dtype.itemsize * math.prod(max(axis, 1) for axis in self.shape)

    @property
    def payload_bytes(self) -> int:
        """Unpacked."""
        if self.parameters is None:
            return math.prod(self.shape) * (2 if self.codec == HALF else self.dtype.itemsize)
        _, axis, _, planes = self.parameters
        return planes * steps.count(self.shape, axis)

    def tensor(self) -> Array:
        """BadFrame if the payload is not what the header says."""
        data = self._unpacked()
        if self.codec == EXACT:
            return _numbers(data, self.dtype, self.shape, self.packed)
        with np.errstate(over="ignore", invalid="ignore"):
            if self.parameters is None:
                found = _numbers(data, np.dtype(np.float16), self.shape, self.packed).astype(self.dtype)
            else:
                step, axis, prediction, planes = self.parameters
                lines = np.frombuffer(data, np.uint8).reshape(planes, -1)
                found = steps.decoded(Steps(step, axis, prediction, lines), self.shape).astype(self.dtype, copy=False)
        if not np.isfinite(found).all():
            raise BadFrame(f"the tensor {self.name!r} came with numbers that are not finite")
        return found

    def _unpacked(self) -> bytes | memoryview:
        if not self.packed:
            if len(self.payload) != self.payload_bytes:
                raise BadFrame(f"{self.name!r} has {len(self.payload)} bytes, its shape wants {self.payload_bytes}")
            return self.payload
        inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            data = inflate.decompress(self.payload, self.payload_bytes + 1)  # and never more: 0 would be no limit
        except zlib.error as error:
            raise BadFrame(f"the tensor {self.name!r} does not unpack: {error}") from error
        if len(data) != self.payload_bytes or not inflate.eof or inflate.unused_data:
            raise BadFrame(f"the tensor {self.name!r} does not unpack to {self.payload_bytes} bytes")
        return data


@dataclass(frozen=True)
class Container:
    """A container whose headers are sound; payloads are unpacked when asked for."""

    label: str
    coded: tuple[Coded, ...]

    @cached_property
    def tensors(self) -> Mapping[str, Array]:
        """All of them by name. BadFrame if a payload is not what its header says."""
        return {one.name: one.tensor() for one in self.coded}


def encode(tensors: Mapping[str, Array], codec: str = "fp16", *, label: str = "") -> bytes:
    """A container. `codec` is one of CODECS; integers and booleans are exact under each. UsageError for an unknown
    codec or what the format cannot hold, CodecOverflow for numbers that the codec cannot: above 65,504 with fp16,
    infinite or not a number with all but exact."""
    name = label.encode()
    if len(tensors) > MOST_TENSORS or len(name) > MOST_NAME:
        raise UsageError(f"{len(tensors)} tensors and a label of {len(name)} bytes; {MOST_TENSORS} and {MOST_NAME} fit")
    body = b"".join([name, *(_record(name, np.asarray(tensor), codec) for name, tensor in tensors.items())])
    return _HEADER.pack(MAGIC, FORMAT, 0, len(tensors), len(name), 0, zlib.crc32(body)) + body


def read(payload: bytes | memoryview, *, limit_bytes: int = LIMIT_BYTES) -> Container:
    """The headers of a container. BadFrame for anything that is none, or that would take more than `limit_bytes`
    decoded."""
    data = memoryview(payload)
    if len(data) < HEADER_BYTES:
        raise BadFrame(f"{len(data)} bytes are no features; a header has {HEADER_BYTES}")
    magic, version, zero, count, label_bytes, zeros, checksum = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise BadFrame(f"features begin with {MAGIC!r}, these bytes with {bytes(magic)!r}")
    if version != FORMAT:
        raise BadFrame(f"the features have format {version}, this version reads {FORMAT}", code="version")
    if zero or zeros or count > MOST_TENSORS or label_bytes > MOST_NAME:
        raise BadFrame(f"the header announces {count} tensors and a label of {label_bytes} bytes")
    if zlib.crc32(data[HEADER_BYTES:]) != checksum:
        raise BadFrame("the features' checksum does not fit", code="checksum")
    reader = _Reader(data, HEADER_BYTES)
    label = reader.text(label_bytes)
    coded, left = [], limit_bytes
    for _ in range(count):
        coded.append(_tensor(reader))
        left -= coded[-1].raw_bytes
        if left < 0 or coded[-1].payload_bytes > 5 * limit_bytes:
            raise BadFrame(f"the tensors take more than {limit_bytes} bytes, which is the limit here", code="size")
    if reader.at != len(data):
        raise BadFrame(f"{len(data) - reader.at} bytes are left behind the last tensor")
    if len({one.name for one in coded}) < len(coded):
        raise BadFrame("two tensors have the same name")
    return Container(label, tuple(coded))


def decode(payload: bytes | memoryview, *, limit_bytes: int = LIMIT_BYTES) -> Mapping[str, Array]:
    """The tensors of a container. BadFrame as `read`, and for payloads that are not what their headers say."""
    return read(payload, limit_bytes=limit_bytes).tensors


def check_codec(codec: str) -> None:
    if codec not in CODECS:
        raise UsageError(f"there is no codec {codec!r}; allowed are {', '.join(CODECS)}")


# Coding


def _record(name: str, tensor: Array, codec: str) -> bytes:
    check_codec(codec)
    spelt = name.encode()
    if len(spelt) > MOST_NAME or tensor.ndim > MOST_AXES or tensor.dtype not in DTYPES:
        raise UsageError(
            f"the tensor {name[:100]!r} is {tensor.dtype} with {tensor.ndim} axes; allowed are names of {MOST_NAME} "
            f"bytes, {MOST_AXES} axes and {', '.join(str(dtype) for dtype in DTYPES)}"
        )
    number, parameters, lines, plain = _payload(name, tensor, codec)
    packed = _deflated(lines)
    data = packed if len(packed) < len(plain) else plain
    head = _TENSOR.pack(len(spelt), DTYPES.index(tensor.dtype), number, data is packed, tensor.ndim, len(data))
    axes = struct.pack(f"<{tensor.ndim}I", *tensor.shape)
    return b"".join((head, axes, parameters, spelt, data))


def _payload(name: str, tensor: Array, codec: str) -> tuple[int, bytes, bytes, bytes]:
    """The codec's number and parameters, and the payload as it is to be packed and as it is."""
    if codec == "exact" or tensor.dtype.kind != "f":
        return EXACT, b"", *_laid_out(tensor)
    largest = float(np.abs(tensor).max(initial=0))
    allowed = HALF_LIMIT if codec == "fp16" else float(np.finfo(np.float32).max)
    if not largest <= allowed:
        raise CodecOverflow(
            f"the tensor {name!r} holds {largest:.6g}, {codec} holds up to {allowed:.6g}",
            hint="take int8 or exact" if largest < math.inf else "the layers before it are broken",
        )
    if codec == "fp16":
        return HALF, b"", *_laid_out(tensor.astype(np.float16))
    coded = steps.coded(tensor.astype(np.float32, copy=False), int(codec.removeprefix("int")))
    plain = coded.planes.tobytes()
    return STEPS, _STEPS.pack(coded.step, coded.channel_axis, coded.prediction, len(coded.planes), 0), plain, plain


def _laid_out(tensor: Array) -> tuple[bytes, bytes]:
    """Its bytes in planes, and as they lie in memory."""
    plain = np.ascontiguousarray(tensor, tensor.dtype.newbyteorder("<")).tobytes()
    width = tensor.dtype.itemsize
    return np.frombuffer(plain, np.uint8).reshape(-1, width).T.tobytes(), plain


def _deflated(data: bytes) -> bytes:
    """By Huffman's code and runs alone: longer matches are rare among such numbers, and cost more than they save."""
    deflate = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_RLE)
    return deflate.compress(data) + deflate.flush()


# Reading


@dataclass
class _Reader:
    data: memoryview
    at: int

    def take(self, count: int) -> memoryview:
        if count > len(self.data) - self.at:
            raise BadFrame(f"{count} bytes are announced at byte {self.at}, of {len(self.data)} in all")
        self.at += count
        return self.data[self.at - count : self.at]

    def fields(self, form: struct.Struct) -> tuple[Any, ...]:
        return form.unpack(self.take(form.size))

    def text(self, count: int) -> str:
        try:
            return str(self.take(count), "utf-8")
        except UnicodeDecodeError as error:
            raise BadFrame(f"a name is not UTF-8: {error}") from error


def _tensor(reader: _Reader) -> Coded:
    start = reader.at
    name_bytes, dtype, codec, packing, axes, payload_bytes = reader.fields(_TENSOR)
    if name_bytes > MOST_NAME or dtype >= len(DTYPES) or codec > STEPS or packing > 1 or axes > MOST_AXES:
        raise BadFrame(f"a tensor announces dtype {dtype}, codec {codec}, packing {packing} and {axes} axes")
    if codec != EXACT and DTYPES[dtype].kind != "f":
        raise BadFrame(f"a tensor of {DTYPES[dtype]} announces codec {codec}; such are exact")
    shape = reader.fields(struct.Struct(f"<{axes}I"))
    parameters = _parameters(reader, axes) if codec == STEPS else None
    name = reader.text(name_bytes)
    payload = reader.take(payload_bytes)
    return Coded(name, DTYPES[dtype], shape, codec, bool(packing), reader.at - start, parameters, payload)


def _parameters(reader: _Reader, axes: int) -> tuple[float, int, int, int]:
    step, channel_axis, prediction, planes, zero = reader.fields(_STEPS)
    good = prediction < len(NEIGHBOURS) and 1 <= planes <= MOST_PLANES and not zero
    good = good and 0 < step < math.inf and (channel_axis == NO_CHANNELS or channel_axis < axes)
    if not good or any(-axis > axes for axis in NEIGHBOURS[prediction]):
        raise BadFrame(f"steps of {step}, channel axis {channel_axis}, prediction {prediction}, {planes} planes")
    return step, channel_axis, prediction, planes


def _numbers(data: bytes | memoryview, dtype: np.dtype[Any], shape: tuple[int, ...], in_planes: bool) -> Array:
    lines = np.frombuffer(data, np.uint8)
    if in_planes:
        lines = lines.reshape(dtype.itemsize, -1).T
    if dtype.kind == "b":  # a byte that is no boolean must not become one
        return np.not_equal(lines, 0).reshape(shape)
    found = np.ascontiguousarray(lines).reshape(-1).view(dtype.newbyteorder("<"))
    shaped: Array = found.astype(dtype).reshape(shape)
    return shaped
