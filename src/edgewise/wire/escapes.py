"""Numbers so large that they travel beside their row (docs/formats/boundary.md).

A row of hidden states holds a few numbers a hundred times as large as the others, and much larger ones at the first
token and at delimiters (Sun et al. 2024, "Massive activations"). Rotated with the rest they would set its step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from edgewise.errors import RemoteBroken

BYTES: Final = 3  # of an escape: channel, sign, magnitude, from the highest bit on
WIDEST: Final = 1 << 16
OCTAVES: Final = 16  # of a magnitude, below 1
UNITS: Final = 1 << 23  # in 1: rows are counted in units, whose sums of squares are exact in int64
SMALLEST: Final = np.float32(UNITS >> OCTAVES)  # units

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Escapes:
    """Of a batch, in the order of rows and of channels in them: `rows`, `channels` and `values` (in units), all [k]."""

    rows: Ints
    channels: Ints
    values: Ints

    def counts(self, rows: int) -> Ints:
        """Of each row."""
        return np.bincount(self.rows, minlength=rows)


def most_escapes(size: int) -> int:
    """Of a row that is coded as `size` numbers: three quarters of a bit of each, and what it has beside them."""
    return (size * 3 // 4 + 64) // (8 * BYTES)


def found(units: Ints, size: int) -> Escapes:
    """Of rows [n, width] below UNITS in magnitude, that will be coded as `size` numbers. An escape costs bytes that the
    other numbers lose: it is worth them if that lets the step shrink more than they let it grow."""
    share = 1 - 2 ** (-2 * 8 * BYTES / size)
    magnitudes = np.abs(units)
    most = min(most_escapes(size), units.shape[1])
    largest = np.sort(np.partition(magnitudes, -most, axis=1)[:, -most:], axis=1)[:, ::-1]
    squares = largest * largest
    rest = (magnitudes * magnitudes).sum(axis=1)[:, None] - np.cumsum(squares, axis=1) + squares
    worth = np.logical_and.accumulate((squares > share * rest) & (largest >= SMALLEST), axis=1).sum(axis=1)
    if not worth.any():
        return Escapes(*np.empty((3, 0), np.int64))
    least = np.where(worth > 0, largest[np.arange(len(worth)), worth - 1], UNITS)
    rows, channels = np.nonzero(magnitudes >= least[:, None])
    nth = np.arange(len(rows)) - np.searchsorted(rows, rows)
    rows, channels = rows[nth < most], channels[nth < most]  # equal ones may be more
    values = units[rows, channels]
    rounded = _value(_code(np.abs(values), units.shape[1]), units.shape[1])
    return Escapes(rows, channels, np.where(values < 0, -rounded, rounded))


def packed(escapes: Escapes, width: int) -> npt.NDArray[np.uint8]:
    """uint8 [k, BYTES]."""
    bits = _magnitude_bits(width)
    negative = (escapes.values < 0).astype(np.int64)
    whole = escapes.channels << bits + 1 | negative << bits | _code(np.abs(escapes.values), width)
    return np.asarray(whole.astype(">u4").view(np.uint8).reshape(-1, 4)[:, 1:])


def unpacked(rows: Ints, data: npt.NDArray[np.uint8], width: int) -> Escapes:
    """Of uint8 [k, BYTES]. RemoteBroken for a channel that the row has not."""
    bits = _magnitude_bits(width)
    whole = data[:, 0].astype(np.int64) << 16 | data[:, 1].astype(np.int64) << 8 | data[:, 2]
    channels = whole >> bits + 1
    if channels.max(initial=0) >= width:
        raise RemoteBroken(f"an escape is of channel {channels.max()}, the row has {width}")
    values = _value(whole & (1 << bits) - 1, width)
    return Escapes(rows, channels, np.where(whole >> bits & 1, -values, values))


def _magnitude_bits(width: int) -> int:
    """Four say the octave, the rest are binary places of it."""
    return 8 * BYTES - 1 - (width - 1).bit_length()


def _code(magnitudes: Ints, width: int) -> Ints:
    """The nearest there is."""
    shift = 23 + 4 - _magnitude_bits(width)  # places of a float32 that an escape has not
    bits = magnitudes.astype(np.float32).view(np.uint32).astype(np.int64)
    codes = (bits + (1 << shift - 1) >> shift) - (int(SMALLEST.view(np.uint32)) >> shift)
    return np.asarray(np.minimum(codes, (1 << _magnitude_bits(width)) - 1))


def _value(codes: Ints, width: int) -> Ints:
    shift = 23 + 4 - _magnitude_bits(width)
    bits = (codes + (int(SMALLEST.view(np.uint32)) >> shift) << shift).astype(np.uint32)
    return bits.view(np.float32).astype(np.int64)
