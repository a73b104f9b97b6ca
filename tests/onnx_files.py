"""ONNX files with tiny networks: sources that are read without torch, so that a whole export takes few seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIDE, CLASSES, FILTERS = 8, 10, 12
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def images(path: Path, rows: int = 264) -> Path:
    """An .npz of noise with labels."""
    draw = np.random.default_rng(2)
    pixels = draw.random((rows, 3, SIDE, SIDE)).astype(np.float32)
    np.savez(path, image=pixels, labels=draw.integers(0, CLASSES, rows))
    return path


def cnn(path: Path, *, normalised: bool = False, swapped: bool = False) -> Path:
    """A convolution, a pool and a linear layer; before them, its own normalisation, or blue where red should be."""
    draw = np.random.default_rng(3)
    weights = {
        "mean": np.array(MEAN, np.float32)[:, None, None],
        "std": np.array(STD, np.float32)[:, None, None],
        "order": np.array([2, 1, 0]),
        "filters": draw.standard_normal((FILTERS, 3, 3, 3)).astype(np.float32),
        "dense": draw.standard_normal((FILTERS, CLASSES)).astype(np.float32),
    }
    before = {
        (True, False): [
            helper.make_node("Sub", ["image", "mean"], ["middle"]),
            helper.make_node("Div", ["middle", "std"], ["pixels"]),
        ],
        (False, True): [helper.make_node("Gather", ["image", "order"], ["pixels"], axis=1)],
        (False, False): [],
    }[normalised, swapped]
    nodes = [
        *before,
        helper.make_node("Conv", ["pixels" if before else "image", "filters"], ["seen"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["seen"], ["felt"]),
        helper.make_node("GlobalAveragePool", ["felt"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "dense"], ["scores"]),
    ]
    return save(path, nodes, {"image": ["rows", 3, SIDE, SIDE]}, {"scores": ["rows", CLASSES]}, weights)


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: dict[str, list[str | int]],
    outputs: dict[str, list[str | int]],
    weights: dict[str, np.ndarray] | None = None,
    domain: str | None = None,
) -> Path:
    """Arrays of float32 in and out; weights that no node takes are left away."""
    taken = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in (weights or {}).items() if name in taken],
    )
    opsets = [helper.make_opsetid("", 20), *([helper.make_opsetid(domain, 1)] if domain else [])]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path
