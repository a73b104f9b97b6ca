"""An ONNX file as a graph that can be cut: its units, the tensors between them, and the two halves of a cut.

A unit is a node with what runtimes fuse into it: activations, biases, batch norms and reshapes that read nothing else
of the caller's data. What depends on constants alone belongs to both sides of every cut. A QuantizeLinear stays with
the unit before it, and a DequantizeLinear is copied to each reader, so that a cut between them carries the integers.
Bodies of If, Loop and Scan stay whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import onnx
from onnx import GraphProto, ModelProto, TensorProto, ValueInfoProto, helper, shape_inference

from edgewise.errors import SourceError, UnsupportedModel, UsageError
from edgewise.models.units import Parts, reads

Shape = tuple[int, ...]

CARRIED: Final = frozenset(  # what numpy has, and the wire
    (
        *("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
        *("float16", "float32", "float64"),
    )
)
SIZE_LIMIT: Final = (1 << 31) - (1 << 20)  # protobuf's, with room for what a half adds


@dataclass(frozen=True, slots=True)
class Tensor:
    """What one unit makes, or the caller gives (`producer` None), and others read. `shape` is that for the shapes asked
    of `Graph.open`; None where it depends on the data. Only a tensor with a `dtype` can cross a cut."""

    name: str
    producer: int | None
    readers: tuple[int, ...]
    dtype: np.dtype[np.generic] | None
    shape: Shape | None

    @property
    def raw_bytes(self) -> int | None:
        """As it lies in memory; None where that is not known."""
        if self.dtype is None or self.shape is None:
            return None
        return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True, slots=True)
class Unit:
    """Nodes that stay together, in the order of the file: their names, operators, and tensors in and out."""

    name: str
    operators: tuple[str, ...]
    reads: tuple[str, ...]
    makes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Halves:
    """A file cut in two. `crossing` are the outputs of `front` that `back` takes, the caller's own inputs among them if
    `back` reads them; `early` the file's outputs that `front` gives, `late` those of `back`. A half without units is
    None."""

    front: ModelProto | None
    back: ModelProto | None
    crossing: tuple[str, ...]
    early: tuple[str, ...]
    late: tuple[str, ...]


@dataclass(frozen=True)
class Graph:
    """See the top of this file. `units` are in an order in which they can run."""

    name: str
    units: tuple[Unit, ...]
    tensors: Mapping[str, Tensor]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    _model: ModelProto = field(repr=False)
    _parts: Parts = field(repr=False)
    _types: Mapping[str, ValueInfoProto] = field(repr=False)

    @staticmethod
    def open(path: Path | str, shapes: Mapping[str, Sequence[int]] | None = None) -> Graph:
        """The graph of a file, weights beside it included. `shapes` are those of its inputs, by name; a dynamic first
        axis is 1 else. SourceError if the file is missing, damaged or no ONNX, UnsupportedModel if another axis is
        dynamic and has no length in `shapes`, UsageError for shapes that the file does not take."""
        model = _read(Path(path))
        return Graph.of(model, name=Path(path).stem, shapes=shapes)

    @staticmethod
    def of(model: ModelProto, *, name: str, shapes: Mapping[str, Sequence[int]] | None = None) -> Graph:
        """As `open`, of a model in memory."""
        parts = Parts.of(model.graph)
        fixed = _with_shapes(model, name, parts.inputs, dict(shapes or {}))
        known = {info.name: info for info in _inferred(fixed)}
        units = tuple(_unit(model.graph, parts, number) for number in range(len(parts.members)))
        return Graph(
            name=name,
            units=units,
            tensors=_tensors(parts, units, known),
            inputs=parts.inputs,
            outputs=tuple(value.name for value in model.graph.output),
            _model=model,
            _parts=parts,
            _types={info.name: info for info in _inferred(model)},
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the model with its weights, in hexadecimal: that both sides cut the same one."""
        return hashlib.sha256(self._model.SerializeToString(deterministic=True)).hexdigest()

    def crossing(self, edge: Set[int]) -> tuple[str, ...]:
        """The tensors that the units outside `edge` read and do not make, in the order in which they are made.
        UsageError if `edge` is not closed: a unit in it reads what one outside makes."""
        for number in sorted(edge):
            if not 0 <= number < len(self.units):
                raise UsageError(f"there is no unit {number}; {self.name} has 0 to {len(self.units) - 1}")
            for name in self.units[number].reads:
                producer = self.tensors[name].producer
                if producer is not None and producer not in edge:
                    raise UsageError(
                        f"unit {number} ({self.units[number].name}) reads {name!r} of unit {producer}, which is not on "
                        "the edge; a cut goes one way",
                        hint="put every unit before it on the edge too",
                    )
        return tuple(tensor.name for tensor in self.tensors.values() if _crosses(tensor, edge))

    def can_cut(self, edge: Set[int]) -> bool:
        """Whether all that crosses has a type that can be sent."""
        return all(self.tensors[name].dtype is not None for name in self.crossing(edge))

    def before(self, tensors: Iterable[str]) -> frozenset[int]:
        """The units needed to make these tensors: the edge's side of a cut at them. UsageError for an unknown name."""
        wanted = list(tensors)
        found: set[int] = set()
        while wanted:
            name = wanted.pop()
            if name not in self.tensors:
                raise UsageError(f"{self.name} has no tensor {name!r} to cut at", hint="Graph.tensors lists them")
            producer = self.tensors[name].producer
            if producer is not None and producer not in found:
                found.add(producer)
                wanted += self.units[producer].reads
        return frozenset(found)

    def chain(self, widest: int = 4) -> Iterator[tuple[frozenset[int], tuple[str, ...]]]:
        """The cuts that follow the units' order, nothing and everything on the edge included, with what crosses: at
        most `widest` tensors. Of cuts with the same crossing the first."""
        seen = set()
        for count in range(len(self.units) + 1):
            edge = frozenset(range(count))
            crossing = self.crossing(edge)
            if len(crossing) <= widest and crossing not in seen and self.can_cut(edge):
                seen.add(crossing)
                yield edge, crossing

    def halves(self, edge: Set[int]) -> Halves:
        """The file cut so that the units of `edge` are in front. UsageError if `edge` is not closed, UnsupportedModel
        if what crosses cannot be sent."""
        crossing = self.crossing(edge)
        for name in crossing:
            if self.tensors[name].dtype is None:
                raise UnsupportedModel(
                    f"{name!r} of {self.name} has no known type of numbers and cannot cross a cut",
                    hint="cut elsewhere; Graph.can_cut tells",
                )
        cloud = frozenset(range(len(self.units))) - edge
        early = tuple(name for name in self.outputs if self._made_in(name, edge))
        late = tuple(name for name in self.outputs if name not in early)
        front = self._half(edge, tuple(dict.fromkeys((*self._made(crossing), *early)))) if edge else None
        back = self._half(cloud, late) if late else None
        return Halves(front, back, crossing, early, late)

    def weight_bytes(self, edge: Set[int]) -> int:
        """Of the weights that these units read, as they lie in the file; shared ones count for each side."""
        nodes, _ = self._parts.needed(self._model.graph, edge, ())
        used = {name for node in nodes for name in reads(node)}
        return sum(one.ByteSize() for one in self._model.graph.initializer if one.name in used)

    def exposed(self, tensors: Iterable[str]) -> ModelProto:
        """The whole file, giving these tensors too."""
        names = [name for name in self._made(tensors) if name not in self.outputs]
        return self._half(frozenset(range(len(self.units))), (*self.outputs, *names))

    def _made(self, names: Iterable[str]) -> tuple[str, ...]:
        """Without the caller's own inputs, which no half needs to give."""
        return tuple(name for name in names if name not in self.inputs)

    def _made_in(self, name: str, edge: Set[int]) -> bool:
        tensor = self.tensors.get(name)  # an output that is constant, or copied to each reader, is no tensor of ours
        return tensor is not None and tensor.producer is not None and tensor.producer in edge

    def _half(self, units: Set[int], outputs: Sequence[str]) -> ModelProto:
        nodes, free = self._parts.needed(self._model.graph, units, outputs)
        used = {name for node in nodes for name in reads(node)} | set(outputs)
        graph = GraphProto(name=f"{self.name} ({len(units)} of {len(self.units)} units)")
        graph.node.extend(nodes)
        graph.input.extend(self._info(name) for name in self.tensors if name in free)
        graph.output.extend(self._info(name) for name in outputs)
        graph.initializer.extend(one for one in self._model.graph.initializer if one.name in used)
        graph.sparse_initializer.extend(one for one in self._model.graph.sparse_initializer if one.values.name in used)
        half = ModelProto(ir_version=max(self._model.ir_version, 4), producer_name="edgewise", graph=graph)
        half.opset_import.extend(self._model.opset_import)
        half.functions.extend(self._model.functions)
        return half

    def _info(self, name: str) -> ValueInfoProto:
        """As the file declares it, with axes that are free there left free; without a shape where none is known."""
        info = self._types.get(name)
        if info is not None and info.type.tensor_type.elem_type:
            return info
        dtype = self.tensors[name].dtype if name in self.tensors else None
        element = helper.np_dtype_to_tensor_dtype(dtype) if dtype is not None else TensorProto.UNDEFINED
        return helper.make_tensor_value_info(name, element, None)


# The file


def _read(path: Path) -> ModelProto:
    if not path.is_file():
        raise SourceError(f"{path} is no file", hint="give the path of an ONNX file")
    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf's and onnx's own errors share no other class
        raise SourceError(f"{path} cannot be read as ONNX: {error}", hint="give the file that was exported") from error
    if not model.graph.node or not model.graph.output:
        raise SourceError(f"{path} holds no ONNX graph with nodes and outputs", hint="give the file that was exported")
    if model.ByteSize() > SIZE_LIMIT:
        raise UnsupportedModel(
            f"{path} has {model.ByteSize()} bytes with its weights; halves are cut of at most {SIZE_LIMIT}",
            hint="split language models by their blocks: edgewise split",
        )
    return model


def _with_shapes(model: ModelProto, name: str, inputs: Sequence[str], shapes: dict[str, Sequence[int]]) -> ModelProto:
    """A copy without free axes."""
    fixed = ModelProto()
    fixed.CopyFrom(model)
    for unknown in shapes.keys() - set(inputs):
        raise UsageError(f"{name} has no input {unknown!r}; it takes {', '.join(inputs)}")
    for value in fixed.graph.input:
        kind = value.type.tensor_type
        if value.name in inputs and kind.HasField("shape"):
            _fix(name, value.name, kind.shape.dim, shapes.get(value.name))
    return fixed


def _fix(model: str, name: str, axes: Sequence[onnx.TensorShapeProto.Dimension], given: Sequence[int] | None) -> None:
    if given is not None and len(given) != len(axes):
        raise UsageError(f"the shape {list(given)} of {name!r} has {len(given)} axes; {model} takes {len(axes)}")
    for place, axis in enumerate(axes):
        length = given[place] if given is not None else None
        if axis.dim_value > 0:
            if length not in (None, axis.dim_value):
                raise UsageError(f"axis {place} of {name!r} has {axis.dim_value} places; {length} was given")
        elif length is not None or place == 0:
            axis.dim_value = 1 if length is None else length
        else:
            raise UnsupportedModel(
                f"axis {place} of the input {name!r} of {model} is dynamic",
                hint=f"say how long it is: shapes={{{name!r}: [...]}}",
            )


def _inferred(model: ModelProto) -> Iterable[ValueInfoProto]:
    """All values whose type is declared or can be inferred; of nodes of unknown operators there are none."""
    try:
        graph = shape_inference.infer_shapes(model, data_prop=True).graph
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
        raise SourceError(f"the shapes of the graph contradict each other: {error}") from error
    return (*graph.input, *graph.value_info, *graph.output)


# Units


def _unit(graph: GraphProto, parts: Parts, number: int) -> Unit:
    nodes = [graph.node[member] for member in parts.members[number]]
    makes = [name for node in nodes for name in node.output if name]
    reads = dict.fromkeys(name for node in nodes for name in parts.live(node) if name not in makes)
    name = nodes[0].name or makes[0]
    return Unit(name, tuple(node.op_type for node in nodes), tuple(reads), tuple(makes))


def _tensors(parts: Parts, units: Sequence[Unit], known: Mapping[str, ValueInfoProto]) -> dict[str, Tensor]:
    """By name, in the order in which they are made."""
    readers: dict[str, list[int]] = {}
    for number, unit in enumerate(units):
        for name in unit.reads:
            readers.setdefault(name, []).append(number)
    made: list[tuple[str, int | None]] = [(name, None) for name in parts.inputs]
    made += [(name, number) for number, unit in enumerate(units) for name in unit.makes]
    return {
        name: Tensor(name, producer, tuple(readers.get(name, ())), *_kind(known.get(name))) for name, producer in made
    }


def _kind(info: ValueInfoProto | None) -> tuple[np.dtype[np.generic] | None, Shape | None]:
    kind = info.type.tensor_type if info is not None else None
    if kind is None or not kind.elem_type:
        return None, None
    dtype: npt.DTypeLike = helper.tensor_dtype_to_np_dtype(kind.elem_type)
    found = np.dtype(dtype)
    axes = [axis.dim_value if axis.HasField("dim_value") else -1 for axis in kind.shape.dim]
    shape = tuple(axes) if kind.HasField("shape") and min(axes, default=0) >= 0 else None
    return (found if found.name in CARRIED else None), shape


def _crosses(tensor: Tensor, edge: Set[int]) -> bool:
    """Whether it is there on the edge, and somebody elsewhere reads it."""
    here = tensor.producer is None or tensor.producer in edge
    return here and any(reader not in edge for reader in tensor.readers)
