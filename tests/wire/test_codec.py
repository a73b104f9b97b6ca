"""Boundary codecs: every row by itself, sizes as promised, nothing that crashes."""

from __future__ import annotations

import numpy as np
import pytest

from edgewise.errors import CodecOverflow, RemoteBroken, UsageError
from edgewise.wire.codec import codec, codec_numbered

NAMES = ["exact", "fp16", "int8", "int4"]
WIDTHS = [100, 576, 640, 896, 1536]


def normal(count: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


def relative_error(rows: np.ndarray, back: np.ndarray) -> float:
    return float(np.linalg.norm(rows - back) / np.linalg.norm(rows))


@pytest.mark.parametrize(("name", "most"), [("exact", 0.0), ("fp16", 5e-4), ("int8", 0.012), ("int4", 0.2)])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_round_trip_stays_close(name: str, most: float, width: int) -> None:
    rows, its = normal(40, width), codec(name)
    payload = its.encode(rows)
    assert payload.dtype == np.uint8
    assert payload.shape == (40, its.row_bytes(width))
    back = its.decode(payload, width)
    assert back.dtype == np.float32
    assert relative_error(rows, back) <= most


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_row_has_the_same_bytes_and_bits_alone_and_in_a_batch(name: str, width: int) -> None:
    rows, its = normal(256, width), codec(name)
    together = its.encode(rows)
    back = its.decode(together, width)
    for n in (0, 1, 100, 255):
        alone = its.encode(rows[n : n + 1])
        assert alone.tobytes() == together[n].tobytes()
        assert its.decode(alone, width).tobytes() == back[n].tobytes()


def test_numbers_and_names_of_codecs() -> None:
    assert [codec(name).number for name in NAMES] == [0, 1, 2, 3]
    assert [codec_numbered(n).name for n in range(4)] == NAMES
    with pytest.raises(UsageError, match="exact, fp16, int8, int4"):
        codec("int3")
    with pytest.raises(UsageError, match="3 \\(int4\\)"):
        codec_numbered(4)


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
