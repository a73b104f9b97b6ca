"""Channels made alike (smooth.py) in an ONNX graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgewise.export.targets.onnx.graph import as_numpy, attribute
from edgewise.export.targets.onnx.observe import watch
from edgewise.export.targets.onnx.products import is_product
from edgewise.export.targets.onnx.rewrite import inferred, ordered, without_unused
from edgewise.export.targets.smooth import Channels, together
from edgewise.export.work.job import Array

Matrix = tuple[str, bool]  # its name, and whether a product takes its rows as outputs (transB)


def smoothed(model: onnx.ModelProto, rows: Mapping[str, Array], work: Path, threads: int) -> onnx.ModelProto:
    """A copy with a Mul before the products that gain by it."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    stored = {one.name: one for one in copy.graph.initializer}
    floats = {name for name, one in stored.items() if one.data_type == onnx.TensorProto.FLOAT}
    products = [node for node in copy.graph.node if is_product(node, stored) and node.input[1] in floats]
    if not products:
        return copy
    groups = together(products, lambda node: (node.input[0], _matrix(node)))
    channels: dict[str, Channels] = {}
    for some in groups:
        inputs = {node.input[0] for node in some}
        channels |= dict.fromkeys(inputs, Channels(len(inputs) * len(next(iter(rows.values())))))
    watch(model, channels, rows, work, threads, lambda name, value: channels[name].add(value))
    for some in groups:
        matrices = {_matrix(node): _turned(as_numpy(stored[node.input[1]]), _matrix(node)[1]) for node in some}
        by = channels[some[0].input[0]].factors(list(matrices.values()))
        if by is not None:
            _multiply(copy, by, some, matrices)
    return inferred(ordered(without_unused(copy)))


def _matrix(node: onnx.NodeProto) -> Matrix:
    return node.input[1], bool(attribute(node, "transB", 0))


def _multiply(
    model: onnx.ModelProto, by: Array, products: Sequence[onnx.NodeProto], matrices: Mapping[Matrix, Array]
) -> None:
    graph, factors = model.graph, f"{products[0].input[0]}_factors"
    graph.initializer.append(numpy_helper.from_array(by, factors))
    for given in dict.fromkeys(node.input[0] for node in products):
        made = f"{given}_smoothed"
        graph.node.append(helper.make_node("Mul", [given, factors], [made], f"{made}_mul"))
    for (name, turned), value in matrices.items():  # under new names: others may take the old ones
        divided = np.ascontiguousarray(_turned(value / by[:, None], turned))
        graph.initializer.append(numpy_helper.from_array(divided, _divided(name, turned)))
    for node in products:
        node.input[:2] = [f"{node.input[0]}_smoothed", _divided(*_matrix(node))]


def _divided(name: str, turned: bool) -> str:
    return f"{name}_divided_by_columns" if turned else f"{name}_divided"


def _turned(matrix: Array, turned: bool) -> Array:
    """From as it is stored to [channels of the input, outputs], and back."""
    return matrix.T if turned else matrix
