"""GPTQ against the paper's update written out in float64, and against rounding to nearest."""

from __future__ import annotations

import numpy as np
import pytest

from edgewise.compress.quantize.gptq import Grid, Hessian, Settings, codes, loss, nearest, quantized
from edgewise.models.weights import BLOCK, Dense, Quantized, requantize


def inputs(count: int, size: int, seed: int = 0) -> np.ndarray:
    """Inputs [count, size] that hang together and differ in size, as a model's do."""
    random = np.random.default_rng(seed)
    mixing = random.standard_normal((size, size)) @ np.diag(np.geomspace(1, 0.02, size))
    return (random.standard_normal((count, size)) @ mixing).astype(np.float32)


def weights(outputs: int, size: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((outputs, size)).astype(np.float32)


def written_out(w: np.ndarray, hessian: np.ndarray, grid: Grid, settings: Settings) -> np.ndarray:
    """The update of Frantar et al. as it is derived: round a column, correct all that are left by its error times its
    row of the inverse Hessian over the diagonal, take the column out of the inverse by one step of Gauss."""
    damped = hessian + np.eye(len(hessian)) * settings.damping * np.diag(hessian).mean()
    inverse, w = np.linalg.inv(damped), w.astype(np.float64)
    found = np.empty(w.shape)
    order = np.argsort(-np.diag(damped), kind="stable") if settings.sorted else np.arange(len(damped))
    for n in order:
        scale = grid.scales[:, n // BLOCK].astype(np.float64)
        offset = 0 if grid.minima is None else grid.minima[:, n // BLOCK].astype(np.float64)
        found[:, n] = np.clip(np.rint((w[:, n] - offset) / scale), -grid.half, grid.half - 1)
        error = (w[:, n] - (found[:, n] * scale + offset)) / inverse[n, n]
        w -= np.outer(error, inverse[n])
        inverse -= np.outer(inverse[:, n], inverse[n]) / inverse[n, n]
    return found


@pytest.mark.parametrize("sorted_", [False, True])
@pytest.mark.parametrize("minima", [False, True])
def test_codes_are_those_of_the_papers_update(sorted_: bool, minima: bool) -> None:
    w, hessian = weights(24, 6 * BLOCK), Hessian.of(inputs(600, 6 * BLOCK)).matrix
    plain = nearest(w, 4, minima=minima)
    grid, settings = Grid(4, plain.scales, plain.minima), Settings(sorted=sorted_)
    expected = written_out(w, hessian, grid, settings)
    assert np.array_equal(codes(w, hessian, grid, settings), expected)
    cost = loss(w, grid.quantized(expected.astype(np.float32)), hessian)
    assert cost.sum() < 0.7 * loss(w, plain, hessian).sum()  # and it is worth the trouble


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("seed", range(4))
def test_no_output_is_worse_than_rounded_to_nearest_at_equal_size(bits: int, seed: int) -> None:
    w, hessian = weights(40, 4 * BLOCK, seed), Hessian.of(inputs(90, 4 * BLOCK, seed)).matrix  # not of full rank
    plain, ours = requantize(Dense(w), bits), quantized(w, hessian, bits)
    assert isinstance(plain, Quantized)
    assert sum(a.nbytes for a in ours.arrays) == sum(a.nbytes for a in plain.arrays)
    damped = hessian + np.eye(len(hessian)) * 0.01 * np.diag(hessian).mean()
    assert (loss(w, ours, damped) <= loss(w, plain, damped) * (1 + 1e-9)).all()
    assert loss(w, ours, hessian).sum() < 0.5 * loss(w, plain, hessian).sum()


def test_the_error_is_that_of_the_products() -> None:
    x, w = inputs(200, 2 * BLOCK), weights(8, 2 * BLOCK)
    rounded = nearest(w, 4)
    products = ((x @ (w - rounded.dense()).T) ** 2).mean(axis=0)
    np.testing.assert_allclose(loss(w, rounded, Hessian.of(x).matrix), products, rtol=1e-4)


def test_a_hessian_is_the_same_in_pieces() -> None:
    x = inputs(300, BLOCK)
    pieces = Hessian(BLOCK)
    for at in range(0, 300, 70):
        pieces.add(x[at : at + 70])
    assert pieces.count == 300
    np.testing.assert_allclose(pieces.matrix, x.astype(np.float64).T @ x / 300, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(Hessian.of(x.reshape(3, 100, BLOCK)).matrix, pieces.matrix, rtol=1e-5, atol=1e-6)


def test_sweeps_only_help() -> None:
    w, hessian = weights(32, 5 * BLOCK), Hessian.of(inputs(500, 5 * BLOCK)).matrix
    costs = [loss(w, quantized(w, hessian, 4, settings=Settings(sweeps=n)), hessian).sum() for n in (0, 1, 3)]
    assert costs[0] > costs[1] > costs[2]


def test_minima_pay_where_blocks_do_not_lie_around_zero() -> None:
    hessian = Hessian.of(inputs(300, 2 * BLOCK)).matrix
    w = weights(16, 2 * BLOCK) * 0.1 + np.repeat(weights(16, 2, seed=5), BLOCK, axis=1)
    without, with_ = (quantized(w, hessian, 4, minima=minima) for minima in (False, True))
    assert without.minima is None
    assert with_.minima is not None
    assert loss(w, with_, hessian).sum() < 0.2 * loss(w, without, hessian).sum()
    assert np.abs(nearest(w, 4, minima=True).dense() - w).max() < np.abs(nearest(w, 4).dense() - w).max()


def test_scales_are_numbers_of_two_bytes() -> None:
    w, hessian = weights(16, 4 * BLOCK) * 1e-3, Hessian.of(inputs(300, 4 * BLOCK)).matrix
    scales = quantized(w, hessian, 4).scales
    assert np.array_equal(scales, scales.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("minima", [False, True])
def test_zeros_stay_zeros(bits: int, minima: bool) -> None:
    w = weights(4, 3 * BLOCK)
    w[:, :BLOCK] = 0
    w[2] = 0
    hessian = Hessian.of(inputs(100, 3 * BLOCK)).matrix
    hessian[BLOCK : BLOCK + 8] = hessian[:, BLOCK : BLOCK + 8] = 0  # inputs that never came
    found = quantized(w, hessian, bits, minima=minima).dense()
    assert np.isfinite(found).all()
    assert np.array_equal(found[2], np.zeros(3 * BLOCK))
    for nothing in (np.zeros_like(hessian), hessian):
        assert np.abs(quantized(w, nothing, bits, minima=minima).dense() - w).max() < np.abs(w).max()


def test_huge_weights_keep_scales_of_four_bytes() -> None:
    w = weights(4, BLOCK) * 1e7
    found = quantized(w, np.eye(BLOCK), 4)
    assert np.isfinite(found.scales).all()
    assert np.abs(found.dense() - w).max() < 0.2 * np.abs(w).max()


def test_rows_do_not_depend_on_each_other() -> None:
    w, hessian = weights(12, 2 * BLOCK), Hessian.of(inputs(200, 2 * BLOCK)).matrix
    whole = quantized(w, hessian, 4)
    part = quantized(w[5:9], hessian, 4)
    assert np.array_equal(whole.rows(np.arange(5, 9)).dense(), part.dense())


def test_what_does_not_divide_into_blocks_is_refused() -> None:
    for call in (lambda w: quantized(w, np.eye(BLOCK + 1), 4), lambda w: nearest(w, 4)):
        with pytest.raises(ValueError, match="33 inputs"):
            call(np.ones((2, BLOCK + 1), np.float32))
