"""Packing, unpacking and rounding of weight blocks, and that a table which is the head too stands in a bundle once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from shutil import copytree

import gguf
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import numpy_helper

from edgewise.compress.quantize.mixed import matrix_bytes, names, pages, parts
from edgewise.engines import native_lm
from edgewise.engines.base import Row
from edgewise.engines.native_lm import NativeLM
from edgewise.engines.onnx_lm import OnnxLM
from edgewise.models.bundle import MANIFEST, Bundle
from edgewise.models.source import open_source, pull
from edgewise.models.tensors import HEAD, embedding, matrices
from edgewise.models.weights import BLOCK, Dense, Quantized, pack4, requantize, stack, unpack4
from tiny import VOCAB, save_gguf, tiny

VOCABULARY = "blocks/vocabulary.data"


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


# ---- a table with minima that is the head too ----


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind = gguf.GGMLQuantizationType.Q4_1  # what `int4-minima` makes, too
    model = tiny("llama", hidden_size=128, initializer_range=0.1)
    return save_gguf(model, tmp_path_factory.mktemp("source") / "tied.gguf", kind)


@pytest.fixture(scope="module")
def tied(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return pull(str(source), home=tmp_path_factory.mktemp("home"))


def as_before(bundle: Bundle, directory: Path) -> Bundle:
    """The bundle as it was written when its head had the table under names of its own."""
    copytree(bundle.path, directory)
    head = onnx.load(directory / "blocks" / "head.onnx")
    for tensor in head.graph.initializer:
        if tensor.name == "embed.minima":
            turned = np.ascontiguousarray(numpy_helper.to_array(tensor).T)
            tensor.CopyFrom(numpy_helper.from_array(turned, "embed.minima_t"))
        elif tensor.name.startswith("embed."):
            tensor.name = tensor.name.replace("embed.", "embed.q.")
    for node in head.graph.node:
        new = {"embed.minima": "embed.minima_t", "embed.weight": "embed.q.weight", "embed.scales": "embed.q.scales"}
        node.input[:] = [new.get(name, name) for name in node.input]
        if node.op_type == "Gemm":
            del node.attribute[:]
    onnx.save(head, directory / "blocks" / "head.onnx", save_as_external_data=True, location="head.data")
    manifest = json.loads((directory / MANIFEST).read_text())
    for name in ("blocks/head.onnx", "blocks/head.data"):
        data = (directory / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (directory / MANIFEST).write_text(json.dumps(manifest))
    return Bundle.open(directory)


async def logits(bundle: Bundle, engine: type[NativeLM] | type[OnnxLM], ids: Sequence[int]) -> np.ndarray:
    model = engine(bundle, slots=1)
    await model.open("s", len(ids) + 1)
    prompt = (await model.forward([Row("s", 0, np.array(ids[:-1]), len(ids) - 1)]))[0].copy()
    token = (await model.forward([Row("s", len(ids) - 1, np.array(ids[-1:]), 1)]))[0].copy()
    await model.shutdown()
    return np.concatenate([prompt, token])


def test_a_shared_table_with_minima_is_stored_once(source: Path, tied: Bundle) -> None:
    model = open_source(source)
    sizes = {
        name: matrix_bytes((sum(part.shape[0] for part in found), found[0].shape[1]), "int4-minima")
        for name in names(tied.card)
        for found in [parts(model, name)]
    }
    files = {name: file.bytes for name, file in tied.manifest.files.items()}
    assert pages(files[VOCABULARY]) == sizes["embed"]
    stored = sum(pages(size) for name, size in files.items() if name.endswith(".data"))
    assert stored == sum(sizes.values())
    others = sum(size for name, size in files.items() if not name.endswith(".data"))
    assert tied.bytes <= others + sum(sizes.values())


async def test_a_bundle_of_before_gives_the_same_logits(tied: Bundle, tmp_path: Path) -> None:
    before = as_before(tied, tmp_path / "before")
    assert np.array_equal(matrices(before)[HEAD].dense(), matrices(tied)[HEAD].dense())
    assert np.array_equal(embedding(before).dense(), embedding(tied).dense())
    ids = np.random.default_rng(3).integers(0, VOCAB, 9).tolist()
    for engine in (OnnxLM, NativeLM) if native_lm.probe() else (OnnxLM,):
        found = await logits(tied, engine, ids)
        assert np.ptp(found) > 1
        assert np.array_equal(found, await logits(before, engine, ids))
