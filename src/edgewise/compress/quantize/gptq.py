"""GPTQ in numpy: codes of 4 or 8 bits for a matrix, chosen so that its products change least on calibration inputs.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers": columns are
rounded one after the other, and what each rounding breaks is made good by the columns that are still free, along the
Cholesky factor of the inverse Hessian, in lazy batches. Three things are ours, as blocks of 32 weights have a scale
each and stand in a fixed order: scales are searched before, by the error that the factor says a column will cost; they
are solved for again afterwards, in closed form for given codes; and codes are swept once more, each column to its best
given all others (coordinate descent). An output's row never ends worse than rounded to nearest: if it does, that stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from edgewise.models.weights import BLOCK, Dense, Quantized, pack4, requantize, unpack4
from edgewise.types import FloatArray

LAZY: Final = 128  # columns whose updates of the others are made at once
ROWS: Final = 4096  # outputs at a time; bounds memory
FIT_NUMBERS: Final = 1 << 24  # at a time where scales are solved for
SHRINK: Final = np.linspace(0.5, 1.0, 21)  # of the scale with which no weight is cut off
LEAST_PIVOT: Final = 1e-9  # of the diagonal of scales' equations

Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Settings:
    """`damping` is what the Hessian's diagonal gets more, of its mean; `sorted` takes columns with large activations
    first; `sweeps` is how often scales and codes are refined afterwards."""

    damping: float = 0.01
    sorted: bool = True
    sweeps: int = 1


class Hessian:
    """The mean of x x^T over the inputs x of a matrix: what its output's squared error is made of."""

    def __init__(self, inputs: int) -> None:
        self._sum = np.zeros((inputs, inputs), np.float64)
        self.count = 0

    def add(self, x: FloatArray) -> None:
        """Inputs, float32 [n, inputs]."""
        self._sum += x.T @ x
        self.count += len(x)

    @staticmethod
    def of(x: FloatArray) -> Hessian:
        """Of inputs [..., inputs]."""
        found, rows = Hessian(x.shape[-1]), x.reshape(-1, x.shape[-1])
        for some in _slices(len(rows), ROWS):
            found.add(rows[some])
        return found

    @property
    def matrix(self) -> Doubles:
        """float64 [inputs, inputs]."""
        return self._sum / max(self.count, 1)


@dataclass(frozen=True, slots=True)
class Grid:
    """The numbers that the weights of a block can become: code * scale + minimum, for whole codes from -2^(bits-1) to
    2^(bits-1) - 1. `scales` and `minima` float32 [outputs, blocks]; a scale of 0 leaves the minimum alone."""

    bits: int
    scales: FloatArray
    minima: FloatArray | None = None

    @property
    def half(self) -> int:
        return 1 << (self.bits - 1)

    def quantized(self, codes: FloatArray) -> Quantized:
        """Codes, whole numbers [outputs, inputs], as a matrix of the bundle."""
        whole = (codes + self.half).astype(np.uint8).reshape(*self.scales.shape, BLOCK)
        return Quantized(self.bits, pack4(whole) if self.bits == 4 else whole, self.scales, self.minima)

    def rows(self, rows: slice) -> Grid:
        return replace(self, scales=self.scales[rows], minima=None if self.minima is None else self.minima[rows])


def quantized(
    weights: FloatArray, hessian: Doubles, bits: int, *, minima: bool = False, settings: Settings | None = None
) -> Quantized:
    """The matrix [outputs, inputs] in blocks of 32, for the Hessian [inputs, inputs] of its inputs; with `minima` each
    block has a minimum beside its scale. ValueError if the inputs do not divide into blocks."""
    _check(weights)
    settings = settings or Settings()
    damped = _damped(hessian, settings.damping)
    order = np.argsort(-np.diag(damped), kind="stable") if settings.sorted else np.arange(len(damped))
    factor = _factor(damped, order)
    parts = [
        _some(np.ascontiguousarray(weights[rows], np.float32), damped, factor, order, bits, minima, settings)
        for rows in _slices(len(weights), ROWS)
    ]
    return parts[0].of(np.concatenate(arrays) for arrays in zip(*(part.arrays for part in parts), strict=True))


def nearest(weights: FloatArray, bits: int, *, minima: bool = False) -> Quantized:
    """Rounded to nearest, without any calibration: with `minima` a block's codes go from its least to its largest
    weight, else as `requantize` has them. ValueError if the inputs do not divide into blocks."""
    _check(weights)
    weights = np.ascontiguousarray(weights, np.float32)
    if not minima:
        plain = requantize(Dense(weights), bits)
        assert isinstance(plain, Quantized)
        return plain
    blocks, half = weights.reshape(len(weights), -1, BLOCK), 1 << (bits - 1)
    low, high = blocks.min(axis=-1), blocks.max(axis=-1)
    scales, offsets = _half((high - low) / (2 * half - 1)), _half((high + low) / 2 + (high - low) / (4 * half - 2))
    whole = _nearest(blocks - offsets[..., None], scales[..., None], half)
    return Grid(bits, scales, offsets).quantized(whole.reshape(weights.shape))


def loss(weights: FloatArray, matrix: Quantized | Dense, hessian: Doubles) -> Doubles:
    """What the matrix costs instead of the weights, per output: the mean squared error of its products, [outputs]."""
    error = (weights - matrix.dense()).astype(np.float64)
    return np.asarray(np.einsum("oi,oi->o", error @ hessian, error))


def codes(weights: FloatArray, hessian: Doubles, grid: Grid, settings: Settings) -> FloatArray:
    """The paper's rounding for a given grid: whole numbers float32 [outputs, inputs]."""
    damped = _damped(hessian, settings.damping)
    order = np.argsort(-np.diag(damped), kind="stable") if settings.sorted else np.arange(len(damped))
    return _gptq(weights, _factor(damped, order), order, grid)


def _check(weights: FloatArray) -> None:
    if weights.shape[1] % BLOCK:
        raise ValueError(f"{weights.shape[1]} inputs do not divide into blocks of {BLOCK}")


def _some(
    weights: FloatArray,
    hessian: Doubles,
    factor: Doubles,
    order: Ints,
    bits: int,
    minima: bool,
    settings: Settings,
) -> Quantized:
    """`quantized` for a few outputs."""
    importance = np.empty(len(order))
    importance[order] = np.diag(factor) ** -2.0
    grid = _searched(weights, importance, bits, minima)
    best = grid.quantized(_gptq(weights, factor, order, grid))
    cost = loss(weights, best, hessian)
    for _ in range(settings.sweeps):
        grid = _fitted(weights, hessian, best)
        better = grid.quantized(_swept(weights, hessian, _codes_of(best), grid))
        best, cost = _per_row(best, cost, better, loss(weights, better, hessian))
    plain = nearest(weights, bits, minima=minima)
    return _per_row(best, cost, plain, loss(weights, plain, hessian))[0]


def _damped(hessian: Doubles, damping: float) -> Doubles:
    """With more on its diagonal, so that it has an inverse; an input that was never there weighs as little."""
    mean = float(np.diag(hessian).mean())
    return np.asarray(hessian + np.eye(len(hessian)) * (damping * mean or 1.0))


def _factor(hessian: Doubles, order: Ints) -> Doubles:
    """U with U^T U = the inverse of the Hessian, columns in `order`: upper triangular, row n of it is what the paper's
    update needs at step n."""
    inverse = np.linalg.inv(hessian[np.ix_(order, order)])
    return np.asarray(np.linalg.cholesky((inverse + inverse.T) / 2).T)


def _searched(weights: FloatArray, importance: Doubles, bits: int, minima: bool) -> Grid:
    """For each block the scale (and minimum) with which rounding to nearest costs least, columns weighed by
    `importance` [inputs]."""
    blocks = weights.reshape(len(weights), -1, BLOCK)
    weigh = importance.reshape(-1, BLOCK).astype(np.float32)
    best, scales, offsets = None, np.zeros(blocks.shape[:2], np.float32), np.zeros(blocks.shape[:2], np.float32)
    for scale, offset in _candidates(blocks, bits, minima):
        scale, offset = _half(scale), _half(offset)
        error = blocks - _rounded(blocks, scale[..., None], offset[..., None], 1 << (bits - 1), minima)
        cost = np.einsum("obi,bi->ob", error * error, weigh)
        if best is None:
            best, scales, offsets = cost, scale, offset
        else:
            better = cost < best
            best, scales, offsets = (
                np.where(better, new, old) for new, old in ((cost, best), (scale, scales), (offset, offsets))
            )
    return Grid(bits, scales, offsets if minima else None)


def _candidates(blocks: FloatArray, bits: int, minima: bool) -> Iterator[tuple[FloatArray, FloatArray]]:
    """(scales, minima) of blocks [outputs, blocks, 32]: those with which the whole range of a block has a code, and
    smaller ones. Symmetric codes reach further on one side: either side may be that of the largest weight."""
    half = np.float32(1 << (bits - 1))
    if minima:
        low, high = blocks.min(axis=-1), blocks.max(axis=-1)
        for shrink in SHRINK.astype(np.float32):
            scale = (high - low) * shrink / (2 * half - 1)
            yield scale, (high + low) / 2 + scale / 2  # the middle of codes is -1/2
        return
    at = np.abs(blocks).argmax(axis=-1, keepdims=True)
    largest = np.take_along_axis(blocks, at, axis=-1)[..., 0]
    for shrink in SHRINK.astype(np.float32):
        yield largest * shrink / -half, np.zeros_like(largest)
        yield largest * shrink / (half - 1), np.zeros_like(largest)


def _half(values: FloatArray) -> FloatArray:
    """Rounded to float16, which the kernels read half as many bytes for, where that has them all."""
    if np.abs(values).max(initial=0) > np.finfo(np.float16).max:
        return values
    return values.astype(np.float16).astype(np.float32)


def _rounded(values: FloatArray, scale: FloatArray, offset: FloatArray, half: int, minima: bool) -> FloatArray:
    """The nearest numbers of the grid."""
    whole = _nearest(values - offset if minima else values, scale, half)
    return np.asarray(whole * scale + offset if minima else whole * scale)


def _nearest(values: FloatArray, scale: FloatArray, half: int) -> FloatArray:
    """Codes, as float32."""
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
    return np.asarray(np.clip(np.rint(values * inverse), -half, half - 1), np.float32)


def _gptq(weights: FloatArray, factor: Doubles, order: Ints, grid: Grid) -> FloatArray:
    """Columns in `order`, each rounded and its error spread over those that follow. Everything stands with outputs
    last, so that a column is one run of memory."""
    left = weights.T[order].astype(np.float64)
    block = order // BLOCK
    found = np.empty(left.shape, np.float32)
    for batch in _slices(len(left), LAZY):
        errors = np.empty((batch.stop - batch.start, left.shape[1]))
        for n in range(batch.start, batch.stop):
            scale, offset = _column(grid, block[n])
            found[n] = _nearest(left[n] - offset, scale, grid.half)
            error = (left[n] - (found[n] * scale + offset)) / factor[n, n]
            errors[n - batch.start] = error
            left[n + 1 : batch.stop] -= factor[n, n + 1 : batch.stop, None] * error
        left[batch.stop :] -= factor[batch, batch.stop :].T @ errors
    return _back(found, order)


def _swept(weights: FloatArray, hessian: Doubles, start: FloatArray, grid: Grid) -> FloatArray:
    """Every column once more to the code that is best while all others stay."""
    now = start.T.copy()
    block = np.arange(len(now)) // BLOCK
    wanted = weights.T
    error = wanted - np.stack([_value(grid, block[n], now[n]) for n in range(len(now))]).astype(np.float64)
    pull = hessian @ error  # half the gradient
    diagonal = np.diag(hessian)
    for batch in _slices(len(now), LAZY):
        before = error[batch].copy()
        for n in range(batch.start, batch.stop):
            scale, offset = _column(grid, block[n])
            target = wanted[n] + (pull[n] - diagonal[n] * error[n]) / diagonal[n]
            now[n] = _nearest(target - offset, scale, grid.half)
            change = wanted[n] - (now[n] * scale + offset) - error[n]
            error[n] += change
            pull[batch] += hessian[batch, n, None] * change
        rest = np.r_[0 : batch.start, batch.stop : len(now)]
        pull[rest] += hessian[np.ix_(rest, np.arange(batch.start, batch.stop))] @ (error[batch] - before)
    return np.ascontiguousarray(now.T)


def _fitted(weights: FloatArray, hessian: Doubles, matrix: Quantized) -> Grid:
    """The scales (and minima) that are best for the codes of the matrix: per output a linear least-squares problem in
    as many unknowns as it has blocks."""
    basis = [_codes_of(matrix)]
    if matrix.minima is not None:
        basis.append(np.ones_like(basis[0]))
    blocks, inputs = matrix.scales.shape[1], weights.shape[1]
    step = max(1, FIT_NUMBERS // (len(basis) * blocks * inputs))
    parts = [_solved(weights[rows], hessian, [b[rows] for b in basis]) for rows in _slices(len(weights), step)]
    found = _half(np.concatenate(parts).astype(np.float32))
    return Grid(matrix.bits, found[:, :blocks], None if matrix.minima is None else found[:, blocks:])


def _solved(weights: FloatArray, hessian: Doubles, basis: list[FloatArray]) -> Doubles:
    """[outputs, unknowns]: the factors of each block of each basis."""
    outputs, inputs = weights.shape
    columns = np.stack([b.reshape(outputs, -1, BLOCK) for b in basis], axis=1).reshape(outputs, -1, BLOCK)
    count = columns.shape[1]
    place = np.arange(count) % (inputs // BLOCK)
    spread = np.stack(
        [columns[:, u] @ hessian[place[u] * BLOCK : (place[u] + 1) * BLOCK] for u in range(count)], axis=1
    )  # [outputs, unknowns, inputs]
    spread = spread.reshape(outputs, count, -1, BLOCK)
    left = np.stack([np.einsum("oub,ob->ou", spread[:, :, place[u]], columns[:, u]) for u in range(count)], axis=2)
    right = np.einsum("oui,oi->ou", spread.reshape(outputs, count, inputs), weights)
    diagonal = np.einsum("ouu->ou", left)
    diagonal += np.maximum(diagonal.max(axis=1, keepdims=True), 1e-30) * LEAST_PIVOT  # blocks of zeros get the scale 0
    return np.asarray(np.linalg.solve(left, right[..., None])[..., 0])


def _per_row(first: Quantized, cost: Doubles, second: Quantized, other: Doubles) -> tuple[Quantized, Doubles]:
    """For each output the cheaper of the two, the first if they are equal."""
    better = other < cost
    pairs = zip(first.arrays, second.arrays, strict=True)
    arrays = [np.where(better.reshape(-1, *[1] * (a.ndim - 1)), b, a) for a, b in pairs]
    return first.of(arrays), np.where(better, other, cost)


def _codes_of(matrix: Quantized) -> FloatArray:
    """Whole numbers around zero, float32 [outputs, inputs]."""
    stored = matrix.packed if matrix.bits == 8 else unpack4(matrix.packed)
    return (stored.astype(np.float32) - np.float32(1 << (matrix.bits - 1))).reshape(matrix.shape)


def _column(grid: Grid, block: int) -> tuple[FloatArray, Any]:
    return grid.scales[:, block], 0 if grid.minima is None else grid.minima[:, block]


def _value(grid: Grid, block: int, whole: FloatArray) -> FloatArray:
    scale, offset = _column(grid, block)
    return np.asarray(whole * scale + offset)


def _back(columns: FloatArray, order: Ints) -> FloatArray:
    """[inputs in `order`, outputs] as [outputs, inputs]."""
    found = np.empty_like(columns)
    found[order] = columns
    return np.ascontiguousarray(found.T)


def _slices(count: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, count)) for start in range(0, count, step))
