"""Coded tensors: what comes out of a container, and what does not get in."""

from __future__ import annotations

import struct
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from edgewise.errors import BadFrame, CodecOverflow, UsageError
from edgewise.wire.feature import CODECS, DTYPES, HEADER_BYTES, decode, encode, read

RANDOM = np.random.default_rng(0)
LOSSY = tuple(codec for codec in CODECS if codec.startswith("int"))
LARGEST = float(np.finfo(np.float32).max)


def sealed(payload: bytes) -> bytes:
    """With a checksum that fits."""
    return payload[:12] + struct.pack("<I", zlib.crc32(payload[16:])) + payload[16:]


def images(channels: int = 16, side: int = 14) -> np.ndarray:
    """float32 [1, channels, side, side], each channel with a mean of its own; always the same."""
    random = np.random.default_rng(1)
    means = random.normal(scale=3, size=(channels, 1, 1))
    return (random.normal(size=(1, channels, side, side)) + means).astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 0, 5), (2, 3, 4, 5), (1,) * 16], ids=str)
def test_exact_is_exact(dtype: np.dtype, shape: tuple[int, ...]) -> None:
    tensor = (RANDOM.normal(size=shape) * 100).astype(dtype)
    found = decode(encode({"x": tensor}, "exact"))["x"]
    assert found.dtype == dtype
    assert found.shape == shape
    assert np.array_equal(found, tensor)


def test_exact_carries_what_no_number_is() -> None:
    tensor = np.array([np.nan, np.inf, -np.inf, -0.0, 1e-45], np.float32)
    assert decode(encode({"x": tensor}, "exact"))["x"].tobytes() == tensor.tobytes()


@pytest.mark.parametrize("codec", CODECS)
def test_integers_are_exact_under_each_codec(codec: str) -> None:
    tensor = np.array([[1 << 62, -5], [0, 7]])
    assert np.array_equal(decode(encode({"shape": tensor, "on": tensor > 0}, codec))["shape"], tensor)


def test_halves_are_rounded_once() -> None:
    tensor = np.array([0.1, 1000.3, -65504.0], np.float32)
    found = decode(encode({"x": tensor}, "fp16"))["x"]
    assert found.dtype == np.float32
    assert found.tolist() == tensor.astype(np.float16).astype(np.float32).tolist()


def test_halves_refuse_what_they_cannot_hold() -> None:
    with pytest.raises(CodecOverflow, match=r"holds 70000, fp16 holds up to 65504 \(take int8 or exact\)"):
        encode({"x": np.array([70000.0], np.float32)}, "fp16")


@pytest.mark.parametrize("codec", [codec for codec in CODECS if codec != "exact"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_lossy_codecs_carry_finite_numbers_alone(codec: str, bad: float) -> None:
    with pytest.raises(CodecOverflow, match="the layers before it are broken"):
        encode({"x": np.array([1.0, bad], np.float32)}, codec)


@pytest.mark.parametrize(("codec", "share"), [("int8", 0.0055), ("int6", 0.022), ("int4", 0.085), ("int2", 0.34)])
def test_the_error_is_that_of_a_step(codec: str, share: float) -> None:
    """A uniform error of one step: its deviation is step / sqrt(12), and the step a share of the spread."""
    tensor = images()
    off = decode(encode({"x": tensor}, codec))["x"] - tensor
    spread = (tensor - tensor.mean((0, 2, 3), keepdims=True)).std()
    assert off.std() == pytest.approx(share * spread, rel=0.1)
    assert np.abs(off).max() < 2 * share * spread


@pytest.mark.parametrize("codec", LOSSY)
def test_bits_are_kept_by_normal_numbers(codec: str) -> None:
    tensor = RANDOM.normal(size=(1, 64, 28, 28)).astype(np.float32)
    bits = 8 * len(encode({"x": tensor}, codec)) / tensor.size
    assert int(codec[3:]) - 0.4 < bits < int(codec[3:]) + 0.45


def test_sparse_and_smooth_numbers_take_less() -> None:
    sparse = np.maximum(RANDOM.normal(size=(1, 64, 28, 28)) - 1.5, 0).astype(np.float32)
    smooth = np.cumsum(RANDOM.normal(size=(1, 64, 28, 28)), axis=3).astype(np.float32)
    assert len(encode({"x": sparse}, "int4")) < sparse.nbytes / 20
    assert len(encode({"x": smooth}, "int6")) < smooth.nbytes / 7


def test_one_huge_number_does_not_blur_the_others() -> None:
    tensor = RANDOM.normal(size=(1, 50, 64)).astype(np.float32)
    tensor[0, 0, 3] = 1e5
    found = decode(encode({"x": tensor}, "int4"))["x"]
    assert np.abs(found - tensor).max() < 0.2
    assert len(encode({"x": tensor}, "int4")) < tensor.nbytes / 6


def test_a_channel_of_its_own_size_is_an_offset() -> None:
    tensor = RANDOM.normal(size=(1, 50, 64)).astype(np.float32)
    tensor[..., 5] += 3000
    plain = RANDOM.normal(size=(1, 50, 64)).astype(np.float32)
    assert len(encode({"x": tensor}, "int4")) < len(encode({"x": plain}, "int4")) + 100


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize(
    "tensor",
    [
        np.zeros((1, 3, 8, 8)),
        np.full((1, 3, 8, 8), 0.1),
        np.array([LARGEST, -LARGEST, 0]),
        np.full((2, 3, 8), LARGEST),
        np.array([1e-45, 0]),
        np.array(5.0),
        np.zeros((4, 0, 3)),
    ],
    ids=["zeros", "constant", "largest", "all largest", "subnormal", "scalar", "empty"],
)
def test_odd_tensors(codec: str, tensor: np.ndarray) -> None:
    found = decode(encode({"x": tensor.astype(np.float32)}, codec))["x"]
    assert found.shape == tensor.shape
    spread = float(tensor.astype(np.float64).std()) if tensor.size else 0.0
    assert np.abs(found.astype(np.float64) - tensor).max(initial=0) <= 0.6 * spread + 1e-6 * np.abs(tensor).max(
        initial=1
    )


@given(
    arrays.arrays(
        np.float32,
        arrays.array_shapes(min_dims=0, max_dims=4, max_side=9),
        elements=st.floats(-(2.0**100), 2.0**100, width=32),
    ),
    st.sampled_from(LOSSY),
)
def test_coding_again_changes_little(tensor: np.ndarray, codec: str) -> None:
    """Finite numbers of the same shape come out, and none is off by more than a step of the spread."""
    found = decode(encode({"x": tensor}, codec))["x"]
    assert found.shape == tensor.shape
    assert np.isfinite(found).all()
    spread, most = float(tensor.astype(np.float64).std()), float(np.abs(tensor).max(initial=0))
    assert np.abs(found.astype(np.float64) - tensor).max() <= 0.6 * spread + 1e-6 * most + 1e-37


def test_names_dtypes_and_the_label_travel() -> None:
    tensors = {"a/b:0": images(), "größe": np.array([3, 4]), "h": images().astype(np.float16), "": np.zeros(3)}
    container = read(encode(tensors, "int8", label="model at cut 3"))
    assert container.label == "model at cut 3"
    assert {name: (t.dtype, t.shape) for name, t in container.tensors.items()} == {
        name: (t.dtype, t.shape) for name, t in tensors.items()
    }
    assert sum(one.coded_bytes for one in container.coded) + HEADER_BYTES + 14 == len(
        encode(tensors, "int8", label="model at cut 3")
    )


def golden_tensors() -> dict[str, np.ndarray]:
    x = np.arange(-24, 24).reshape(1, 2, 4, 6) ** 3 / 1024
    return {"x": x.astype(np.float32), "n": np.array([258, -1], np.int16)}


# Bytes that decode otherwise make another format: then the number in the header must rise. How the encoder chooses
# steps, and zlib its codes, may change: other bytes for the same tensors are no break.
GOLDEN = {
    "exact": (
        "455746540100020005000000c629857d6e6574403301000a00010479000000010000000200000004000000060000007895c1"
        "a10d83401406e0dfe218008dc1231a38de6d40504fde1ca85fb2020b60b004d1006d97203706fa544b82a8e5fb7057e226a8"
        "743858c34140fc23040e350f74a2985ca2268dc33ef76cb2c80f6d8e51033d08c233e888bc1d7c9435ece73dc4a9f9fcbc2f"
        "afd3b6adebb23cf1288ab234a63ac9c55afb0501000300000104000000020000006e0201ffff",
        56639715,
    ),
    "fp16": (
        "455746540100020005000000aca4c4916e6574403301000a010004600000000100000002000000040000000600000078c0ca"
        "f1c933c986c8d0c7b3c6b2c5ccc400c498c25cc14ac0c0be33bdd0bbb2b900b85cb5c0b2d0af00acc0a600a0009400000014"
        "0020c026002cd02fc0325c350038b239d03b333dc03e4a405c4198420044cc44b245b346d04786483349f149010003000001"
        "04000000020000006e0201ffff",
        2848930705,
    ),
    "int8": (
        "455746540100020005000000e43944b96e6574403301000a0201043a0000000100000002000000040000000600000001dc8c"
        "3d0101020078cb8c92d5d3d15052b29692101112b0e0e1e260634961626262608864606060620a666161e3e052e711101291"
        "f0915152d2d061606064200d000001000300000104000000020000006e0201ffff",
        2873346605,
    ),
    "int4": (
        "4557465401000200050000005ab27db36e6574403301000a020104200000000100000002000000040000000600000001dc8c"
        "3f010101007815c1c101002008c4b05a0ffeecbfac92548f51af280ad2ac6215080794f8e501010003000001040000000200"
        "00006e0201ffff",
        172916860,
    ),
}


@pytest.mark.parametrize("codec", GOLDEN)
def test_old_bytes_decode_to_the_same_bits_for_good(codec: str) -> None:
    payload, checksum = GOLDEN[codec]
    container = read(bytes.fromhex(payload))
    assert container.label == "net@3"
    assert container.tensors["n"].tolist() == [258, -1]
    assert zlib.crc32(container.tensors["x"].tobytes()) == checksum
    off = np.abs(container.tensors["x"] - golden_tensors()["x"]).max()
    assert off <= {"exact": 0, "fp16": 0.004, "int8": 0.05, "int4": 0.6}[codec]


def test_unknown_codecs_and_what_does_not_fit() -> None:
    with pytest.raises(UsageError, match="there is no codec 'int9'; allowed are exact, fp16, int8"):
        encode({"x": images()}, "int9")
    with pytest.raises(UsageError, match="is complex128 with 1 axes"):
        encode({"x": np.zeros(1, complex)})
    with pytest.raises(UsageError, match="300 tensors"):
        encode({str(i): np.zeros(1) for i in range(300)})
    with pytest.raises(UsageError, match="names of 1024 bytes"):
        encode({"x" * 2000: np.zeros(1)})


# What is refused


@pytest.mark.parametrize("codec", CODECS)
def test_every_cut_short_and_every_flipped_byte_is_refused(codec: str) -> None:
    good = encode({"x": images(2, 4), "y": np.arange(5)}, codec, label="l")
    for end in range(len(good)):
        with pytest.raises(BadFrame):
            decode(good[:end])
    with pytest.raises(BadFrame):
        decode(good + b"\0")
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= 0x55
        with pytest.raises(BadFrame):
            decode(bytes(bad))


@settings(max_examples=400)
@given(st.data())
def test_sealed_nonsense_is_an_array_or_a_bad_frame(data: st.DataObject) -> None:
    """The checksum keeps out accidents, not enemies."""
    codec = data.draw(st.sampled_from(CODECS))
    bad = bytearray(encode({"x": images(2, 4), "y": np.arange(5)}, codec, label="l"))
    for _ in range(data.draw(st.integers(1, 8))):
        bad[data.draw(st.integers(6, len(bad) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = decode(sealed(bytes(bad)), limit_bytes=1 << 16)
    except BadFrame:
        return
    assert all(isinstance(tensor, np.ndarray) for tensor in found.values())


@given(st.binary(max_size=200))
def test_random_bytes_are_a_bad_frame(noise: bytes) -> None:
    for payload in (noise, sealed(b"EWFT\x01\0\x01\0\0\0\0\0\0\0\0\0" + noise)):
        with pytest.raises(BadFrame):
            decode(payload)


def record(
    dtype: int = 10,
    codec: int = 0,
    packing: int = 0,
    axes: tuple[int, ...] = (2,),
    tail: bytes = b"",
    payload: bytes = bytes(8),
) -> bytes:
    """A container of one tensor without a name, with fields as given."""
    head = struct.pack("<HBBBBI", 0, dtype, codec, packing, len(axes), len(payload))
    body = head + struct.pack(f"<{len(axes)}I", *axes) + tail + payload
    return sealed(b"EWFT\x01\0\x01\0\0\0\0\0\0\0\0\0" + body)


def tail(step: float = 1.0, axis: int = 255, prediction: int = 0, planes: int = 1, zero: int = 0) -> bytes:
    return struct.pack("<fBBBB", step, axis, prediction, planes, zero)


@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": 12},
        {"codec": 3},
        {"packing": 2},
        {"axes": (1,) * 17},
        {"dtype": 7, "codec": 1},
        {"axes": (3,)},
        {"packing": 1},
        {"packing": 1, "payload": zlib.compress(bytes(8))[2:-4] + b"\0"},
        {"packing": 1, "payload": zlib.compress(bytes(9))[2:-4]},
        {"codec": 1, "payload": struct.pack("<2e", 1, np.inf)},
        *({"codec": 2, "tail": one, "payload": bytes(2)} for one in (
            tail(0), tail(-1), tail(np.nan), tail(np.inf), tail(axis=1), tail(prediction=4), tail(prediction=2),
            tail(planes=0), tail(planes=6), tail(zero=1), tail(axis=0), tail(planes=2),
        )),
    ],
    ids=str,
)  # fmt: skip
def test_bad_fields_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(BadFrame):
        decode(record(**fields))


def test_good_fields_are_not() -> None:
    assert decode(record())[""].tolist() == [0, 0]
    assert decode(record(packing=1, payload=zlib.compress(bytes(8))[2:-4]))[""].tolist() == [0, 0]
    assert decode(record(codec=2, tail=tail(0.5), payload=b"\x01\x04"))[""].tolist() == [-0.5, 1.0]
    assert decode(record(codec=2, tail=tail(0.5, prediction=1), payload=b"\x01\x04"))[""].tolist() == [-0.5, 0.5]
    assert decode(record(codec=2, tail=tail(axis=0), payload=b"\x02\x04\x00\x02"))[""].tolist() == [1, 3]
    assert decode(record(dtype=0, axes=(3,), payload=b"\x00\x02\xff"))[""].tolist() == [False, True, True]


@pytest.mark.parametrize(
    "axes", [(1 << 31,), (1 << 16, 1 << 16), (0xFFFFFFFF,) * 16, (0, 0xFFFFFFFF, 0xFFFFFFFF)], ids=str
)
def test_nothing_is_allocated_that_is_not_allowed(axes: tuple[int, ...]) -> None:
    bomb = zlib.compress(bytes(1 << 24), 9)[2:-4]
    tracemalloc.start()
    for codec, last in ((0, b""), (1, b""), (2, tail())):
        with pytest.raises(BadFrame, match="take more than 1048576 bytes"):
            decode(record(codec=codec, packing=1, axes=axes, tail=last, payload=bomb), limit_bytes=1 << 20)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_payload_unpacks_to_its_size_and_no_further() -> None:
    bomb = zlib.compress(bytes(1 << 26), 9)[2:-4]
    payload = record(packing=1, payload=bomb)
    tracemalloc.start()
    with pytest.raises(BadFrame, match="does not unpack to 8 bytes"):
        decode(payload)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_two_tensors_of_one_name_are_refused() -> None:
    one = record()[16:]
    with pytest.raises(BadFrame, match="the same name"):
        decode(sealed(b"EWFT\x01\0\x02\0\0\0\0\0\0\0\0\0" + one + one))


def test_another_format_is_named() -> None:
    with pytest.raises(BadFrame, match="have format 2, this version reads 1"):
        decode(b"EWFT\x02" + encode({})[5:])
