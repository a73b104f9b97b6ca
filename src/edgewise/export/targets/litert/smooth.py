"""Channels made alike (smooth.py) in a float32 .tflite file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ai_edge_litert.schema_py_generated as schema
import numpy as np
from ai_edge_litert.tools import flatbuffer_utils

from edgewise.export.targets.litert.file import File, Operator
from edgewise.export.targets.litert.recipe import Calibration, attends, constant
from edgewise.export.targets.litert.run import Watched
from edgewise.export.targets.smooth import Channels, together
from edgewise.export.work.job import Array

Stored = tuple[int, tuple[int, ...]]  # a matrix: its buffer, which others may have in another shape, and its own


def smoothed(source: Path, calibration: Calibration) -> Path:
    """The file itself, or one beside it with a MUL before the products of a transformer that gain by it."""
    file = File(source)
    if not attends(file):
        return source
    model = flatbuffer_utils.read_model(str(source))
    graph = model.subgraphs[0]
    found = [place for place, op in enumerate(file.operators) if _is_product(file, op)]
    groups = together(found, lambda place: (("input", _input(file, place)), ("matrix", _stored(graph, place))))
    channels = _seen(source, calibration, file, groups)
    muls: dict[int, Any] = {}  # by the place that they come before
    for places in map(sorted, groups):
        its = channels.get(file.tensors[_input(file, places[0])].name)
        matrices = {_stored(graph, place): _matrix(model, graph.operators[place].inputs[1]) for place in places}
        by = its.factors([one.T for one in matrices.values()]) if its is not None else None
        if by is not None:
            divided = {stored: _divided(model, stored, value / by, places) for stored, value in matrices.items()}
            muls |= _multiplied(model, file, places, by, divided)
    if not muls:
        return source
    graph.operators = [
        one for place, op in enumerate(graph.operators) for one in ([muls[place], op] if place in muls else [op])
    ]
    changed = source.with_name("smoothed.tflite")
    flatbuffer_utils.write_model(model, str(changed))
    return changed


def _multiplied(
    model: Any, file: File, places: Sequence[int], by: Array, divided: Mapping[Stored, int | None]
) -> dict[int, Any]:
    """Makes the products there take their inputs times `by`; gives the new operators by the place that they
    come before."""
    graph = model.subgraphs[0]
    factors = _added(model, f"{file.tensors[_input(file, places[0])].name}_factors", None, by)
    scaled: dict[int, int] = {}
    made: dict[int, Any] = {}
    for place in places:
        op, tensor = graph.operators[place], _input(file, place)
        matrix = divided[_stored(graph, place)]
        if tensor not in scaled:
            scaled[tensor] = _added(model, f"{file.tensors[tensor].name}_smoothed", graph.tensors[tensor], None)
            made[place] = _mul(model, tensor, factors, scaled[tensor])
        op.inputs = [scaled[tensor], op.inputs[1] if matrix is None else matrix, *op.inputs[2:]]
    return made


def _is_product(file: File, op: Operator) -> bool:
    """With a stored matrix that takes the last axis of its input: LiteRT flattens others on the way."""
    if op.name != "FULLY_CONNECTED" or not constant(file, op):
        return False
    given, matrix = (file.tensors[n] for n in op.inputs[:2])
    return matrix.dtype == "float32" and given.shape[-1:] == matrix.shape[1:]


def _input(file: File, place: int) -> int:
    return file.operators[place].inputs[0]


def _stored(graph: Any, place: int) -> Stored:
    """Of the matrix of the product there."""
    its = graph.tensors[graph.operators[place].inputs[1]]
    return int(its.buffer), tuple(map(int, its.shape))


def _seen(source: Path, calibration: Calibration, file: File, groups: Sequence[Sequence[int]]) -> dict[str, Channels]:
    """By the name of each input."""
    count = len(calibration.rows[0])
    found: dict[str, Channels] = {}
    for places in groups:
        names = {file.tensors[_input(file, place)].name for place in places}
        found |= dict.fromkeys(names, Channels(len(names) * count))
    watched = Watched(source, calibration.inputs, calibration.outputs, calibration.threads)
    for at in range(count):
        for name, value in watched.seen(calibration.rows, at):
            if name in found:
                found[name].add(value)
    return {name: one for name, one in found.items() if one.least is not None}


def _matrix(model: Any, tensor: int) -> Array:
    """[outputs, channels]"""
    its = model.subgraphs[0].tensors[tensor]
    raw = np.asarray(model.buffers[its.buffer].data, np.uint8)
    return raw.view(np.float32).reshape(its.shape)


def _divided(model: Any, stored: Stored, value: Array, products: Sequence[int]) -> int | None:
    """The place of a new tensor with that value, where others than those products take the old one; None where the old
    one has it now."""
    graph, buffer = model.subgraphs[0], stored[0]
    its = {n for n, tensor in enumerate(graph.tensors) if tensor.buffer == buffer}
    takers = {place for place, op in enumerate(graph.operators) if not its.isdisjoint(map(int, op.inputs))}
    alone = all(place in products and _stored(graph, place) == stored for place in takers)
    if alone and not any(one.buffer == buffer for other in model.subgraphs[1:] for one in other.tensors):
        model.buffers[buffer].data = _bytes(value)
        return None
    return _added(model, f"{graph.tensors[min(its)].name.decode()}_divided", None, value)


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
