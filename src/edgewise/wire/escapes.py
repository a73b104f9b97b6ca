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

FIRST: Final = int(SMALLEST.view(np.uint32))

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Escapes:
    """Of a batch, in the order of rows and of channels in them: `rows`, `channels`, `words` of 24 bits and `values` (in
    units), all [k]; `counts` of each row [n]."""

    counts: Ints
    rows: Ints
    channels: Ints
    words: Ints
    values: Ints


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
    least = np.where(worth > 0, largest[np.arange(len(worth)), worth - 1], UNITS)
    rows, channels = np.nonzero(magnitudes >= least[:, None])
    counts = np.bincount(rows, minlength=len(units))
    if counts.max(initial=0) > most:  # equal ones are more
        nth = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        rows, channels, counts = rows[nth < most], channels[nth < most], np.minimum(counts, most)
    values, bits = units[rows, channels], _magnitude_bits(units.shape[1])
    words = (channels << 1 | (values < 0)) << bits | _code(np.abs(values), bits)
    return Escapes(counts, rows, channels, words, _values(words, bits))


def written_into(out: Bytes, escapes: Escapes) -> None:
    """At the end of rows uint8 [n, bytes] that are 0 there, the first of a row last."""
    places, most = _places(escapes.counts)
    if most:
        sides = np.zeros((len(out), most, BYTES), np.uint8)
        sides[places] = escapes.words.astype(">u4").view(np.uint8).reshape(-1, 4)[:, 1:]
        out[:, -BYTES * most :] |= sides[:, ::-1].reshape(len(out), -1)


def read(data: Bytes, counts: Ints, width: int) -> Escapes:
    """Of rows uint8 [n, bytes]. RemoteBroken for a channel that the row has not."""
    places, most = _places(counts)
    sides = data[:, data.shape[1] - BYTES * most :].reshape(len(data), most, BYTES)[:, ::-1]
    parts = sides[places].astype(np.int64)
    words, bits = parts[:, 0] << 16 | parts[:, 1] << 8 | parts[:, 2], _magnitude_bits(width)
    channels = words >> bits + 1
    if channels.max(initial=0) >= width:
        raise RemoteBroken(f"an escape is of channel {channels.max()}, the row has {width}")
    return Escapes(counts, np.repeat(np.arange(len(data)), counts), channels, words, _values(words, bits))


def _places(counts: Ints) -> tuple[npt.NDArray[np.bool_], int]:
    """Which of the most that a row has each has [n, most], and that number."""
    most = int(counts.max(initial=0))
    return np.arange(most) < counts[:, None], most


def _magnitude_bits(width: int) -> int:
    """Four say the octave, the rest are binary places of it."""
    return 8 * BYTES - 1 - (width - 1).bit_length()


def _code(magnitudes: Ints, bits: int) -> Ints:
    """The nearest there is."""
    shift = 23 + 4 - bits  # places of a float32 that an escape has not
    floats = magnitudes.astype(np.float32).view(np.uint32).astype(np.int64)
    return np.asarray(np.minimum((floats + (1 << shift - 1) >> shift) - (FIRST >> shift), (1 << bits) - 1))


def _values(words: Ints, bits: int) -> Ints:
    """In units, cut off towards zero."""
    shift = 23 + 4 - bits
    floats = ((words & (1 << bits) - 1) << shift) + FIRST | (words >> bits & 1) << 31
    return floats.astype(np.uint32).view(np.float32).astype(np.int64)
