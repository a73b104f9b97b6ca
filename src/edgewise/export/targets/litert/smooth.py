"""Channels made alike (smooth.py) in a float32 .tflite file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ai_edge_litert.schema_py_generated as schema
import numpy as np
from ai_edge_litert.tools import flatbuffer_utils

from edgewise.export.targets.litert.file import File, Operator
from edgewise.export.targets.litert.recipe import Calibration, attends, constant
from edgewise.export.targets.litert.run import Watched
from edgewise.export.targets.smooth import Channels
from edgewise.export.work.job import Array


def smoothed(source: Path, calibration: Calibration) -> Path:
    """The file itself, or one beside it with a MUL before the products of a transformer that gain by it."""
    file = File(source)
    if not attends(file):
        return source
    products: dict[int, list[int]] = {}
    for place, op in enumerate(file.operators):
        if op.name == "FULLY_CONNECTED" and constant(file, op) and _by_channels(file, op):
            products.setdefault(op.inputs[0], []).append(place)
    channels = _seen(source, calibration, {file.tensors[n].name: n for n in products})
    model = flatbuffer_utils.read_model(str(source))
    graph = model.subgraphs[0]
    made: dict[int, Any] = {}  # operators by the place that they come before
    for tensor, places in products.items():
        matrices = [_matrix(model, graph.operators[place].inputs[1]) for place in places]
        by = channels[tensor].factors([one.T for one in matrices]) if tensor in channels else None
        if by is None:
            continue
        scaled = _added(model, f"{file.tensors[tensor].name}_smoothed", graph.tensors[tensor], None)
        factors = _added(model, f"{file.tensors[tensor].name}_factors", None, by)
        made[min(places)] = _mul(model, tensor, factors, scaled)
        for place, matrix in zip(places, matrices, strict=True):
            op = graph.operators[place]
            op.inputs = [scaled, _divided(model, op.inputs[1], matrix / by), *op.inputs[2:]]
    if not made:
        return source
    graph.operators = [
        one for place, op in enumerate(graph.operators) for one in ([made[place], op] if place in made else [op])
    ]
    changed = source.with_name("smoothed.tflite")
    flatbuffer_utils.write_model(model, str(changed))
    return changed


def _by_channels(file: File, op: Operator) -> bool:
    """Whether the last axis of its input is what the matrix takes: LiteRT flattens others on the way."""
    given, matrix = (file.tensors[n] for n in op.inputs[:2])
    return matrix.dtype == "float32" and given.shape[-1:] == matrix.shape[1:]


def _seen(source: Path, calibration: Calibration, wanted: dict[str, int]) -> dict[int, Channels]:
    count = len(calibration.rows[0])
    found: dict[int, Channels] = {}
    watched = Watched(source, calibration.inputs, calibration.outputs, calibration.threads)
    for at in range(count):
        for name, value in watched.seen(calibration.rows, at):
            if name in wanted:
                found.setdefault(wanted[name], Channels(count)).add(value)
    return found


def _matrix(model: Any, tensor: int) -> Array:
    """[outputs, channels]"""
    its = model.subgraphs[0].tensors[tensor]
    raw = np.asarray(model.buffers[its.buffer].data, np.uint8)
    return raw.view(np.float32).reshape(its.shape)


def _divided(model: Any, tensor: int, value: Array) -> int:
    """The place of the matrix with that value: of a new one, where others take the old one as well."""
    graph = model.subgraphs[0]
    its = graph.tensors[tensor]
    takers = sum(int(n) == tensor for op in graph.operators for n in op.inputs)
    sharers = sum(one.buffer == its.buffer for one in graph.tensors)
    if takers == 1 and sharers == 1:
        model.buffers[its.buffer].data = _bytes(value)
        return tensor
    return _added(model, f"{its.name.decode()}_divided", None, value)


def _bytes(value: Array) -> Array:
    return np.frombuffer(np.ascontiguousarray(value, np.float32).tobytes(), np.uint8)


def _added(model: Any, name: str, like: Any, value: Array | None) -> int:
    """The place of a new tensor: as another one is, or with a value of its own."""
    tensor = schema.TensorT()
    tensor.name = name.encode()
    tensor.type = schema.TensorType.FLOAT32
    tensor.buffer = 0  # the empty one, of what is computed
    if value is None:
        tensor.shape, tensor.shapeSignature = like.shape, like.shapeSignature
    else:
        tensor.shape = list(value.shape)
        buffer = schema.BufferT()
        buffer.data = _bytes(value)
        tensor.buffer = len(model.buffers)
        model.buffers.append(buffer)
    model.subgraphs[0].tensors.append(tensor)
    return len(model.subgraphs[0].tensors) - 1


def _mul(model: Any, tensor: int, factors: int, made: int) -> Any:
    mul = schema.BuiltinOperator.MUL
    codes = [code.builtinCode for code in model.operatorCodes]
    if mul not in codes:
        code = schema.OperatorCodeT()
        code.builtinCode = code.deprecatedBuiltinCode = mul
        code.version = 1
        model.operatorCodes.append(code)
        codes.append(mul)
    op = schema.OperatorT()
    op.opcodeIndex = codes.index(mul)
    op.inputs, op.outputs = [tensor, factors], [made]
    op.builtinOptionsType = schema.BuiltinOptions.MulOptions
    op.builtinOptions = schema.MulOptionsT()
    return op
