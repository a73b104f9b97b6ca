"""Weight matrices as the block writer takes them: dense, or in blocks with a scale (and a minimum) each.

A matrix is [outputs, inputs]. Quantized blocks run along the inputs, as in GGUF and in onnxruntime's MatMulNBits, so
carrying one over is a repacking of bits: no weight changes its value.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgewise.types import FloatArray, IdArray

BLOCK = 32  # weights per quantization block, where we choose it and in most of GGUF's types; the others have 16


@dataclass(frozen=True, slots=True)
class Quantized:
    """weight = (q - 2^(bits-1)) * scale + minimum, per block.

    `packed` uint8 [outputs, blocks, block * bits / 8] (4 bits: the even element in the low half of a byte), `scales`
    and `minima` float32 [outputs, blocks]; `minima` is None where the type has none. `block` is 16 or 32 weights.
    """

    bits: int
    packed: npt.NDArray[np.uint8]
    scales: FloatArray
    minima: FloatArray | None = None
    block: int = BLOCK

    @property
    def shape(self) -> tuple[int, int]:
        return self.scales.shape[0], self.scales.shape[1] * self.block

    @property
    def kind(self) -> tuple[int, int, bool]:
        """Matrices of one kind can stand in one fused matrix."""
        return self.bits, self.block, self.minima is not None

    @property
    def arrays(self) -> list[npt.NDArray[Any]]:
        """Codes, scales and, where there are any, minima: all have one row per output."""
        return [self.packed, self.scales, *([] if self.minima is None else [self.minima])]

    def of(self, arrays: Iterable[npt.NDArray[Any]]) -> Quantized:
        """A matrix of this kind with other `arrays`."""
        packed, scales, *minima = arrays
        return replace(self, packed=packed, scales=scales, minima=minima[0] if minima else None)

    def rows(self, order: IdArray) -> Quantized:
        """The same matrix with its outputs reordered."""
        return self.of(a[order] for a in self.arrays)

    def dense(self) -> FloatArray:
        """float32 [outputs, inputs], the exact values."""
        q = self.packed if self.bits == 8 else unpack4(self.packed)
        blocks = (q.astype(np.float32) - np.float32(1 << (self.bits - 1))) * self.scales[..., None]
        if self.minima is not None:
            blocks += self.minima[..., None]
        return blocks.reshape(self.shape)


@dataclass(frozen=True, slots=True)
class Dense:
    """float32, float16 or bfloat16 [outputs, inputs]."""

    values: npt.NDArray[np.generic]

    @property
    def shape(self) -> tuple[int, int]:
        outputs, inputs = self.values.shape
        return outputs, inputs

    @property
    def kind(self) -> str:
        return str(self.values.dtype)

    def rows(self, order: IdArray) -> Dense:
        return Dense(self.values[order])

    def dense(self) -> FloatArray:
        return self.values.astype(np.float32)


Matrix = Quantized | Dense


def stack(parts: list[Matrix]) -> Matrix | None:
    """Matrices over the same inputs as one, outputs joined; None if their kinds differ."""
    first = parts[0]
    if len({(type(p), p.kind) for p in parts}) > 1:
        return None
    if isinstance(first, Dense):
        return Dense(np.concatenate([p.values for p in parts if isinstance(p, Dense)]))
    same = [p.arrays for p in parts if isinstance(p, Quantized)]
    return first.of(np.concatenate(arrays) for arrays in zip(*same, strict=True))


def split(matrix: Matrix, outputs: Iterable[int]) -> list[Matrix]:
    """The matrices that were stacked, by their numbers of outputs."""
    ends = np.cumsum(list(outputs))
    return [matrix.rows(order) for order in np.split(np.arange(ends[-1]), ends[:-1])]


def requantize(matrix: Matrix, bits: int) -> Matrix:
    """Round to nearest with one symmetric scale per block of 32: the largest magnitude becomes the most
    negative code, as in GGUF's Q4_0. Matrices whose inputs do not divide into blocks stay as they are."""
    outputs, inputs = matrix.shape
    if inputs % BLOCK:
        return matrix
    half = 1 << (bits - 1)
    blocks = matrix.dense().reshape(outputs, inputs // BLOCK, BLOCK)
    at = np.abs(blocks).argmax(axis=-1, keepdims=True)
    scales = np.take_along_axis(blocks, at, axis=-1)[..., 0] / np.float32(-half)
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)
    q = np.clip(np.rint(blocks * inverse[..., None]) + half, 0, 2 * half - 1).astype(np.uint8)
    return Quantized(bits, q if bits == 8 else pack4(q), scales)


def pack4(q: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """uint8 codes 0..15 [..., 2n] to bytes [..., n], the even element in the low half."""
    return np.bitwise_or(q[..., 0::2], np.left_shift(q[..., 1::2], 4, dtype=np.uint8), dtype=np.uint8)


def unpack4(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The inverse of `pack4`."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
