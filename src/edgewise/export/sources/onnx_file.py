"""ONNX files, for whoever reads or writes one: looked over as they are loaded, in two files where one cannot hold
them, and what onnxruntime says of those that it refuses."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import numpy as np
import onnx

from edgewise.errors import SourceError, UnsupportedModel
from edgewise.export.work.job import WEIGHTS

UNABLE: Final = ("NOT_IMPLEMENTED", "No Op registered", "Unknown opset", "under development", "is not a registered")
APART: Final = ("external data", "should be stored in", "doesn't exist")  # what onnx says of weights beside the file
LARGEST: Final = 1_900_000_000  # bytes that one protobuf file may have, with room to spare
HALVES: Final = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
NUMBER_TYPES: Final = (  # attributes that name one
    *("to", "dtype", "output_dtype", "output_datatype", "softmax_precision", "stash_type"),
)
LEAST_APART: Final = 1024  # bytes of a tensor that goes to the file beside it


def load(path: str | Path) -> onnx.ModelProto:
    """With its external data. SourceError for what is damaged or no ONNX file."""
    place = Path(path)
    if not place.is_file():
        raise SourceError(f"there is no file {place}", hint="give the path of an .onnx file")
    try:
        onnx.checker.check_model(str(place), full_check=True)
        return onnx.load(place)
    except Exception as e:  # protobuf's, onnx's and the system's own share no other class
        why = plain(e)
        if any(mark in why.replace(str(place), "").lower() for mark in APART) or isinstance(e, FileNotFoundError):
            raise SourceError(
                f"the weights of {place.name} are not where it says: {why}",
                hint="put its external data beside it, under the name that it had",
            ) from e
        raise SourceError(
            f"{place.name} is damaged, or no ONNX file: {why}",
            hint="copy or export it again; `onnx.checker.check_model(path, full_check=True)` must accept it",
        ) from e


def load_float(path: str | Path) -> tuple[onnx.ModelProto, bool]:
    """With half-precision numbers widened, and whether there were any. All that is made of a source begins at float32,
    and what it is held against is computed so."""
    model = load(path)
    found = _widen(model.graph) + sum(_widen_attributes(one.node) for one in model.functions)
    return model, found > 0


def _widen(graph: onnx.GraphProto) -> int:
    """How many there were."""
    ports = [one.type.tensor_type for one in (*graph.input, *graph.output)]
    narrow = [one for one in ports if one.elem_type in HALVES]
    for one in narrow:
        one.elem_type = onnx.TensorProto.FLOAT
    found = len(narrow) + sum(map(_widen_tensor, graph.initializer)) + _widen_attributes(graph.node)
    if found:
        del graph.value_info[:]
    return found


def _widen_attributes(nodes: Iterable[onnx.NodeProto]) -> int:
    found = 0
    for attribute in (one for node in nodes for one in node.attribute):
        found += sum(map(_widen, _graphs(attribute))) + sum(map(_widen_tensor, _tensors(attribute)))
        if attribute.name in NUMBER_TYPES and attribute.i in HALVES:
            attribute.i = onnx.TensorProto.FLOAT
            found += 1
    return found


def _graphs(attribute: onnx.AttributeProto) -> list[onnx.GraphProto]:
    return [attribute.g, *attribute.graphs] if attribute.HasField("g") else list(attribute.graphs)


def _tensors(attribute: onnx.AttributeProto) -> list[onnx.TensorProto]:
    return [attribute.t, *attribute.tensors] if attribute.HasField("t") else list(attribute.tensors)


def _widen_tensor(tensor: onnx.TensorProto) -> bool:
    if tensor.data_type not in HALVES:
        return False
    value = onnx.numpy_helper.to_array(tensor).astype(np.float32)
    tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    return True


def save(model: onnx.ModelProto, path: str | Path) -> tuple[str, ...]:
    """The files that were written: the model, and its weights beside it where one file cannot hold both."""
    place = Path(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    if stored_bytes(model) < LARGEST:
        place.write_bytes(model.SerializeToString(deterministic=True))
        return (str(place),)
    data = place.with_name(f"{place.name}{WEIGHTS}")
    data.unlink(missing_ok=True)  # onnx appends
    whole = onnx.ModelProto()
    whole.CopyFrom(model)  # onnx takes the weights out of what it saves so
    _store_constants(whole.graph)
    onnx.save(whole, place, save_as_external_data=True, location=data.name, size_threshold=LEAST_APART)
    return str(place), str(data)


def stored_bytes(model: onnx.ModelProto) -> int:
    """What the tensors take. protobuf itself has no answer for what is too large for it."""
    return _stored_bytes(model.graph)


def _stored_bytes(graph: onnx.GraphProto) -> int:
    attributes = [one for node in graph.node for one in node.attribute]
    tensors = [*graph.initializer, *(tensor for one in attributes for tensor in _tensors(one))]
    own: int = sum(
        math.prod(one.dims) * onnx.helper.tensor_dtype_to_np_dtype(one.data_type).itemsize for one in tensors
    )
    return own + sum(_stored_bytes(inner) for one in attributes for inner in _graphs(one))


def _store_constants(graph: onnx.GraphProto) -> None:
    """As initializers, which alone can lie beside the file."""
    kept = []
    for node in graph.node:
        value = next((one.t for one in node.attribute if one.name == "value"), None)
        if node.op_type != "Constant" or value is None:
            kept.append(node)
            continue
        graph.initializer.add().CopyFrom(value)
        graph.initializer[-1].name = node.output[0]
    del graph.node[:]
    graph.node.extend(kept)


def nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Those of graphs inside nodes included."""
    for node in graph.node:
        yield node
        for one in node.attribute:
            if one.type == onnx.AttributeProto.GRAPH:
                yield from nodes(one.g)


def network_inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """What it takes: older files name what they store as inputs, too."""
    stored = {one.name for one in model.graph.initializer}
    return [one for one in model.graph.input if one.name not in stored]


def unable(error: Exception, name: str) -> SourceError | UnsupportedModel:
    """onnxruntime's refusal as ours: its classes share no other than Exception."""
    import onnxruntime as ort

    why = plain(error)
    if any(mark in why for mark in UNABLE):
        return UnsupportedModel(
            f"onnxruntime {ort.__version__} cannot run {name}: {why}",
            hint="export it with the operators and the opset that this version has",
        )
    return SourceError(f"onnxruntime cannot load {name}: {why}", hint="export it again")


def plain(error: object, limit: int = 300) -> str:
    """A message of others on one line, without colours."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())[:limit]
