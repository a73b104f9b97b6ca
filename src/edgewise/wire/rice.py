"""Numbers in whole steps, as many bits as each takes, in a room of fixed size (docs/formats/boundary.md).

A magnitude of a steps is a Rice code (Rice 1979): `low` bits of a, and a >> low zeros before a one. Signs, bits of the
same weight and the unary parts stand together, so that all numbers of a row are written and read at once.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from edgewise.errors import RemoteBroken
from edgewise.types import FloatArray

Bits = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]
Steps = npt.NDArray[np.uint16]  # the upper halves of the bits of float32s
AROUND: Final = np.arange(-4, 4)  # steps that are tried at once
GUESSES: Final = 3
TINY: Final = np.float32(1e-20)  # beside any step
FRACTION: Final = 0.43  # what a number in steps loses to its whole part, about, where most are small


def step_sizes(steps: Steps) -> FloatArray:
    """Finite for those that `finest_steps` gives."""
    return (steps.astype(np.uint32) << np.uint32(16)).view(np.float32)


def finest_steps(magnitudes: FloatArray, room: Ints, low: int) -> Steps:
    """The smallest step with which the magnitudes float32 [n, size] of a row (0, or 1e-12 .. 1e12) take at most `room`
    bits [n]; 0 for a row of zeros. Which it is does not depend on how it is sought."""
    lost = FRACTION * magnitudes.shape[1]
    zeros = room - (2 + low) * magnitudes.shape[1]  # that the unary parts may have
    scaled = magnitudes * np.float32(2.0**-low)
    guess = _steps(scaled.sum(axis=1) / (zeros + lost) + TINY)
    found = np.empty(len(guess), np.uint16)
    left, every = slice(None), np.arange(len(guess))
    for _ in range(GUESSES):
        tries = guess[:, None] + AROUND
        taken = _unary_zeros(scaled[left], tries)
        enough = taken <= zeros[left, None]
        found[left] = tries[every[: len(tries)], enough.argmax(axis=1)]
        sure = enough[:, -1] > enough[:, 0]
        if sure.all():
            return found
        left = every[left][~sure]
        better = step_sizes(tries[~sure, 0].astype(np.uint16)) * (taken[~sure, 0] + lost) / (zeros[left] + lost)
        guess = _steps(better + TINY)
    found[left] = _searched(scaled[left], zeros[left])
    return found


def _searched(scaled: FloatArray, zeros: Ints) -> Ints:
    """The same by bisection, for rows unlike most."""
    peaks = scaled.max(axis=1)
    fits = _steps(peaks + TINY) + 1  # no unary part has a zero
    not_yet = _steps(peaks / (zeros + 2) + TINY) - 1  # one part alone has too many
    while (fits - not_yet > 1).any():
        middle = (fits + not_yet) // 2
        enough = _unary_zeros(scaled, middle[:, None])[:, 0] <= zeros
        fits, not_yet = np.where(enough, middle, fits), np.where(enough, not_yet, middle)
    return np.where(peaks > 0, fits, 0)


def _unary_zeros(scaled: FloatArray, steps: Ints) -> FloatArray:
    """Of rows [n, size] with each of their steps [n, k]: whole numbers, exact as far as they could fit."""
    parts = scaled[:, None] * (1 / step_sizes(steps.astype(np.uint16)))[:, :, None]
    return np.asarray(np.floor(parts, out=parts).sum(axis=2))


def _steps(sizes: FloatArray) -> Ints:
    """The next ones below."""
    return (sizes.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.int64)


def written(negative: npt.NDArray[np.bool_], magnitudes: FloatArray, steps: Steps, low: int, bits: int) -> Bits:
    """uint8 [n, bits / 8]."""
    count, size = magnitudes.shape
    sizes = step_sizes(steps)
    factors = np.divide(1, sizes, out=np.zeros_like(sizes), where=sizes > 0)
    whole = (magnitudes * factors[:, None]).astype(np.int32)
    out = np.zeros((count, bits), np.uint8)
    out[:, :size] = negative
    for n in range(low):
        np.bitwise_and(whole >> n, 1, out=out[:, size * (1 + n) : size * (2 + n)], casting="unsafe")
    ends = np.cumsum((whole >> low) + 1, axis=1) + (size * (1 + low) - 1)
    out.reshape(-1)[ends + np.arange(0, count * bits, bits)[:, None]] = 1
    return np.packbits(out, axis=1)


def read(data: Bits, room: Ints, low: int, size: int) -> npt.NDArray[np.int64]:
    """Of every number twice its magnitude in steps, and one for the middle of its step, with its sign [n, size].
    RemoteBroken unless there are `size` numbers in the room."""
    bits = np.unpackbits(data, axis=1)
    unary = bits[:, size * (1 + low) :]
    if (room < bits.shape[1]).any():
        unary = unary & (np.arange(size * (1 + low), bits.shape[1]) < room[:, None])
    numbers = unary.sum(axis=1)
    if (numbers != size).any():
        raise RemoteBroken(f"rows came with {numbers.min()} to {numbers.max()} numbers, {size} are wanted")
    ends = np.flatnonzero(unary).reshape(len(data), size) - np.arange(len(data))[:, None] * unary.shape[1]
    whole = ends.copy()
    whole[:, 1:] -= ends[:, :-1] + 1
    for n in reversed(range(low)):
        whole = whole << 1 | bits[:, size * (1 + n) : size * (2 + n)]
    return np.asarray(np.where(bits[:, :size], -2 * whole - 1, 2 * whole + 1))
