"""Mutated containers of features: each is read as some tensors or refused as a bad frame, within the memory allowed."""

from __future__ import annotations

import random
import struct
import tracemalloc
import zlib

import numpy as np
import pytest

from edgewise.errors import BadFrame
from edgewise.wire.feature import CODECS, decode, encode

LIMIT = 1 << 20


def mutated(draw: random.Random, good: bytes) -> bytes:
    """Some bytes changed, cut off or put in; mostly with a checksum that fits, as an enemy would have it."""
    bad = bytearray(good)
    for _ in range(draw.randint(1, 6)):
        place, kind = draw.randrange(len(bad)), draw.random()
        if kind < 0.7:
            bad[place] = draw.randrange(256)
        elif kind < 0.85:
            del bad[max(place, 1) :]
        else:
            bad[place:place] = draw.randbytes(draw.randint(1, 9))
    if len(bad) >= 16 and draw.random() < 0.95:
        bad[12:16] = struct.pack("<I", zlib.crc32(bad[16:]))
    return bytes(bad)


@pytest.mark.parametrize("count", [20_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_no_mutation_does_more_than_be_refused(count: int) -> None:
    draw, random_numbers = random.Random(0), np.random.default_rng(0)
    tensors = {"x": random_numbers.normal(size=(1, 3, 5, 5)).astype(np.float32), "n": np.arange(4)}
    good = [encode(tensors, codec, label="net@3f") for codec in CODECS]
    read = 0
    tracemalloc.start()
    for _ in range(count):
        try:
            read += len(decode(mutated(draw, draw.choice(good)), limit_bytes=LIMIT)) >= 0
        except BadFrame:
            continue
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0 < read < count / 2
    assert peak < 16 * LIMIT
