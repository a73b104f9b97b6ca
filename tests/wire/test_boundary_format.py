"""docs/formats/boundary.md read literally, one number at a time, beside the codec."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from edgewise.wire.codec import codec

LOW = {"int4": 1, "int8": 5}


def rows_of(width: int) -> np.ndarray:
    random = np.random.default_rng(5)
    rows = random.standard_normal((3, width)).astype(np.float32)
    rows[1, random.integers(0, width, 5)] *= 3000
    rows[2] *= np.float32(1e-20)
    return rows


def factors_of(odd: int) -> list[int]:
    factors, factor = [], 3
    while odd > 1:
        if odd % factor:
            factor += 2
        else:
            factors.append(factor)
            odd //= factor
    return factors


def entry(i: int, j: int, whole: int, factors: list[int]) -> int:
    """Of the rotation's matrix."""
    value = 1
    for p in reversed(factors):
        i, in_i = divmod(i, p)
        j, in_j = divmod(j, p)
        value *= (p if in_i == in_j else 0) - 2
    assert max(i, j) < whole
    return value * (-1 if (i & j).bit_count() & 1 else 1)


def signs(size: int) -> list[int]:
    state, found = 1, []
    for _ in range(size):
        state = (1664525 * state + 1013904223) % 2**32
        found.append(-1 if state >> 31 else 1)
    return found


def float_of(upper_bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", upper_bits))[0])


def read(payload: bytes, width: int, low: int, gains: np.ndarray) -> list[np.float32]:
    size = -(-width // 32) * 32
    odd = size
    while odd % 2 == 0:
        odd //= 2
    whole, factors = size // odd, factors_of(odd)
    exponent, escapes = payload[0] - 127, payload[1]
    step = float_of(int.from_bytes(payload[2:4], "little") << 16)
    room = "".join(f"{byte:08b}" for byte in payload[4 : len(payload) - 3 * escapes])
    negative, planes, unary = room[:size], room[size : size * (1 + low)], room[size * (1 + low) :]
    halves = []
    for n in range(size):
        rest = unary.index("1")
        unary = unary[rest + 1 :]
        a = rest << low | sum(int(planes[size * plane + n]) << plane for plane in range(low))
        halves.append(-(2 * a + 1) if negative[n] == "1" else 2 * a + 1)
    assert "1" not in unary
    factor = step / (2 * np.sqrt(float(whole)) * odd)
    turned = [sum(entry(i, j, whole, factors) * half for j, half in enumerate(halves)) for i in range(width)]
    row = [sign * float(number) * factor for sign, number in zip(signs(width), turned, strict=True)]
    places = 23 - (width - 1).bit_length()
    for n in range(escapes):
        whole_escape = int.from_bytes(payload[len(payload) - 3 * (n + 1) : len(payload) - 3 * n], "big")
        channel, sign = whole_escape >> places + 1, whole_escape >> places & 1
        code, shift = whole_escape & 2**places - 1, 27 - places
        smallest = struct.unpack("<I", struct.pack("<f", 128.0))[0]
        units = int(float_of((code << shift) + smallest))
        row[channel] += (-units if sign else units) / 2**23
    return [np.float32(number * 2.0**exponent / float(gain)) for number, gain in zip(row, gains, strict=True)]


@pytest.mark.parametrize("name", ["int4", "int8"])
@pytest.mark.parametrize("width", [31, 100, 160, 576])
def test_the_page_reads_what_the_codec_wrote(name: str, width: int) -> None:
    gains = np.linspace(0.01, 1, width, dtype=np.float32)
    its = codec(name, gains)
    payload = its.encode(rows_of(width))
    assert payload[1, 1] > 0
    back = its.decode(payload, width)
    for n, row in enumerate(payload):
        assert np.array(read(row.tobytes(), width, LOW[name], gains)).tobytes() == back[n].tobytes()


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_the_step_is_the_finest_that_fits(name: str) -> None:
    its = codec(name)
    payload = its.encode(rows_of(576))
    for row in payload:
        free = 8 * (len(row) - 4 - 3 * int(row[1]))
        bits = np.unpackbits(row[4 : len(row) - 3 * int(row[1])])
        used = int(np.flatnonzero(bits)[-1]) + 1
        assert used <= free
        assert free - used < 576 * 0.02  # a step is up to 0.8 % coarser than could be
