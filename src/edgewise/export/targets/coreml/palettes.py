"""Tables of values for weights: which matrices get one, how many channels share it, and what is in it.

The smallest matrices of a network weigh next to nothing and often cost most: the first layers see the picture, and a
depthwise filter has too few weights to fill a table. So they are spared, by what they weigh together. Of
EfficientNet-Lite0's answers in 6 bits, a table for each matrix moves 0.097 (KL), what is here 0.012, as int8 does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

FLOATING: Final = 0.01  # of all weights: the smallest matrices, which stay float16
BYTES: Final = 0.1  # and, these included, those that get int8 with a scale a channel
GROUP: Final = 32  # channels that share a table
ROUNDS: Final = 60  # of k-means, which is at rest before


@dataclass(frozen=True, slots=True)
class Spared:
    """Sizes of matrices up to which they are float16, and int8."""

    floating: int
    bytes: int

    def takes(self, size: int, stored: str) -> bool:
        """Whether it may be stored so beside a palette."""
        return size <= self.floating or (size <= self.bytes and stored == "int8")


def spared(sizes: Sequence[int]) -> Spared:
    """Of matrices of these sizes. The same of the network and of what was made of it."""
    return Spared(_smallest(sizes, FLOATING), _smallest(sizes, BYTES))


def _smallest(sizes: Sequence[int], share: float) -> int:
    """The largest size up to which all matrices together are not more than this share."""
    ordered = np.sort(np.asarray(sizes, np.int64))
    below = np.cumsum(ordered)
    fits = [int(size) for size in np.unique(ordered) if below[ordered <= size][-1] <= share * below[-1]]
    return fits[-1] if fits else 0


def sharing(channels: int, group: int) -> int:
    """How many channels share a table: `group` or, as they must divide all, the nearest number that does and is not
    less than half of it. 0 is all of them."""
    if not group or group >= channels:
        return channels
    divisors = [n for n in range(1, channels + 1) if channels % n == 0]
    less = [n for n in divisors if group / 2 < n <= group]
    return less[-1] if less else next(n for n in divisors if n > group)


def tables(bits: int) -> Callable[[Array], tuple[Array, Array]]:
    """For a group's weights: its table, and an index into it for each weight."""

    def made(weights: Array) -> tuple[Array, Array]:
        found = table(weights, 1 << bits)
        ordered = found.astype(np.float64)
        between = (ordered[1:] + ordered[:-1]) / 2
        return found, np.searchsorted(between, weights.reshape(-1).astype(np.float64)).astype(np.uint8)

    return made


def table(weights: Array, count: int) -> Array:
    """Values in ascending order, by k-means of one axis: each is the mean of the weights that are nearest to it. The
    first guess is as dense as is best for many values, so it is soon at rest; nothing is drawn by chance."""
    values, counts = np.unique(weights.reshape(-1).astype(np.float64), return_counts=True)
    if len(values) <= count:
        filled = np.concatenate([values, np.full(count - len(values), values[-1])])
        return filled.astype(weights.dtype)
    sums = np.concatenate([[0.0], np.cumsum(values * counts)])
    numbers = np.concatenate([[0], np.cumsum(counts)])
    centres = _first(values, counts, count)
    for _ in range(ROUNDS):
        edges = np.searchsorted(values, (centres[1:] + centres[:-1]) / 2)
        edges = np.concatenate([[0], edges, [len(values)]])
        mine = np.diff(numbers[edges])
        moved = np.where(mine > 0, np.diff(sums[edges]) / np.maximum(mine, 1), centres)
        if np.array_equal(moved, centres):
            break
        centres = moved
    return np.sort(centres).astype(weights.dtype)


def _first(values: Array, counts: Array, count: int) -> Array:
    """As many values between two points as the cube root of the density says (Panter and Dite)."""
    mass = (counts[1:] + counts[:-1]) / 2
    dense = np.concatenate([[0.0], np.cumsum(np.cbrt(mass) * np.cbrt(np.diff(values)) ** 2)])
    wanted = (np.arange(count) + 0.5) / count * dense[-1]
    found: Array = np.interp(wanted, dense, values)
    return found
