"""int8 for ONNX graphs, as QuantizeLinear and DequantizeLinear pairs (Q/DQ) whose ranges come from calibration rows."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnxruntime.quantization import CalibrationMethod
from onnxruntime.quantization.calibrate import TensorData, TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from edgewise.export.targets.onnx.graph import as_numpy, attribute
from edgewise.export.targets.onnx.products import is_product
from edgewise.export.targets.onnx.rewrite import inferred, ordered, taken
from edgewise.export.targets.ranges import Range, Seen, fitted
from edgewise.export.work.job import Array

OFF_CENTRE: Final = 0.05  # of a range's width its middle may be away from zero


# Ranges


def ranges(seen: Mapping[str, Seen], bits: int, *, symmetric: bool, whole: bool) -> dict[str, Range]:
    """Of all tensors."""
    return {name: fitted(one, bits, symmetric=symmetric, whole=whole) for name, one in seen.items()}


# Graphs


def paired(
    model: onnx.ModelProto,
    ranges: Mapping[str, Range],
    *,
    activations: Any,
    weights: Any,
    ops: Sequence[str],
    leave: Sequence[str] = (),
    apart: bool = False,
    reduce_range: bool = False,
    extra: Mapping[str, Any],
) -> onnx.ModelProto:
    """With Q/DQ pairs around the operators `ops`, but for the nodes in `leave`. `activations` and `weights` are
    onnxruntime's QuantType, `extra` the options of its quantizer. Weights have a scale for each channel. The quantizer
    gives a rounded tensor to all that take it: `apart` leaves it as it was for those that are not rounded, as what is
    added to it again behind a layer."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    if apart:
        ranges = {
            **ranges,
            **_set_apart(copy, ranges, {n.name for n in copy.graph.node if n.op_type in ops} - {*leave}),
        }
    found = {name: TensorData(lowest=np.float32(low), highest=np.float32(high)) for name, (low, high) in ranges.items()}
    quantizer = QDQQuantizer(
        copy,
        True,
        reduce_range,
        weights,
        activations,
        TensorsData(CalibrationMethod.MinMax, found),
        [],
        list(leave),
        list(ops),
        dict(extra),
    )
    with quiet():
        quantizer.quantize_model()
    return ordered(quantizer.model.model)


@contextmanager
def quiet() -> Iterator[None]:
    """onnxruntime's quantizers warn at the root, of what is meant to be so."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(before)


def _set_apart(model: onnx.ModelProto, ranges: Mapping[str, Range], rounded: Collection[str]) -> dict[str, Range]:
    """A name of its own for each tensor that those nodes take and others as well; with its range."""
    others = {name for node in model.graph.node if node.name not in rounded for name in node.input}
    others |= {one.name for one in model.graph.output}
    made: dict[str, Range] = {}
    for node in list(model.graph.node):
        for place, name in enumerate(node.input):
            if node.name not in rounded or name not in others or name not in ranges:
                continue
            own = f"{name}_to_round"
            if own not in made:
                made[own] = ranges[name]
                model.graph.node.append(helper.make_node("Identity", [name], [own], own))
            node.input[place] = own
    return made


def centred(
    model: onnx.ModelProto, seen: Mapping[str, Seen], leave: Collection[str] = ()
) -> tuple[onnx.ModelProto, dict[str, Range]]:
    """For formats without a zero point: what goes into products with stored matrices, but for the nodes in `leave`, is
    moved so that zero is in the middle of its range, and what that takes from the product is added again. Else half of
    the numbers would be for the side of zero where little is, as after a GELU. With the new ranges of those inputs."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    stored = {one.name: one for one in copy.graph.initializer}
    moved: dict[str, Range] = {}
    for node in list(copy.graph.node):
        one = seen.get(node.input[0]) if node.name not in leave and is_product(node, stored) else None
        if one is None or abs(one.least + one.most) / 2 <= OFF_CENTRE * (one.most - one.least):
            continue
        name = f"{node.input[0]}_centred"
        middle = np.float32((one.least + one.most) / 2)
        if name not in moved:
            moved[name] = ((one.least - one.most) / 2, (one.most - one.least) / 2)
            _store(copy, f"{name}_by", middle)
            copy.graph.node.append(helper.make_node("Sub", [node.input[0], f"{name}_by"], [name], f"{name}_sub"))
        axis = 1 if attribute(node, "transB", 0) else 0
        lost = middle * _as_int8(as_numpy(stored[node.input[1]]), axis).sum(axis=axis, dtype=np.float64)
        made = f"{node.output[0]}_uncentred"
        _store(copy, f"{made}_by", lost.astype(np.float32))
        copy.graph.node.append(helper.make_node("Add", [made, f"{made}_by"], [node.output[0]], f"{made}_add"))
        node.input[0] = name
        node.output[0] = made
    return inferred(ordered(copy)), moved


def _as_int8(matrix: Array, axis: int) -> Array:
    """Rounded as it will be, with a scale for each output: what the rounding takes away must not be added again."""
    step = np.abs(matrix).max(axis=axis, keepdims=True) / np.float32(127)
    return np.asarray(np.rint(matrix / np.where(step > 0, step, 1)) * step)


def with_small_tables(model: onnx.ModelProto) -> onnx.ModelProto:
    """Tables of embeddings in int8 with a scale for each row, which is read beside it: half of what a small encoder
    weighs. A pair around Gather would have onnxruntime make the whole table float32 again as it loads."""
    stored = {one.name: one for one in model.graph.initializer}
    used = Counter(name for node in model.graph.node for name in taken(node))
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        table = stored.get(node.input[0]) if node.op_type == "Gather" and not attribute(node, "axis", 0) else None
        if table is None or len(table.dims) != 2 or used[table.name] > 1 or table.data_type != onnx.TensorProto.FLOAT:
            nodes.append(node)
            continue
        name, value = table.name, as_numpy(table)
        step = np.maximum(np.abs(value).max(axis=1, keepdims=True) / np.float32(127), np.finfo(np.float32).tiny)
        model.graph.initializer.remove(table)
        _store(model, f"{name}_int8", np.rint(value / step).astype(np.int8))
        _store(model, f"{name}_steps", step)
        nodes += [
            helper.make_node("Gather", [f"{name}_int8", node.input[1]], [f"{name}_read"], node.name),
            helper.make_node("Gather", [f"{name}_steps", node.input[1]], [f"{name}_step"], f"{node.name}_step"),
            helper.make_node(
                "Cast", [f"{name}_read"], [f"{name}_cast"], f"{node.name}_cast", to=onnx.TensorProto.FLOAT
            ),
            helper.make_node("Mul", [f"{name}_cast", f"{name}_step"], [node.output[0]], f"{node.name}_mul"),
        ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def _store(model: onnx.ModelProto, name: str, value: Any) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
