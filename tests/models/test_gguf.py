from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from edgewise.errors import SourceError, UnsupportedModel
from edgewise.models.gguf import BLOCK_TYPES, GGUF

FIELDS = {
    "t.u8": ("uint8", 255),
    "t.i8": ("int8", -128),
    "t.u16": ("uint16", 65535),
    "t.i16": ("int16", -32768),
    "t.u32": ("uint32", 2**32 - 1),
    "t.i32": ("int32", -(2**31)),
    "t.f32": ("float32", 0.5),
    "t.f64": ("float64", 1e300),
    "t.u64": ("uint64", 2**64 - 1),
    "t.i64": ("int64", -(2**63)),
    "t.bool": ("bool", True),
    "t.text": ("string", "grüße 🙂"),
}
ARRAYS = {"t.words": ["a", "", "ü"], "t.numbers": [1, -2, 3], "t.floats": [0.25, -4.0]}


def written(path: Path, *, alignment: int | None = None) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    for key, (kind, value) in FIELDS.items():
        getattr(writer, f"add_{kind}")(key, value)
    for key, values in ARRAYS.items():
        writer.add_array(key, values)
    rng = np.random.default_rng(0)
    writer.add_tensor("odd", rng.random((3, 5, 7), dtype=np.float32))
    writer.add_tensor("half", rng.random((2, 9)).astype(np.float16))
    matrix = rng.standard_normal((4, 64), dtype=np.float32)
    for kind in (gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0):
        writer.add_tensor(kind.name, gguf.quantize(matrix, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_read_as_the_reference_does(path: Path) -> None:
    ours, theirs = GGUF.open(path), gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in ours.fields.items()} == fields
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        info = ours.tensors[tensor.name]
        assert info.shape == tuple(int(n) for n in tensor.shape[::-1])
        assert (info.type, info.offset, info.nbytes) == (
            tensor.tensor_type.name,
            tensor.data_offset,
            int(tensor.n_bytes),
        )
        assert ours.raw(tensor.name).tobytes() == tensor.data.tobytes()


@pytest.mark.parametrize("alignment", [None, 64, 256])
def test_every_kind_of_value_and_tensor(alignment: int | None, tmp_path: Path) -> None:
    path = written(tmp_path / "m.gguf", alignment=alignment)
    assert_read_as_the_reference_does(path)
    fields = GGUF.open(path).fields
    for key, (_, value) in FIELDS.items():
        assert fields[key] == value
        assert type(fields[key]) is type(value)
    assert fields["t.words"] == ARRAYS["t.words"]
    numbers = fields["t.numbers"]
    assert isinstance(numbers, np.ndarray)
    assert numbers.dtype == np.int32


def test_smollm2(smollm2_gguf: Path) -> None:
    assert_read_as_the_reference_does(smollm2_gguf)


def test_version_2_is_the_same_layout(tmp_path: Path) -> None:
    path = written(tmp_path / "m.gguf")
    data = bytearray(path.read_bytes())
    before = GGUF.open(path)
    data[4] = 2
    path.write_bytes(data)
    after = GGUF.open(path)
    assert (before.version, after.version) == (3, 2)
    assert after.tensors == before.tensors


def test_raw_bytes_are_a_read_only_view_of_the_map(tmp_path: Path) -> None:
    raw = GGUF.open(written(tmp_path / "m.gguf")).raw("Q4_1")
    assert isinstance(raw, np.memmap)
    assert (raw.dtype, raw.size) == (np.uint8, 4 * 64 // 32 * 20)
    with pytest.raises(ValueError, match="read-only"):
        raw[0] = 1


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"m\.gguf has no tensor 'output\.weight'"):
        GGUF.open(written(tmp_path / "m.gguf")).raw("output.weight")


def test_an_unknown_type_is_kept_by_its_number(tmp_path: Path) -> None:
    path = written(tmp_path / "m.gguf")
    data = path.read_bytes()
    at = data.index(b"half") + 4 + 4 + 2 * 8  # name, dimension count, two dimensions, type
    assert data[at] == 1
    path.write_bytes(data[:at] + b"\x63" + data[at + 1 :])
    opened = GGUF.open(path)
    assert (opened.tensors["half"].type, opened.tensors["half"].nbytes) == ("type 99", 0)
    assert opened.raw("odd").size == 3 * 5 * 7 * 4
    with pytest.raises(UnsupportedModel, match=r"'half'.*type 99.*llamacpp"):
        opened.raw("half")


def test_block_sizes_are_ggmls() -> None:
    ours = {block.name: (block.elements, block.nbytes) for block in BLOCK_TYPES.values()}
    theirs = {kind.name: size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    theirs["Q8_1"] = (32, 36)  # the package still has ggml's first layout, with two floats instead of two halves
    assert ours == theirs
    assert {number: block.name for number, block in BLOCK_TYPES.items()} == {
        kind.value: kind.name for kind in gguf.GGML_QUANT_SIZES
    }
