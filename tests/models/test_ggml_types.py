"""Every weight type against the gguf package's own dequantization, on random blocks: all bytes are valid but for the
float16 fields, which are drawn as numbers of every size."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto
from onnxruntime import InferenceSession, SessionOptions

from edgewise.engines.onnx_process import shared_options
from edgewise.errors import SourceError
from edgewise.models import ggml_types
from edgewise.models.blocks import DataFile, _Graph
from edgewise.models.ggml_types import DENSE, FORMATS, KNOWN, unpack
from edgewise.models.gguf import BLOCK_TYPES, TensorInfo
from edgewise.models.weights import BLOCK, Dense, Matrix, Quantized, requantize
from ggml_blocks import quantize, random_blocks

HALF = np.finfo(np.float16)
EXTREMES = [0.0, -0.0, float(HALF.max), float(HALF.min), float(HALF.tiny), float(HALF.smallest_subnormal)]
SIZES = {t.name: t for t in BLOCK_TYPES.values()}


def info(kind: str, outputs: int, inputs: int) -> TensorInfo:
    return TensorInfo("w", (outputs, inputs), kind, 0, outputs * inputs // SIZES[kind].elements * SIZES[kind].nbytes)


def reference(kind: str, raw: np.ndarray, outputs: int) -> np.ndarray:
    rows = np.array(raw).reshape(outputs, -1)
    return gguf.dequantize(rows, gguf.GGMLQuantizationType[kind]).reshape(outputs, -1)


def bound(matrix: Quantized) -> np.ndarray | float:
    """With a minimum, two roundings of what the block holds at most; without one, none."""
    if matrix.minima is None:
        return 0.0
    largest = np.abs(matrix.minima) + np.float32(1 << (matrix.bits - 1)) * np.abs(matrix.scales)
    return np.repeat(largest, matrix.block, axis=1) * np.float32(2**-23)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), scale=st.none() | st.sampled_from(EXTREMES))
@pytest.mark.parametrize("kind", FORMATS)
def test_every_value_is_ggmls(kind: str, seed: int, scale: float | None) -> None:
    blocks = random_blocks(kind, 12, np.random.default_rng(seed))
    for name in () if scale is None else {"d", "m", "dmin"} & set(blocks.dtype.names):
        if blocks.dtype[name] == np.float16:
            blocks[name] = scale
    raw, inputs = blocks.view(np.uint8), 4 * SIZES[kind].elements
    matrix = unpack(info(kind, 3, inputs), raw)
    assert isinstance(matrix, Quantized)
    assert matrix.shape == (3, inputs)
    assert (np.abs(matrix.dense() - reference(kind, raw, 3)) <= bound(matrix)).all()


def test_large_matrices_are_unpacked_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = random_blocks("Q4_K", 7 * 2, np.random.default_rng(0)).view(np.uint8)
    whole = unpack(info("Q4_K", 7, 512), raw)
    monkeypatch.setattr(ggml_types, "CHUNK", 1024)
    pieces = unpack(info("Q4_K", 7, 512), raw)
    assert np.array_equal(pieces.dense(), whole.dense())


@pytest.mark.parametrize("kind", DENSE)
def test_dense_types_are_views(kind: str) -> None:
    raw = np.random.default_rng(0).integers(0, 60, 2 * 8 * SIZES[kind].nbytes, dtype=np.uint8)
    matrix = unpack(info(kind, 2, 8), raw)
    assert isinstance(matrix, Dense)
    assert np.array_equal(matrix.dense(), reference(kind, raw, 2))
    assert np.shares_memory(matrix.values, raw)


def test_layouts_have_ggmls_sizes() -> None:
    assert {kind: np.dtype(f.fields).itemsize for kind, f in FORMATS.items()} == {k: SIZES[k].nbytes for k in FORMATS}
    assert set(KNOWN) <= set(SIZES)


@pytest.mark.parametrize(
    ("kind", "field", "value"), [("Q4_K", "d", np.inf), ("Q4_1", "m", np.nan), ("MXFP4", "e", 255)]
)
def test_scales_that_are_no_numbers_are_refused(kind: str, field: str, value: float) -> None:
    blocks = random_blocks(kind, 4, np.random.default_rng(0))
    blocks[field][3] = value
    with pytest.raises(SourceError, match=r"'w' has a scale or minimum .* below 1e\+36.*another conversion"):
        unpack(info(kind, 4, SIZES[kind].elements), blocks.view(np.uint8))


def linear(matrix: Matrix, x: np.ndarray, directory: Path, *, int8_activations: bool) -> np.ndarray:
    """x @ matrix^T as a bundle's graph computes it."""
    with DataFile(directory / "g.data") as data:
        graph = _Graph("g", data, int8_activations=int8_activations)
        graph.input("x", TensorProto.FLOAT, ["rows", matrix.shape[1]])
        graph.output("y", TensorProto.FLOAT, ["rows", matrix.shape[0]])
        graph.node("Identity", [graph.linear("x", matrix, None, "product")], "y")
        graph.save(directory / "g.onnx")
    shared_options()  # its pool is the process's: sessions of other tests have it too
    options = SessionOptions()
    options.use_per_session_threads = False
    session = InferenceSession(directory / "g.onnx", options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def rounded(x: np.ndarray, block: int) -> np.ndarray:
    """float64: x as the int8 kernels see it, one scale per block."""
    blocks = x.astype(np.float64).reshape(len(x), -1, block)
    step = np.abs(blocks).max(axis=-1, keepdims=True) / 127
    return (np.rint(blocks / step) * step).reshape(x.shape)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("rows", [1, 2, 17])
def test_the_runtime_computes_with_every_type(kind: str, rows: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    packed = quantize(rng.standard_normal((48, 512)).astype(np.float32), gguf.GGMLQuantizationType[kind])
    matrix = unpack(info(kind, 48, 512), packed.reshape(-1))
    assert isinstance(matrix, Quantized)
    x = rng.standard_normal((rows, 512)).astype(np.float32)
    exact = x.astype(np.float64) @ matrix.dense().T
    scale = exact.std()
    assert np.abs(linear(matrix, x, tmp_path, int8_activations=False) - exact).max() <= 1e-5 * scale
    centred = matrix.of(matrix.arrays[:2])
    minima = exact - x @ centred.dense().T.astype(np.float64)  # these are computed from x as it is
    seen = rounded(x, matrix.block) @ centred.dense().T + minima
    # A number next to the middle of two codes may fall to either side: one step of one weight in some sums.
    assert np.abs(linear(matrix, x, tmp_path, int8_activations=True) - seen).max() <= 5e-3 * scale
    assert np.median(np.abs(linear(matrix, x, tmp_path, int8_activations=True) - seen)) <= 1e-4 * scale


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("bits", [4, 8])
def test_requantizing_takes_every_type(kind: str, bits: int) -> None:
    values = np.random.default_rng(0).standard_normal((4, 512)).astype(np.float32)
    matrix = unpack(info(kind, 4, 512), quantize(values, gguf.GGMLQuantizationType[kind]).reshape(-1))
    coarse = requantize(matrix, bits)
    assert coarse.kind == (bits, BLOCK, False)
    error = np.abs(coarse.dense() - matrix.dense()).reshape(4, -1, BLOCK).max(axis=-1)
    assert (error <= np.abs(coarse.scales) * 1.0001).all()
