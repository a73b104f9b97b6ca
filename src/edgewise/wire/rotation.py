"""The rotation before rounding: it spreads whatever a row holds over all of its numbers (docs/formats/boundary.md).

Signs of a fixed pattern, a Walsh-Hadamard transform over the largest power of two in the padded width, a Householder
reflection over each odd factor of it. Its matrix is of whole numbers and so are the rows that it is given: all sums are
exact in float64, in whatever order a machine adds.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

MULTIPLE: Final = 32  # widths are padded to it
SIDE: Final = 64  # of the larger of the two matrices whose Kronecker product it is

Doubles = npt.NDArray[np.float64]


def padded(width: int) -> int:
    """The width that the rotation works on."""
    return -(-width // MULTIPLE) * MULTIPLE


def growth(size: int) -> float:
    """How much longer a row becomes by `rotate`, and again by `unrotate`: sqrt(power of two) times the odd part."""
    whole = size & -size
    return float(np.sqrt(whole)) * (size // whole)


def rotate(rows: Doubles) -> Doubles:
    """[n, padded(width)] of [n, width], all whole numbers."""
    count, width = rows.shape
    size = padded(width)
    wide = np.zeros((count, size))
    np.multiply(rows, _signs(size)[:width], out=wide[:, :width])
    return _turned(wide)


def unrotate(rows: Doubles, width: int) -> Doubles:
    """What `rotate` was given, times growth(size) squared."""
    return (_turned(rows) * _signs(rows.shape[1]))[:, :width]


def _turned(rows: Doubles) -> Doubles:
    """The matrix is symmetric, so that it turns back as well."""
    count, size = rows.shape
    outer, inner = _matrices(size)
    parts = rows.reshape(count, len(outer), len(inner))
    return np.asarray(np.matmul(np.matmul(outer, parts), inner).reshape(count, size))


@lru_cache
def _matrices(size: int) -> tuple[Doubles, Doubles]:
    """Whose product is the matrix; whole numbers both."""
    whole = size & -size
    outer = min(whole, SIDE)
    inner: Doubles = _hadamard(whole // outer)
    odd, factor = size // whole, 3
    while odd > 1:
        while odd % factor == 0:
            inner = np.asarray(np.kron(inner, factor * np.eye(factor) - 2))  # p (I - (2/p) J)
            odd //= factor
        factor += 2
    return _hadamard(outer), inner


def _hadamard(size: int) -> Doubles:
    """Sylvester's, of a power of two."""
    matrix: Doubles = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.asarray(np.kron(matrix, np.array([[1.0, 1.0], [1.0, -1.0]])))
    return matrix


@lru_cache
def _signs(size: int) -> Doubles:
    """+1 or -1, by the top bit of the states of x -> 1664525 x + 1013904223 mod 2^32 after 1."""
    state, signs = 1, np.empty(size)
    for n in range(size):
        state = (1664525 * state + 1013904223) & 0xFFFFFFFF
        signs[n] = 1 - 2 * (state >> 31)
    return signs
