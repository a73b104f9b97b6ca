"""Damaged and hostile GGUF files: each ends in a SourceError or in a valid read, never in anything else."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgewise.errors import SourceError, UnsupportedModel
from edgewise.models.gguf import GGUF

U32, STRING, ARRAY = 4, 8, 9
HUGE = 2**63 - 1
PEAK_BYTES = 1 << 20  # what reading any of these small files may allocate


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def field(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, items: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + items


def tensor(name: str | bytes, dimensions: Sequence[int], kind: int = 0, offset: int = 0) -> bytes:
    shape = struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
    return text(name) + shape + struct.pack("<IQ", kind, offset)


def image(
    fields: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    *,
    data: int = 256,
    magic: bytes = b"GGUF",
    version: bytes = struct.pack("<I", 3),
    counts: tuple[int, int] | None = None,
) -> bytes:
    tensor_count, field_count = counts or (len(tensors), len(fields))
    head = magic + version + struct.pack("<QQ", tensor_count, field_count) + b"".join([*fields, *tensors])
    return head + bytes(-len(head) % 32) + bytes(data)


GOOD = image(
    [
        field("general.architecture", STRING, text("llama")),
        field("n", U32, struct.pack("<I", 7)),
        field("flag", 7, b"\x01"),
        field("words", ARRAY, array(STRING, 3, text("a") + text("") + text("ü"))),
        field("numbers", ARRAY, array(U32, 3, struct.pack("<3I", 1, 2, 3))),
        field("nested", ARRAY, array(ARRAY, 2, array(0, 2, b"\x01\x02") + array(0, 0, b""))),
    ],
    [tensor("a", [4, 2]), tensor("b", [32, 2], 3, 32)],
    data=72,
)

BAD = {
    "empty": (b"", "is empty"),
    "no magic": (b"PK\x03\x04" + GOOD[4:], r"starts with b'PK"),
    "big-endian": (image(version=struct.pack(">I", 3)), "big-endian"),
    "version 0": (image(version=bytes(4)), "version 0"),
    "version 1": (image(version=struct.pack("<I", 1)), "version 1, read are 2 and 3"),
    "version 4": (image(version=struct.pack("<I", 4)), "version 4"),
    "tensor count": (image(counts=(HUGE, 0)), f"{HUGE} tensors.*at most"),
    "field count": (image(counts=(0, HUGE)), f"{HUGE} fields.*at most"),
    "tensor count beyond the file": (image(counts=(1000, 0)), "1000 tensors needs 32000 bytes"),
    "field count beyond the file": (image(counts=(0, 1000)), "1000 fields needs 13000 bytes"),
    "key length": (image([struct.pack("<Q", HUGE)]), f"the key of field 0 has {HUGE} bytes"),
    "text length": (image([field("k", STRING, struct.pack("<Q", 2**40))]), f"'k' has {2**40} bytes"),
    "key not UTF-8": (image([field(b"\xff", U32, bytes(4))]), "not UTF-8"),
    "text not UTF-8": (image([field("k", STRING, text(b"a\xc3"))]), "'k'.*not UTF-8"),
    "value type": (image([field("k", 13, bytes(4))]), "value type 13, known are 0..12"),
    "boolean": (image([field("k", 7, b"\x02")]), "neither 0 nor 1"),
    "array count": (image([field("k", ARRAY, array(U32, HUGE, b""))]), f"{HUGE} items of the field 'k'"),
    "array beyond the file": (image([field("k", ARRAY, array(12, 2**20, b""))]), f"needs {2**23} bytes"),
    "texts beyond the file": (image([field("k", ARRAY, array(STRING, 2**20, b""))]), f"needs {2**23} bytes"),
    "arrays beyond the file": (image([field("k", ARRAY, array(ARRAY, 2**20, b""))]), "bytes"),
    "item type": (image([field("k", ARRAY, array(77, 1, b""))]), "value type 77"),
    "deep nesting": (image([field("k", ARRAY, array(ARRAY, 1, array(ARRAY, 1, b"")))]), "deeper than 2"),
    "endless nesting": (image([field("k", ARRAY, array(ARRAY, 1, b"") * 5000)]), "deeper than 2"),
    "field twice": (image([field("k", U32, bytes(4))] * 2), "'k' appears twice"),
    "alignment 0": (image([field("general.alignment", U32, bytes(4))]), "power of two"),
    "alignment 24": (image([field("general.alignment", U32, struct.pack("<I", 24))]), "is 24"),
    "alignment text": (image([field("general.alignment", STRING, text("32"))]), "'32'"),
    "tensor twice": (image(tensors=[tensor("a", [4]), tensor("a", [4], 0, 32)]), "'a' appears twice"),
    "no dimensions": (image(tensors=[tensor("a", [])]), "0 dimensions"),
    "5 dimensions": (image(tensors=[tensor("a", [1] * 5)]), "5 dimensions, allowed are 1..4"),
    "many dimensions": (image(tensors=[text("a") + struct.pack("<I", 2**32 - 1) + bytes(40)]), "dimensions"),
    "empty shape": (image(tensors=[tensor("a", [4, 0])]), r"empty shape \(0, 4\)"),
    "shape beyond all": (image(tensors=[tensor("a", [2**62] * 4)]), "ends at byte"),
    "ragged blocks": (image(tensors=[tensor("a", [33, 2], 2)]), "rows of 33, Q4_0 needs multiples of 32"),
    "unaligned": (image(tensors=[tensor("a", [4], 0, 8)]), "offset 8, not a multiple of 32"),
    "offset beyond the file": (image(tensors=[tensor("a", [4], 0, 2**62)]), "ends at byte"),
    "data beyond the file": (image(tensors=[tensor("a", [64, 2])]), "the file at"),
    "overlap": (image(tensors=[tensor("a", [16]), tensor("b", [4], 0, 32)]), "'a' and 'b' overlap"),
    "unknown type beyond the file": (image(tensors=[tensor("a", [4], 99, 2**40)]), "ends at byte"),
}


def read(path: Path) -> GGUF:
    """Open the file; everything that it promises is there."""
    opened = GGUF.open(path)
    for name, info in opened.tensors.items():
        if info.type.startswith("type "):
            with pytest.raises(UnsupportedModel):
                opened.raw(name)
        else:
            assert opened.raw(name).size == info.nbytes
    return opened


def test_the_good_one_is_good(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(GOOD)
    assert set(read(tmp_path / "m.gguf").tensors) == {"a", "b"}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said(name: str, tmp_path: Path) -> None:
    data, words = BAD[name]
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(SourceError, match=words) as refused:
            GGUF.open(path)
        assert tracemalloc.get_traced_memory()[1] < PEAK_BYTES
    finally:
        tracemalloc.stop()
    assert "m.gguf" in refused.value.message
    assert refused.value.hint


def test_files_that_are_no_files(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.gguf"):
        with pytest.raises(SourceError, match="is not a file"):
            GGUF.open(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    for length in range(len(GOOD)):
        path.write_bytes(GOOD[:length])
        with pytest.raises(SourceError):
            GGUF.open(path)


def test_every_single_byte_may_be_anything(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    refused = 0
    for at in range(len(GOOD) - 72):
        for value in (0x00, 0x7F, 0xFF):
            path.write_bytes(GOOD[:at] + bytes([value]) + GOOD[at + 1 :])
            try:
                read(path)
            except SourceError:
                refused += 1
    assert refused > len(GOOD)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.binary(min_size=1, max_size=8)), min_size=1, max_size=6))
def test_random_damage_never_surprises(tmp_path: Path, damage: list[tuple[int, bytes]]) -> None:
    data = bytearray(GOOD)
    for at, piece in damage:
        data[at : at + len(piece)] = piece
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        read(path)
    except SourceError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < PEAK_BYTES
