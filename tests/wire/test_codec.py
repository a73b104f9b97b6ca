"""Boundary codecs: every row by itself, sizes as promised, any bytes in, no crash."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgewise.errors import CodecOverflow, RemoteBroken, UsageError
from edgewise.wire.codec import codec, codec_numbered
from edgewise.wire.rotation import growth, unrotate

NAMES = ["exact", "fp16", "int8", "int4"]
WIDTHS = [1, 31, 100, 576, 640, 896, 1536, 2048, 2304]


FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


def normal(count: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


def errors(name: str, rows: np.ndarray) -> np.ndarray:
    """Of each row, relative to its length."""
    its, rows = codec(name), np.asarray(rows, np.float32)
    back = its.decode(its.encode(rows), rows.shape[1])
    assert back.dtype == np.float32
    assert back.shape == rows.shape
    exact = rows.astype(np.float64)
    return np.linalg.norm(exact - back, axis=1) / np.linalg.norm(exact, axis=1)


@pytest.mark.parametrize(("name", "most"), [("exact", 0.0), ("fp16", 5e-4), ("int8", 0.006), ("int4", 0.085)])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_round_trip_stays_close(name: str, most: float, width: int) -> None:
    assert errors(name, normal(40, width)).max() <= most


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_row_has_the_same_bytes_and_bits_alone_and_in_a_batch(name: str, width: int) -> None:
    its = codec(name)
    rows = normal(256, width) * np.float32(10) ** np.random.default_rng(1).integers(-3, 4, (256, width))
    rows = np.clip(rows, -65504, 65504).astype(np.float32)
    together = its.encode(rows)
    assert together.dtype == np.uint8
    assert together.shape == (256, its.row_bytes(width))
    back = its.decode(together, width)
    for n in (0, 1, 100, 255):
        alone = its.encode(rows[n : n + 1])
        assert alone.tobytes() == together[n].tobytes()
        assert its.decode(alone, width).tobytes() == back[n].tobytes()
    reversed_rows = np.asfortranarray(rows[::-1])  # another order in memory, too
    assert its.encode(reversed_rows).tobytes() == together[::-1].tobytes()
    assert its.decode(together[::-1], width).tobytes() == back[::-1].tobytes()


def test_sizes() -> None:
    sizes = {name: [codec(name).row_bytes(width) for width in (100, 576, 640, 2048)] for name in NAMES}
    assert sizes == {
        "exact": [400, 2304, 2560, 8192],
        "fp16": [200, 1152, 1280, 4096],
        "int8": [140, 588, 652, 2060],
        "int4": [76, 300, 332, 1036],
    }


@pytest.mark.parametrize("name", NAMES)
def test_no_rows_are_no_bytes(name: str) -> None:
    its = codec(name)
    assert its.encode(np.empty((0, 576), np.float32)).shape == (0, its.row_bytes(576))
    assert its.decode(np.empty((0, its.row_bytes(576)), np.uint8), 576).shape == (0, 576)


def test_numbers_and_names_of_codecs() -> None:
    assert [codec(name).number for name in NAMES] == [0, 1, 2, 3]
    assert [codec_numbered(n).name for n in range(4)] == NAMES
    with pytest.raises(UsageError, match="exact, fp16, int8, int4"):
        codec("int3")
    with pytest.raises(UsageError, match="3 \\(int4\\)"):
        codec_numbered(4)


@pytest.mark.parametrize(("name", "most"), [("int8", 0.006), ("int4", 0.085)])
@pytest.mark.parametrize("outliers", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("size", [30.0, 1e3, 1e4])
def test_outliers_wherever_they_stand_leave_the_others_as_fine_as_they_were(
    name: str, most: float, outliers: int, size: float
) -> None:
    rows, random = normal(64, 576), np.random.default_rng(2)
    large = np.stack([random.permutation(576)[:outliers] for _ in rows])
    others = np.ones_like(rows, bool)
    np.put_along_axis(others, large, False, axis=1)
    values = size * random.uniform(0.5, 1, large.shape) * random.choice([-1, 1], large.shape)
    np.put_along_axis(rows, large, values.astype(np.float32), axis=1)
    its = codec(name)
    rest = (rows - its.decode(its.encode(rows), 576))[others]
    assert np.sqrt(np.mean(rest**2)) <= most * (1 + outliers / 10)


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("width", WIDTHS)
def test_zeros_stay_zeros(name: str, width: int) -> None:
    its = codec(name)
    assert not its.decode(its.encode(np.zeros((3, width), np.float32)), width).any()


@pytest.mark.parametrize(("name", "most"), [("int8", 0.006), ("int4", 0.085)])
@pytest.mark.parametrize("width", [100, 576, 640, 896])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 3.4e38])
def test_rows_of_one_number_and_single_numbers(name: str, most: float, width: int, scale: float) -> None:
    flat = np.full((1, width), scale, np.float32)
    assert errors(name, flat).max() <= 1.2 * most  # rotated it has few different numbers
    single = np.zeros((width, width), np.float32)
    np.fill_diagonal(single, -scale)
    assert errors(name, single).max() <= 1e-3


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_the_largest_and_the_smallest_floats(name: str) -> None:
    largest = np.finfo(np.float32).max
    rows = np.stack([normal(1, 576)[0] * np.float32(s) for s in (1e-38, 1e-42, 8e37)])
    rows[2, 5], rows[2, 99] = largest, -largest
    found = errors(name, rows)
    assert found[2] <= 0.085
    assert found[0] <= 0.085
    its = codec(name)
    assert np.abs(its.decode(its.encode(rows[1:2]), 576)).max() < 1e-37  # too small to scale, still small


def test_the_row_that_the_rotation_makes_a_single_number() -> None:
    spikes = np.zeros((8, 576))
    spikes[np.arange(8), np.arange(8) * 70] = 1
    rows = (unrotate(spikes, 576) / growth(576)).astype(np.float32)
    assert errors("int4", rows).max() <= 0.085


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_gains_say_where_a_row_is_off(name: str) -> None:
    gains = np.ones(640, np.float32)
    gains[::5] = 1 / 64
    rows = normal(200, 640)
    rows[:, ::5] *= 50
    its = codec(name, gains)
    off = np.sqrt(np.mean((its.decode(its.encode(rows), 640) - rows).astype(np.float64) ** 2, axis=0))
    assert np.median(off[::5]) / np.median(off[gains == 1]) == pytest.approx(64, rel=0.05)
    plain = codec(name)
    before = np.mean((plain.decode(plain.encode(rows), 640) - rows)[:, gains == 1].astype(np.float64) ** 2) ** 0.5
    assert np.median(off[gains == 1]) < before / 20


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_gains_cannot_make_a_row_overflow(name: str) -> None:
    gains = np.geomspace(2.0**-10, 1, 576).astype(np.float32)
    rows = np.full((2, 576), 3.4e38, np.float32)
    rows[1] *= -1
    its = codec(name, gains)
    back = its.decode(its.encode(rows), 576)
    assert np.isfinite(back).all()
    assert (np.sign(back[:, 300:]) == np.sign(rows[:, 300:])).all()


def test_fp16_refuses_what_it_cannot_hold() -> None:
    rows = normal(3, 576)
    rows[1, 7] = 70000
    with pytest.raises(CodecOverflow, match="70000, fp16 holds up to 65504"):
        codec("fp16").encode(rows)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_every_codec_refuses_what_is_no_number(name: str, value: float) -> None:
    rows = normal(3, 576)
    rows[1, 7] = value
    with pytest.raises(CodecOverflow, match="finite"):
        codec(name).encode(rows)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_of_another_size_are_refused(name: str) -> None:
    its = codec(name)
    with pytest.raises(RemoteBroken, match="bytes"):
        its.decode(np.zeros((2, its.row_bytes(576) + 1), np.uint8), 576)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [100, 576, 640])
def test_random_bytes_give_numbers_or_are_refused(name: str, width: int) -> None:
    its, random = codec(name), np.random.default_rng(3)
    refused = 0
    for _ in range(300):
        payload = random.integers(0, 256, (2, its.row_bytes(width)), dtype=np.uint8)
        try:
            assert np.isfinite(its.decode(payload, width)).all()
        except RemoteBroken:
            refused += 1
    assert refused > 0


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_damaged_rows_give_numbers_or_are_refused(name: str) -> None:
    its, random = codec(name), np.random.default_rng(4)
    rows = normal(1, 576)
    rows[0, :6] *= 1000
    good, outcomes = its.encode(rows), set()
    for _ in range(2000):
        payload = good.copy()
        at = random.integers(0, 12) if random.random() < 0.3 else random.integers(0, payload.size)
        payload[0, at] ^= 1 << random.integers(0, 8)
        try:
            assert np.isfinite(its.decode(payload, 576)).all()
            outcomes.add("numbers")
        except RemoteBroken:
            outcomes.add("refused")
    assert outcomes == {"numbers", "refused"}


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["int8", "int4"]),
    arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 200)), elements=FINITE),
)
def test_any_row_comes_back_within_its_step(name: str, rows: np.ndarray) -> None:
    its = codec(name)
    back = its.decode(its.encode(rows), rows.shape[1]).astype(np.float64)
    peaks = np.abs(rows).max(axis=1).astype(np.float64)
    allowed = {"int8": 0.02, "int4": 0.25}[name] * peaks * np.sqrt(rows.shape[1]) + 2.0**-126
    assert (np.linalg.norm(back - rows, axis=1) <= allowed).all()


GOLDEN = {  # SHA-256 (its first 16 digits) of the bytes of 32 rows, and of what they decode to
    ("int8", 100): ["b768144d2e23c0e4", "f3129e40c93016c9"],
    ("int8", 576): ["4bd5a2bed0dd2397", "5c7de6c46dc1806a"],
    ("int8", 640): ["91be72b97217e161", "58fa556f971d71f2"],
    ("int4", 100): ["3d50c22b88b03a88", "6a924c82698c6ae6"],
    ("int4", 576): ["3a74c05be05e59fc", "6a0a646ba7f60648"],
    ("int4", 640): ["37a9a84a60d0139e", "9d1fd6c549dbadd7"],
}


def golden_rows(width: int) -> np.ndarray:
    """Made of whole numbers, so that no library's random numbers or functions take part."""
    n = np.arange(32 * width, dtype=np.int64).reshape(32, width)
    rows = ((n * 2654435761 + 12345) % 65521 - 32760).astype(np.float32) / np.float32(1024)
    rows[:, width // 3] *= 64
    rows[::5, width // 2] *= 1024
    return rows


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("width", [100, 576, 640])
def test_golden_bytes(name: str, width: int) -> None:
    gains = (np.arange(width) % 8 + 1).astype(np.float32) / np.float32(8) if width == 640 else None
    its, rows = codec(name, gains), golden_rows(width)
    payload = its.encode(rows)
    hashes = [hashlib.sha256(data.tobytes()).hexdigest()[:16] for data in (payload, its.decode(payload, width))]
    assert hashes == GOLDEN[name, width]


HASHED = """
import hashlib, sys
sys.path[:0] = sys.argv[1:]
from test_codec import GOLDEN, golden_rows
from edgewise.wire.codec import codec
found = hashlib.sha256()
for name, width in GOLDEN:
    payload = codec(name).encode(golden_rows(width))
    found.update(payload.tobytes() + codec(name).decode(payload, width).tobytes())
print(found.hexdigest())
"""


def test_other_instruction_sets_give_the_same_bytes_and_bits() -> None:
    """numpy's and its BLAS's: what they add in another order is whole numbers."""
    plain = {"NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL AVX512_SPR", "OPENBLAS_CORETYPE": "Prescott"}
    hashes = set()
    for changes in ({}, plain, {"OPENBLAS_CORETYPE": "Haswell", "OPENBLAS_NUM_THREADS": "1"}):
        command = [sys.executable, "-W", "ignore", "-c", HASHED, str(Path(__file__).parent)]
        ran = subprocess.run(command, env=os.environ | changes, capture_output=True, text=True, check=True)
        hashes.add(ran.stdout)
    assert len(hashes) == 1
