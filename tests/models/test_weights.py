"""Packing, unpacking and rounding of weight blocks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgewise.models.weights import BLOCK, Dense, Quantized, pack4, requantize, stack, unpack4


@given(hnp.arrays(np.uint8, (3, 2, BLOCK), elements=st.integers(0, 15)))
def test_nibbles_come_back(codes: np.ndarray) -> None:
    assert np.array_equal(unpack4(pack4(codes)), codes)


@pytest.mark.parametrize("bits", [4, 8])
def test_requantizing_errs_by_half_a_step_and_keeps_the_largest(bits: int) -> None:
    values = np.random.default_rng(0).standard_normal((16, 4 * BLOCK)).astype(np.float32)
    rounded = requantize(Dense(values), bits)
    assert isinstance(rounded, Quantized)
    blocks = np.abs(values - rounded.dense()).reshape(16, 4, BLOCK)
    step = np.abs(rounded.scales)[..., None]
    # The code opposite to the largest magnitude is missing: there the error may reach a whole step.
    assert (blocks <= step * 1.0001).all()
    assert (blocks <= step * 0.5001).mean() > 0.97
    largest = np.abs(values.reshape(16, 4, BLOCK)).argmax(-1)[..., None]
    assert np.take_along_axis(blocks, largest, -1).max() < 1e-6


def test_requantizing_zeros_and_odd_shapes() -> None:
    zeros = requantize(Dense(np.zeros((2, BLOCK), np.float32)), 4)
    assert np.array_equal(zeros.dense(), np.zeros((2, BLOCK)))
    odd = Dense(np.ones((2, BLOCK + 1), np.float32))
    assert requantize(odd, 4) is odd


def test_stacking_joins_outputs_of_one_kind_only() -> None:
    rng = np.random.default_rng(0)
    a, b = (requantize(Dense(rng.standard_normal((n, BLOCK)).astype(np.float32)), 4) for n in (2, 3))
    joined = stack([a, b])
    assert joined is not None
    assert np.array_equal(joined.dense(), np.concatenate([a.dense(), b.dense()]))
    assert stack([a, Dense(b.dense())]) is None
    assert stack([a, requantize(b, 8)]) is None


def test_reordering_rows_reorders_outputs() -> None:
    values = np.random.default_rng(0).standard_normal((4, BLOCK)).astype(np.float32)
    order = np.array([2, 0, 3, 1])
    for matrix in (Dense(values), requantize(Dense(values), 4)):
        assert np.array_equal(matrix.rows(order).dense(), matrix.dense()[order])
