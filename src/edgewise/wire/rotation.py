"""The rotation before rounding: it spreads whatever a row holds over all of its numbers.

Signs of a fixed pattern, then a Walsh-Hadamard transform over the largest power of two that divides the padded width,
then a Householder reflection I - (2/p) J over each odd factor p. All of it is orthogonal up to the factor of the
transform, and made of additions and products in a fixed order, so that its bits are the same everywhere.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import numpy as np

from edgewise.types import FloatArray

MULTIPLE: Final = 32  # widths are padded to it


def padded(width: int) -> int:
    """The width that the rotation works on."""
    return -(-width // MULTIPLE) * MULTIPLE


def rotate(rows: FloatArray) -> FloatArray:
    """float32 [n, padded(width)] of float32 [n, width], whose magnitudes are at most 1; lengths stay as they are."""
    count, width = rows.shape
    size = padded(width)
    out = np.zeros((count, size), np.float32)
    np.multiply(rows, _signs(size)[:width], out=out[:, :width])
    return _reflected(_transformed(out))


def unrotate(rows: FloatArray, width: int) -> FloatArray:
    """What `rotate` was given, but for rounding."""
    return (_transformed(_reflected(rows)) * _signs(rows.shape[1]))[:, :width]


def _transformed(rows: FloatArray) -> FloatArray:
    count, size = rows.shape
    whole = size & -size  # the largest power of two in it
    half = 1
    while half < whole:
        pairs = rows.reshape(count, -1, 2, half)
        out = np.empty_like(pairs)
        np.add(pairs[:, :, 0], pairs[:, :, 1], out=out[:, :, 0])
        np.subtract(pairs[:, :, 0], pairs[:, :, 1], out=out[:, :, 1])
        rows, half = out.reshape(count, size), 2 * half
    return rows * np.float32(whole**-0.5)


def _reflected(rows: FloatArray) -> FloatArray:
    count, size = rows.shape
    inner = size & -size
    for factor in _odd_factors(size):
        parts = rows.reshape(count, -1, factor, inner)
        total = parts[:, :, 0] + parts[:, :, 1]
        for n in range(2, factor):
            total += parts[:, :, n]
        total *= np.float32(2 / factor)
        rows, inner = (parts - total[:, :, None]).reshape(count, size), inner * factor
    return rows


@lru_cache
def _odd_factors(size: int) -> tuple[int, ...]:
    rest, factors, factor = size // (size & -size), [], 3
    while rest > 1:
        while rest % factor == 0:
            rest //= factor
            factors.append(factor)
        factor += 2
    return tuple(factors)


@lru_cache
def _signs(size: int) -> FloatArray:
    """+1 or -1, by the top bit of the state of x -> 1664525 x + 1013904223 mod 2^32, which begins as 1."""
    state, signs = 1, np.empty(size, np.float32)
    for n in range(size):
        state = (1664525 * state + 1013904223) & 0xFFFFFFFF
        signs[n] = 1 - 2 * (state >> 31)
    return signs
