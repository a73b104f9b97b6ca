"""Boundary codecs: rows of hidden states to bytes of a fixed size and back (docs/formats/boundary.md).

A row is coded by itself: it has the same bytes, and decodes to the same bits, alone or in any batch and on any machine.
For that, every step is exact or an elementwise operation of IEEE float32 in a fixed order: no sums by numpy, no BLAS.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from edgewise.errors import CodecOverflow, RemoteBroken, UsageError
from edgewise.types import FloatArray
from edgewise.wire.rotation import padded, rotate, unrotate

ByteArray = npt.NDArray[np.uint8]
HALF_LIMIT: Final = float(np.finfo(np.float16).max)
LARGEST: Final = np.finfo(np.float32).max


class Codec(Protocol):
    """How a boundary travels. Rows float32 [n, width] become uint8 [n, row_bytes(width)]."""

    @property
    def name(self) -> str: ...

    @property
    def number(self) -> int:
        """In a frame's header."""
        ...

    def row_bytes(self, width: int) -> int:
        """Of every row of this width."""
        ...

    def encode(self, rows: FloatArray) -> ByteArray:
        """uint8 [n, row_bytes] of float32 [n, width]. CodecOverflow for numbers that it cannot hold, inf and NaN among
        them."""
        ...

    def decode(self, payload: ByteArray, width: int) -> FloatArray:
        """Finite float32 [n, width] of uint8 [n, row_bytes]. RemoteBroken for bytes that no row has."""
        ...


@dataclass(frozen=True, slots=True)
class Exact:
    """float32 as it is."""

    name: str = "exact"
    number: int = 0

    def row_bytes(self, width: int) -> int:
        return 4 * width

    def encode(self, rows: FloatArray) -> ByteArray:
        _largest(rows, self.name)
        return np.ascontiguousarray(rows, "<f4").view(np.uint8)

    def decode(self, payload: ByteArray, width: int) -> FloatArray:
        _check(payload, self.row_bytes(width), self.name)
        return _finite(np.ascontiguousarray(payload).view("<f4").astype(np.float32), self.name)


@dataclass(frozen=True, slots=True)
class Half:
    """float16, for models whose states it can hold."""

    name: str = "fp16"
    number: int = 1

    def row_bytes(self, width: int) -> int:
        return 2 * width

    def encode(self, rows: FloatArray) -> ByteArray:
        largest = _largest(rows, self.name)
        if largest > HALF_LIMIT:
            raise CodecOverflow(
                f"the boundary holds {largest:.6g}, fp16 holds up to {HALF_LIMIT:.0f}", hint="take int8 or exact"
            )
        return np.ascontiguousarray(rows.astype("<f2")).view(np.uint8)

    def decode(self, payload: ByteArray, width: int) -> FloatArray:
        _check(payload, self.row_bytes(width), self.name)
        return _finite(np.ascontiguousarray(payload).view("<f2").astype(np.float32), self.name)


@dataclass(frozen=True, slots=True)
class Scaled:
    """Whole numbers of `bits` of the rotated row, and one step."""

    name: str
    number: int
    bits: int

    def row_bytes(self, width: int) -> int:
        return padded(width) * self.bits // 8 + 12

    def encode(self, rows: FloatArray) -> ByteArray:
        _largest(rows, self.name)
        most = (1 << (self.bits - 1)) - 1
        exponents = np.frexp(np.abs(rows).max(axis=1, initial=0))[1]
        turned = rotate(np.ldexp(rows, -exponents[:, None]))
        steps = np.maximum(np.abs(turned).max(axis=1) / np.float32(most), np.float32(1e-30))
        codes = (np.rint(turned / steps[:, None]) + np.float32(most + 1)).astype(np.uint8)
        out = np.zeros((len(rows), self.row_bytes(rows.shape[1])), np.uint8)
        out[:, :2] = exponents.astype("<i2")[:, None].view(np.uint8)
        out[:, 4:8] = steps.astype("<f4")[:, None].view(np.uint8)
        out[:, 12:] = codes if self.bits == 8 else codes[:, ::2] | codes[:, 1::2] << 4
        return out

    def decode(self, payload: ByteArray, width: int) -> FloatArray:
        _check(payload, self.row_bytes(width), self.name)
        most = (1 << (self.bits - 1)) - 1
        exponents = np.ascontiguousarray(payload[:, :2]).view("<i2")[:, 0].astype(np.int32)
        steps = _finite(np.ascontiguousarray(payload[:, 4:8]).view("<f4").astype(np.float32), self.name)
        codes = payload[:, 12:]
        if self.bits == 4:
            codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(payload), -1)
        with np.errstate(over="ignore", invalid="ignore"):
            turned = (codes.astype(np.float32) - np.float32(most + 1)) * np.minimum(np.abs(steps), np.float32(1))
            rows = np.ldexp(unrotate(turned, width), exponents[:, None])
        return np.clip(rows, -LARGEST, LARGEST)


_CODECS: Final[Mapping[str, Codec]] = {c.name: c for c in (Exact(), Half(), Scaled("int8", 2, 8), Scaled("int4", 3, 4))}
_NUMBERED: Final[Mapping[int, Codec]] = {c.number: c for c in _CODECS.values()}


def codec(name: str) -> Codec:
    """UsageError with the names that there are."""
    if name not in _CODECS:
        raise UsageError(f"there is no codec {name!r}; allowed are {', '.join(_CODECS)}")
    return _CODECS[name]


def codec_numbered(number: int) -> Codec:
    """Of a frame's header. UsageError with the numbers that there are."""
    if number not in _NUMBERED:
        known = ", ".join(f"{c.number} ({c.name})" for c in _CODECS.values())
        raise UsageError(f"there is no codec with the number {number}; allowed are {known}")
    return _NUMBERED[number]


def _largest(rows: FloatArray, name: str) -> float:
    """The largest magnitude. CodecOverflow if one is not a finite number."""
    largest = float(np.abs(rows).max(initial=0))
    if not largest <= LARGEST:
        raise CodecOverflow(
            f"the boundary holds {largest}, {name} carries finite numbers alone", hint="the layers before it are broken"
        )
    return largest


def _check(payload: ByteArray, row_bytes: int, name: str) -> None:
    if payload.ndim != 2 or payload.shape[1] != row_bytes:
        raise RemoteBroken(f"rows of {name} came as {payload.shape} bytes, {row_bytes} a row are wanted")


def _finite(numbers: FloatArray, name: str) -> FloatArray:
    if not np.isfinite(numbers).all():
        raise RemoteBroken(f"a row of {name} came with numbers that are not finite")
    return numbers
