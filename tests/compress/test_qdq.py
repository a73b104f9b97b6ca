"""QDQ files of small networks: what is in them, how near they are, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgewise.compress.judge.nets import read_inputs, size
from edgewise.compress.quantize.qdq import quantize_net
from edgewise.engines.onnx_net import OnnxNet
from edgewise.errors import SourceError, UnsupportedModel, UsageError

SIZE, CLASSES = 12, 10


def network(path: Path, rows: int | str = "rows") -> Path:
    """A convolution whose channels differ in size by ten, and two products."""
    random = np.random.default_rng(4)
    w = random.standard_normal((16, 3, 3, 3)) * np.geomspace(0.3, 3, 16)[:, None, None, None]
    tensors = {
        "w": w,
        "b": random.standard_normal(16),
        "m": random.standard_normal((16 * 36, 32)) / 30,
        "n": random.standard_normal((32, CLASSES)),
    }
    nodes = [
        helper.make_node("Conv", ["image", "w", "b"], ["c"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Flatten", ["r"], ["f"]),
        helper.make_node("MatMul", ["f", "m"], ["h"]),
        helper.make_node("Relu", ["h"], ["s"]),
        helper.make_node("MatMul", ["s", "n"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [rows, 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [rows, CLASSES])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in tensors.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)
    return path


def images(count: int = 60) -> dict[str, np.ndarray]:
    return {"image": np.random.default_rng(5).standard_normal((count, 3, SIZE, SIZE)).astype(np.float32)}


@pytest.mark.parametrize("rows", ["rows", 1])
def test_a_network_in_8_and_16_bits(rows: int | str, tmp_path: Path) -> None:
    source, data = network(tmp_path / "net.onnx", rows), images()
    eight = quantize_net(source, tmp_path / "8.onnx", data, activation_bits=8)
    sixteen = quantize_net(source, tmp_path / "16.onnx", data, activation_bits=16)
    assert (eight.calibrated_on, eight.inputs) == (48, 12)
    for found in (eight, sixteen):
        assert found.bytes == found.path.stat().st_size < 0.5 * found.bytes_source
        assert found.top1_agreement > 0.8
        onnx.checker.check_model(onnx.load(found.path))
    assert 0.99 < eight.cosine < sixteen.cosine < 1
    assert sixteen.max_abs > 0 < eight.max_abs
    for bits, found in ((8, eight), (16, sixteen)):
        graph = onnx.load(found.path).graph
        tensors = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
        pairs = [node for node in graph.node if node.op_type == "QuantizeLinear"]
        assert {tensors[node.input[2]].dtype for node in pairs} == {np.dtype(f"uint{bits}")}
        weights = [value for value in tensors.values() if value.dtype == np.int8 and value.ndim == 4]
        assert [value.shape for value in weights] == [(16, 3, 3, 3)]
        assert np.abs(weights[0].reshape(16, -1)).max(axis=1).min() >= 127  # each channel has a scale of its own


async def test_the_file_is_a_network_like_any_other(tmp_path: Path) -> None:
    source, data = network(tmp_path / "net.onnx"), images()
    made = quantize_net(source, tmp_path / "deep" / "8.onnx", data, activation_bits=16)
    nets = [OnnxNet(path) for path in (source, made.path)]
    expected, found = [(await net.predict(data))["logits"] for net in nets]
    assert np.abs(found - expected).mean() < 0.03 * np.abs(expected).mean()
    for net in nets:
        await net.close()


@pytest.mark.parametrize(("rows", "count"), [(4, 15), (8, 20)])
def test_a_fixed_number_of_inputs_is_filled_up(rows: int, count: int, tmp_path: Path) -> None:
    """To whole batches: all inputs calibrate or judge, and those that fill up count for nothing."""
    data = images(count)
    free, fixed = (
        quantize_net(network(tmp_path / f"{n}.onnx", n), tmp_path / f"{n}-8.onnx", data, activation_bits=8)
        for n in ("rows", rows)
    )
    held = count // 5
    assert (fixed.calibrated_on, fixed.inputs) == (free.calibrated_on, free.inputs) == (count - held, held)
    for name in ("max_abs", "cosine", "top1_agreement"):  # the same ranges, so the same network, judged on the same
        assert getattr(fixed, name) == pytest.approx(getattr(free, name), abs=1e-5)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    source = network(tmp_path / "net.onnx")
    before = source.read_bytes()
    with pytest.raises(UsageError, match=r"net\.onnx is there already"):
        quantize_net(source, source, images(), activation_bits=8)
    assert source.read_bytes() == before
    (tmp_path / "linked.onnx").symlink_to(source)
    with pytest.raises(UsageError, match=r"linked\.onnx is there already"):
        quantize_net(source, tmp_path / "linked.onnx", images(), activation_bits=8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["linked.onnx", "net.onnx"]


def test_the_source_is_as_large_as_all_its_files(tmp_path: Path) -> None:
    model = onnx.load(network(tmp_path / "whole.onnx"))
    onnx.save(model, tmp_path / "net.onnx", save_as_external_data=True, location="net.data", size_threshold=1024)
    found = quantize_net(tmp_path / "net.onnx", tmp_path / "8.onnx", images(), activation_bits=8)
    sizes = [(tmp_path / name).stat().st_size for name in ("net.onnx", "net.data")]
    assert found.bytes_source == size(tmp_path / "net.onnx") == sum(sizes)
    assert found.bytes == size(tmp_path / "8.onnx") < sizes[1]


def test_a_network_that_cannot_be_compared_leaves_no_file(tmp_path: Path) -> None:
    model = onnx.load(network(tmp_path / "net.onnx"))
    model.graph.node.append(helper.make_node("ArgMax", ["logits"], ["best"], axis=1))
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("best", TensorProto.INT64, ["rows", 1]))
    onnx.save(model, tmp_path / "best.onnx")
    with pytest.raises(UnsupportedModel, match="no floating output"):
        quantize_net(tmp_path / "best.onnx", tmp_path / "8.onnx", images(), activation_bits=8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.onnx", "net.onnx"]


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    source, out = network(tmp_path / "net.onnx"), tmp_path / "out.onnx"
    refused = [
        (UsageError, "the network takes image", source, {"picture": images()["image"]}),
        (UsageError, "5 at least", source, images(4)),
        (UnsupportedModel, "cannot be quantized", source, {"image": np.zeros((9, 3, 5), np.float32)}),
        (SourceError, "there is no file", tmp_path / "none.onnx", images()),
    ]
    (tmp_path / "bad.onnx").write_bytes(b"no network")
    refused.append((SourceError, "no ONNX file", tmp_path / "bad.onnx", images()))
    for error, said, path, data in refused:
        with pytest.raises(error, match=said):
            quantize_net(path, out, data, activation_bits=8)
        assert not out.exists()


def test_inputs_are_arrays_without_code(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **images(7))
    assert read_inputs(tmp_path / "a.npz")["image"].shape == (7, 3, SIZE, SIZE)
    np.savez(tmp_path / "b.npz", image=np.array([{"a": 1}], dtype=object))
    (tmp_path / "c.npz").write_bytes(b"PK nothing")
    whole = (tmp_path / "a.npz").read_bytes()
    for name, data in {"e": whole[:1000], "f": b"", "g": whole[:1000] + b"?" + whole[1001:]}.items():
        (tmp_path / f"{name}.npz").write_bytes(data)
    np.savez_compressed(tmp_path / "h.npz", **images(7))
    packed = bytearray((tmp_path / "h.npz").read_bytes())
    packed[100:200] = bytes(100)
    (tmp_path / "h.npz").write_bytes(packed)
    for name in "bcdefgh":  # there is no d
        with pytest.raises(SourceError, match="no file of arrays"):
            read_inputs(tmp_path / f"{name}.npz")
    np.save(tmp_path / "alone.npy", images(7)["image"])
    with pytest.raises(SourceError, match="one array, which has no name"):
        read_inputs(tmp_path / "alone.npy")
