"""Small networks to split."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def images(count: int = 1, seed: int = 1) -> np.ndarray:
    """float32 [count, 3, 16, 16]."""
    return np.random.default_rng(seed).normal(size=(count, 3, 16, 16)).astype(np.float32)


def residual(path: Path, *, seed: int = 0, early: bool = False, scale: float = 1.0) -> Path:
    """`image` [batch, 3, 16, 16] to `logits` [batch, 5]: four convolutions, two with a skip around them, and pooling.
    `early`: the mean is an output too. `scale`: what the first convolution's weights are multiplied by."""
    random = np.random.default_rng(seed)

    def weights(*shape: int) -> np.ndarray:
        return (random.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)

    stored = {"k0": weights(8, 3, 3, 3) * np.float32(scale), "head": weights(16, 5), "bias": weights(5)}
    stored |= {"k1": weights(8, 8, 3, 3), "k2": weights(16, 8, 3, 3), "k3": weights(16, 16, 3, 3)}
    around = {"pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["image", "k0"], ["c0"], **around),
        helper.make_node("Relu", ["c0"], ["r0"]),
        helper.make_node("Conv", ["r0", "k1"], ["c1"], **around),
        helper.make_node("Add", ["c1", "r0"], ["s1"]),
        helper.make_node("MaxPool", ["s1"], ["p1"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["p1", "k2"], ["c2"], **around),
        helper.make_node("Relu", ["c2"], ["r2"]),
        helper.make_node("Conv", ["r2", "k3"], ["c3"], **around),
        helper.make_node("Add", ["c3", "r2"], ["s3"]),
        helper.make_node("GlobalAveragePool", ["s3"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("MatMul", ["flat", "head"], ["line"]),
        helper.make_node("Add", ["line", "bias"], ["logits"]),
    ]
    value = helper.make_tensor_value_info
    outputs = [value("logits", TensorProto.FLOAT, ["batch", 5])]
    outputs += [value("flat", TensorProto.FLOAT, ["batch", 16])] if early else []
    inputs = [value("image", TensorProto.FLOAT, ["batch", 3, 16, 16])]
    graph = helper.make_graph(nodes, "net", inputs, outputs, [numpy_helper.from_array(v, k) for k, v in stored.items()])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path
