"""Channels made alike (smooth.py) in an ONNX graph."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgewise.export.targets.onnx.graph import as_numpy, attribute
from edgewise.export.targets.onnx.observe import watch
from edgewise.export.targets.onnx.products import is_product
from edgewise.export.targets.onnx.rewrite import inferred, ordered, without_unused
from edgewise.export.targets.smooth import Channels
from edgewise.export.work.job import Array


def smoothed(model: onnx.ModelProto, rows: Mapping[str, Array], work: Path, threads: int) -> onnx.ModelProto:
    """A copy with a Mul before the products that gain by it."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    stored = {one.name: one for one in copy.graph.initializer}
    products: dict[str, list[onnx.NodeProto]] = {}
    for node in copy.graph.node:
        if is_product(node, stored) and stored[node.input[1]].data_type == onnx.TensorProto.FLOAT:
            products.setdefault(node.input[0], []).append(node)
    if not products:
        return copy
    count = len(next(iter(rows.values())))
    channels = {name: Channels(count) for name in products}
    watch(model, channels, rows, work, threads, lambda name, value: channels[name].add(value))
    for name, some in products.items():
        matrices = [_turned(node, as_numpy(stored[node.input[1]])) for node in some]
        by = channels[name].factors(matrices)
        if by is not None:
            _multiply(copy, name, by, dict(zip((node.name for node in some), matrices, strict=True)), some)
    return inferred(ordered(without_unused(copy)))


def _multiply(
    model: onnx.ModelProto, name: str, by: Array, matrices: Mapping[str, Array], products: list[onnx.NodeProto]
) -> None:
    made = f"{name}_smoothed"
    model.graph.initializer.append(numpy_helper.from_array(by, f"{made}_by"))
    model.graph.node.append(helper.make_node("Mul", [name, f"{made}_by"], [made], f"{made}_mul"))
    for node in products:
        value = np.ascontiguousarray(_turned(node, matrices[node.name] / by[:, None]))
        model.graph.initializer.append(
            numpy_helper.from_array(value, f"{node.name}_matrix")
        )  # others may share the old
        node.input[0], node.input[1] = made, f"{node.name}_matrix"


def _turned(node: onnx.NodeProto, matrix: Array) -> Array:
    """From as it is stored to [channels of the input, outputs], and back."""
    return matrix.T if attribute(node, "transB", 0) else matrix
