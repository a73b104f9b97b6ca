"""Boundary codecs: rows of hidden states to bytes of a fixed size and back (docs/formats/boundary.md).

A row is coded by itself: it has the same bytes, and decodes to the same bits, alone or in any batch and on any machine.
For that, every step is exact or an elementwise operation of IEEE float32 in a fixed order: no sums by numpy, no BLAS.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from edgewise.errors import CodecOverflow, RemoteBroken, UsageError
from edgewise.types import FloatArray
from edgewise.wire import escapes as escaping
from edgewise.wire.escapes import BYTES, UNITS, WIDEST, most_escapes
from edgewise.wire.rice import finest_steps, read, step_sizes, written
from edgewise.wire.rotation import growth, padded, rotate, unrotate

ByteArray = npt.NDArray[np.uint8]
HALF_LIMIT: Final = float(np.finfo(np.float16).max)
LARGEST: Final = np.finfo(np.float32).max
HEAD: Final = 4  # bytes: exponent, number of escapes, step (2)
SIDE: Final = 12  # bytes: the head, and what lets the numbers have a little more than their bits
EXPONENT_BIAS: Final = 127
UNIT_BITS: Final = UNITS.bit_length() - 1
LARGEST_STEP: Final = np.float32(256)


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
class Coded:
    """The rotated row in whole steps of one size, as fine as the row's bytes have room for; its largest numbers beside
    it. What it is off by is spread evenly over the row once that is multiplied by `gains` [width]."""

    name: str
    number: int
    bits: int  # of a number, about
    low: int  # see rice.py
    gains: FloatArray | None = field(default=None, compare=False, repr=False)

    def row_bytes(self, width: int) -> int:
        if not 0 < width <= WIDEST:
            raise UsageError(f"{self.name} is wanted for rows of {width} numbers, allowed are 1 to {WIDEST}")
        return padded(width) * self.bits // 8 + SIDE

    def encode(self, rows: FloatArray) -> ByteArray:
        _largest(rows, self.name)
        count, width = rows.shape
        row_bytes, size = self.row_bytes(width), padded(width)
        out = np.zeros((count, row_bytes), np.uint8)
        if not out.size:
            return out
        weighed = rows.astype(np.float64) * (1.0 if self.gains is None else self.gains)
        exponents = np.maximum(np.frexp(np.abs(weighed).max(axis=1))[1], -EXPONENT_BIAS)
        units = np.ldexp(weighed, UNIT_BITS - exponents[:, None]).astype(np.int64)
        escapes = escaping.found(units, size)
        units[escapes.rows, escapes.channels] -= escapes.values
        turned = rotate(units.astype(np.float64))
        magnitudes = (np.abs(turned) * (1 / (growth(size) * UNITS))).astype(np.float32)
        steps = finest_steps(magnitudes, self._room(row_bytes, escapes.counts), self.low)
        out[:, 0] = exponents + EXPONENT_BIAS
        out[:, 1] = escapes.counts
        out[:, 2:HEAD] = steps.astype("<u2")[:, None].view(np.uint8)
        out[:, HEAD:] = written(turned < 0, magnitudes, steps, self.low, 8 * (row_bytes - HEAD))
        escaping.written_into(out, escapes)
        return out

    def decode(self, payload: ByteArray, width: int) -> FloatArray:
        row_bytes, size = self.row_bytes(width), padded(width)
        _check(payload, row_bytes, self.name)
        counts = payload[:, 1].astype(np.int64)
        steps = step_sizes(np.ascontiguousarray(payload[:, 2:HEAD]).view("<u2")[:, 0])
        most = most_escapes(size)
        if counts.max(initial=0) > most or not (steps <= LARGEST_STEP).all():
            raise RemoteBroken(
                f"rows of {self.name} came with {counts.max()} escapes and steps up to {steps.max()}, "
                f"allowed are {most} and {LARGEST_STEP}"
            )
        escapes = escaping.read(payload, counts, width)
        halves = read(payload[:, HEAD:], self._room(row_bytes, counts), self.low, size)
        rows = unrotate(halves.astype(np.float64), width) * (steps.astype(np.float64) / (2 * growth(size)))[:, None]
        rows[escapes.rows, escapes.channels] += escapes.values / UNITS
        rows = np.ldexp(rows, payload[:, :1].astype(np.int32) - EXPONENT_BIAS)
        if self.gains is not None:
            rows /= self.gains
        return np.clip(rows, -LARGEST, LARGEST).astype(np.float32)

    @staticmethod
    def _room(row_bytes: int, escapes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Bits for the numbers."""
        return 8 * (row_bytes - HEAD - BYTES * escapes)


_CODECS: Final[Mapping[str, Codec]] = {
    c.name: c for c in (Exact(), Half(), Coded("int8", 2, 8, 5), Coded("int4", 3, 4, 1))
}
_NUMBERED: Final[Mapping[int, Codec]] = {c.number: c for c in _CODECS.values()}


def codec(name: str, gains: FloatArray | None = None) -> Codec:
    """`gains` float32 [width], all above 0, are how much each number of a row matters (models/gains.py); both sides
    must have the same. UsageError with the names that there are."""
    if name not in _CODECS:
        raise UsageError(f"there is no codec {name!r}; allowed are {', '.join(_CODECS)}")
    found = _CODECS[name]
    return replace(found, gains=gains) if isinstance(found, Coded) and gains is not None else found


def codec_numbered(number: int, gains: FloatArray | None = None) -> Codec:
    """Of a frame's header. UsageError with the numbers that there are."""
    if number not in _NUMBERED:
        known = ", ".join(f"{c.number} ({c.name})" for c in _CODECS.values())
        raise UsageError(f"there is no codec with the number {number}; allowed are {known}")
    return codec(_NUMBERED[number].name, gains)


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
