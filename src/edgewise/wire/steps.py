"""Tensors of real numbers as whole steps: one step for a tensor, entropy-coded (docs/formats/features.md).

With one step everywhere the error is the same everywhere, which for a given number of bytes after an entropy coder is
the least in all (the reverse water-filling of rate-distortion theory; Cover and Thomas, chapter 10): a step a channel,
which is what quantizers of weights do, costs more at the same error of the network's answer. `bits` set the step by
the spread of the numbers so that they take about so many bits each if they are normally distributed, which of all
numbers of that spread take the most; sparse, skewed and smooth ones take fewer.

Every step of decoding is exact or one IEEE float32 multiplication: all machines decode to the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from edgewise.types import FloatArray

Codes = npt.NDArray[np.int64]

NO_CHANNELS: Final = 255
LEAST_A_CHANNEL: Final = 8  # numbers, for a mean of their own to pay
MOST: Final = (1 << 30) - 1  # a code's magnitude
SAMPLE: Final = 1 << 16  # numbers that the choice of a prediction looks at
LARGEST: Final = float(np.finfo(np.float32).max)
TAIL: Final = 8.0  # spreads: what lies beyond does not make the step larger
NEIGHBOURS: Final = ((), (-1,), (-1, -2), (-2,))  # of a prediction: the axes along which differences are taken


@dataclass(frozen=True, slots=True)
class Steps:
    """`planes` holds the means of the channels and then all numbers, as differences from their neighbours and with
    zigzag signs (0, -1, 1, -2, …), byte by byte from the lowest: uint8 [count of planes, numbers]."""

    step: float
    channel_axis: int  # NO_CHANNELS: there are no means
    prediction: int  # in NEIGHBOURS
    planes: npt.NDArray[np.uint8]


def coded(numbers: FloatArray, bits: int) -> Steps:
    """Of finite float32 [...]; `bits` 2..8."""
    exact = numbers.astype(np.float64)
    axis = _channel_axis(exact)
    means = exact.mean(_others(exact.ndim, axis), keepdims=True) if axis != NO_CHANNELS else np.zeros(())
    step = _step(exact - means, bits, float(np.abs(exact).max(initial=0)))
    offsets = np.rint(means / step).astype(np.int64)
    codes = np.rint(exact / step).astype(np.int64) - offsets
    prediction = _prediction(codes)
    parts = [_differences(codes, prediction).ravel()]
    if axis != NO_CHANNELS:
        parts.insert(0, offsets.ravel())
    return Steps(step, axis, prediction, _planes(np.concatenate(parts)))


def decoded(steps: Steps, shape: tuple[int, ...]) -> FloatArray:
    """float32 of that shape. `planes` must have `count` numbers each; sums that no encoder makes wrap around."""
    codes = _whole(steps.planes)
    channels = shape[steps.channel_axis] if steps.channel_axis != NO_CHANNELS else 0
    found = codes[channels:].reshape(shape)
    for axis in NEIGHBOURS[steps.prediction]:
        np.cumsum(found, axis=axis, out=found)
    if channels:
        found += codes[:channels].reshape([-1 if axis == steps.channel_axis else 1 for axis in range(len(shape))])
    with np.errstate(over="ignore"):
        numbers: FloatArray = found.astype(np.float32) * np.float32(steps.step)
    return np.asarray(np.clip(numbers, -LARGEST, LARGEST))


def count(shape: tuple[int, ...], channel_axis: int) -> int:
    """How many numbers a plane has."""
    return math.prod(shape) + (shape[channel_axis] if channel_axis != NO_CHANNELS else 0)


def _channel_axis(numbers: npt.NDArray[np.float64]) -> int:
    """The axis, second or last, whose means leave least: images have channels second, sequences last."""
    if numbers.ndim < 3 or not numbers.size:
        return NO_CHANNELS
    enough = [a for a in (1, numbers.ndim - 1) if numbers.size >= LEAST_A_CHANNEL * numbers.shape[a]]
    explained = {a: _explained(numbers, a) for a in enough}
    return max(explained, key=explained.__getitem__, default=NO_CHANNELS)


def _explained(numbers: npt.NDArray[np.float64], axis: int) -> float:
    """The share of the variance that is one of the means."""
    return float(numbers.mean(_others(numbers.ndim, axis)).var())


def _others(axes: int, axis: int) -> tuple[int, ...]:
    return tuple(other for other in range(axes) if other != axis)


def _step(centred: npt.NDArray[np.float64], bits: int, largest: float) -> float:
    """A float32 above 0. A normally distributed number of spread s takes log2(s / step) + 2.05 bits (the entropy of a
    finely quantized Gaussian), and the coder a little more: hence 2.2."""
    spread = float(centred.std()) if centred.size else 0.0
    for _ in range(2):  # a few huge numbers must not blur all others: they get larger codes
        kept = np.abs(centred) <= TAIL * spread
        spread = float(centred.std(where=kept)) if kept.any() else spread
    least = max(largest / MOST, float(np.finfo(np.float32).tiny))
    step = min(max(spread * 2.0 ** (2.2 - bits), least), LARGEST / 2)
    return float(np.nextafter(np.float32(step), np.float32(np.inf)))


def _prediction(codes: Codes) -> int:
    """The one after which the least entropy is left, in a part of the numbers."""
    if codes.ndim < 2 or not codes.size:
        return 0
    planes = codes.reshape(-1, *codes.shape[-2:])
    some = planes[:: max(1, math.ceil(planes.size / SAMPLE))]
    return min(range(len(NEIGHBOURS)), key=lambda one: _entropy(_differences(some, one)))


def _entropy(codes: Codes) -> float:
    """Bits a number, of its two lowest bytes; the others are seldom anything but 0."""
    signless = _zigzag(codes).ravel()
    return sum(_byte_entropy(signless >> shift & 255) for shift in (0, 8))


def _byte_entropy(values: Codes) -> float:
    shares = np.bincount(values) / values.size
    shares = shares[shares > 0]
    return float(-(shares * np.log2(shares)).sum())


def _differences(codes: Codes, prediction: int) -> Codes:
    for axis in NEIGHBOURS[prediction]:
        codes = np.diff(codes, axis=axis, prepend=0)
    return codes


def _zigzag(codes: Codes) -> Codes:
    found: Codes = (codes << 1) ^ (codes >> 63)
    return found


def _planes(codes: Codes) -> npt.NDArray[np.uint8]:
    signless = _zigzag(codes)
    most = int(signless.max(initial=0))
    return np.stack([(signless >> 8 * place).astype(np.uint8) for place in range(max(1, (most.bit_length() + 7) // 8))])


def _whole(planes: npt.NDArray[np.uint8]) -> Codes:
    signless = planes[0].astype(np.int64)
    for place in range(1, len(planes)):
        signless |= planes[place].astype(np.int64) << 8 * place
    found: Codes = (signless >> 1) ^ -(signless & 1)
    return found
