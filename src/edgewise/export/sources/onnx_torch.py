"""An ONNX file as a torch module, for targets that begin at torch.

Each node is a submodule of its own name, so that exporters can say which one they cannot take, and weights are
parameters under the names they have in the file. What follows from shapes alone (Shape, Gather, Concat, … up to
Reshape) is computed with numbers while torch traces, and never becomes a part of the traced program; the first axis may
be left open all the while.
"""

from __future__ import annotations

import inspect
import keyword
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import onnx
import torch
from onnx import inliner, numpy_helper
from torch import nn

from edgewise.errors import EdgewiseError, UnsupportedModel
from edgewise.export.sources.onnx_file import nodes
from edgewise.export.sources.onnx_ops import maths, shaping, spatial  # noqa: F401  (they enter their operators)
from edgewise.export.sources.onnx_ops.host import HOST, LARGEST, settled
from edgewise.export.sources.onnx_ops.maths import FEW_BITS
from edgewise.export.sources.onnx_ops.node import DTYPES, OPERATORS, WAY_OUT, Array, Node, constant

DOMAINS: Final = ("", "ai.onnx")
OLDEST: Final = 7  # operator set; broadcasting was another thing before it
MADE: Final = frozenset({"Constant", "If"})  # operators that are treated here
NARROW: Final = {"int2": np.int8, "int4": np.int8, "uint2": np.uint8, "uint4": np.uint8}  # in numbers that torch has
ENDS: Final = ("NonMaxSuppression",)  # belong behind a network, in the program that runs it


class OnnxModule(nn.Module):
    """Takes the graph's inputs in their order, and gives its output, or a tuple of them."""

    def __init__(self, graph: _Graph, stored: Mapping[str, _Stored]) -> None:
        super().__init__()
        self.inputs, self.outputs = graph.inputs, graph.outputs
        self._graph = graph
        self.nodes = nn.Module()
        for step in graph.all_steps():
            self.nodes.add_module(_free(self.nodes, _identifier(step.node.name)), step)
        self._places = {name: _placed(self, one) for name, one in stored.items() if one.kept}
        empty = torch.empty(0)
        self._stored = {name: one._replace(tensor=empty) if one.kept else one for name, one in stored.items()}

    def forward(self, *given: torch.Tensor) -> Any:
        values: dict[str, Any] = dict(zip(self.inputs, given, strict=True))
        self._run(self._graph, values)
        found = tuple(self._tensor(values, name) for name in self.outputs)
        return found[0] if len(found) == 1 else found

    def _run(self, graph: _Graph, values: dict[str, Any]) -> None:
        for step in graph.steps:
            given = [self._value(values, name) for name in step.inputs]
            found = self._branch(step, given[0], values) if step.branches else step.computed(given)
            values.update((name, value) for name, value in zip(step.outputs, found, strict=False) if name)
            for name in step.last:
                values.pop(name, None)

    def _branch(self, step: _Step, condition: Any, values: dict[str, Any]) -> list[Any]:
        known = _known(condition)
        if known is None:
            raise step.node.refused("its condition depends on the data")
        taken = step.branches[0 if bool(known) else 1]
        self._run(taken, values)
        return [self._value(values, name) for name in taken.outputs]

    def _value(self, values: Mapping[str, Any], name: str) -> Any:
        """A tensor, a host array, what the file holds (both at once), or None for an input that is left out."""
        if name in values or not name:
            return values.get(name)
        place = self._places.get(name)
        stored = self._stored[name]
        return stored if place is None else stored._replace(tensor=self._weight(place))

    def _weight(self, place: str) -> torch.Tensor:
        path, _, name = place.rpartition(".")
        found: torch.Tensor = getattr(self.get_submodule(path), name)
        return found

    def _tensor(self, values: Mapping[str, Any], name: str) -> torch.Tensor:
        return _as_tensor(self._value(values, name))


def module_of(model: onnx.ModelProto) -> OnnxModule:
    """A file's network in evaluation mode. UnsupportedModel if an operator of it is unknown; what depends on the shapes
    of inputs is refused when it first runs."""
    model = _inlined(model)
    version = {one.domain: one.version for one in model.opset_import}.get("", 1)
    if version < OLDEST:
        raise UnsupportedModel(
            f"the file uses operator set {version}; {OLDEST} is the oldest that is known",
            hint="onnx.version_converter brings a file to a newer one",
        )
    _check(model.graph)
    _check_inputs(model.graph)
    stored: dict[str, _Stored] = {}
    graph = _Builder(version, stored).graph(model.graph)
    return _signed(graph.inputs)(graph, _used(graph, stored)).eval()


def _signed(inputs: Sequence[str]) -> type[OnnxModule]:
    """Whose forward has a parameter for each input, as exporters name inputs after parameters."""

    def forward(self: OnnxModule, *given: torch.Tensor) -> Any:
        return OnnxModule.forward(self, *given)

    names: list[str] = []
    for name in inputs:
        found = re.sub(r"\W", "_", name)
        found = f"_{found}" if found[:1].isdigit() or keyword.iskeyword(found) else found
        names.append(f"{found}_{len(names)}" if found in {"self", *names} else found)
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("self", *names)]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return type("OnnxModule", (OnnxModule,), {"forward": forward})


def _inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    return inliner.inline_local_functions(model) if model.functions else model


def _check(graph: onnx.GraphProto) -> None:
    """All that is unknown is named at once."""
    unknown = [node for node in nodes(graph) if node.domain not in DOMAINS or _kind(node) is None]
    if not unknown:
        return
    counts = Counter(f"{node.domain}.{node.op_type}".removeprefix(".") for node in unknown)
    first = unknown[0]
    hint = WAY_OUT
    if first.op_type in ENDS:
        hint = "cut the network before it: it belongs into the program that runs the network"
    elif first.domain.startswith("com.microsoft"):
        hint = "give the file as it was before onnxruntime's own optimisations: those operators are its alone"
    raise UnsupportedModel(
        f"node {first.name or first.output[0]!r} is a {first.op_type}, which cannot be made in torch; in all: "
        + ", ".join(f"{count} {name}" for name, count in counts.items()),
        hint=hint,
    )


def _check_inputs(graph: onnx.GraphProto) -> None:
    for one in graph.input:
        number = one.type.tensor_type.elem_type
        if number not in DTYPES or number in FEW_BITS:
            kind = onnx.TensorProto.DataType.Name(number).lower()
            raise UnsupportedModel(f"the input {one.name!r} is {kind}, and torch has no tensors of that", hint=WAY_OUT)


def _kind(node: onnx.NodeProto) -> str | None:
    return node.op_type if node.op_type in MADE or node.op_type in OPERATORS or node.op_type in HOST else None


# What the file holds


class _Stored(NamedTuple):
    """A tensor of the file, or what follows from such alone. `kept` ones are parameters and buffers of the module, and
    only small ones are at `host` too."""

    name: str
    host: Array | None
    tensor: torch.Tensor
    kept: bool = False


def _stored(name: str, array: Array) -> _Stored:
    return _Stored(name, array, _torch(array))


def _torch(array: Array) -> torch.Tensor:
    if array.dtype.name in NARROW:
        return torch.tensor(array.astype(NARROW[array.dtype.name]))
    if array.dtype.name == "bfloat16":
        return torch.tensor(array.astype(np.float32)).to(torch.bfloat16)
    try:
        return torch.tensor(np.array(array))
    except TypeError as e:
        raise UnsupportedModel(f"the file holds numbers of {array.dtype}, which torch has not", hint=WAY_OUT) from e


def _placed(module: nn.Module, one: _Stored) -> str:
    """Put it under its name, each part between dots a module, and say where."""
    *path, last = [_identifier(part) for part in one.name.split(".") if part] or ["_"]
    place: list[str] = []
    for part in path:
        part = part if isinstance(module._modules.get(part), nn.Module) else _free(module, part)
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
        place.append(part)
    last = _free(module, last)
    if one.tensor.is_floating_point() and one.tensor.ndim > 0:
        module.register_parameter(last, nn.Parameter(one.tensor, requires_grad=False))
    else:
        module.register_buffer(last, one.tensor)
    return ".".join([*place, last])


def _identifier(name: str) -> str:
    return re.sub(r"\W", "_", name) or "_"


def _free(module: nn.Module, name: str) -> str:
    while hasattr(module, name):
        name += "_"
    return name


# The graph


@dataclass
class _Graph:
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    steps: list[_Step]

    def all_steps(self) -> Iterator[_Step]:
        for step in self.steps:
            yield step
            for branch in step.branches:
                yield from branch.all_steps()


class _Step(nn.Module):
    """A node; `last` are values that nothing uses after it."""

    def __init__(self, node: Node, inputs: Sequence[str], outputs: Sequence[str], branches: Sequence[_Graph]) -> None:
        super().__init__()
        self.node = node
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self.branches = tuple(branches)
        self.last: tuple[str, ...] = ()

    def computed(self, given: Sequence[Any]) -> list[Any]:
        """With numbers where all that it takes is known and shapes are what it is about, else by torch."""
        try:
            found = self._on_host(given)
            if found is None:
                found = self(*(self._handed(at, value) for at, value in enumerate(given)))
        except EdgewiseError:
            raise
        except Exception as e:  # torch's own, of many kinds
            raise self.node.refused(f"it fails in torch: {' '.join(str(e).split())[:300]}") from e
        values = found if isinstance(found, tuple) else (found,)
        return [settled(one) if isinstance(one, np.ndarray) else one for one in values]

    def forward(self, *given: Any) -> Any:
        return OPERATORS[self.node.op].compute(self.node, *given)

    def _on_host(self, given: Sequence[Any]) -> Any:
        arrays = [_known(one) for one in given]
        unknown = any(array is None and one is not None for array, one in zip(arrays, given, strict=True))
        if unknown or self.node.op not in HOST:
            return None
        return HOST[self.node.op](self.node, *arrays)

    def _handed(self, at: int, value: Any) -> Any:
        operator = OPERATORS.get(self.node.op)
        if operator is None:
            raise self.node.refused("what it computes depends on the data, and with it the shapes after it")
        if value is None:
            return None
        known = _known(value)
        if at in operator.host and known is None:
            raise self.node.refused(
                f"its input {at} ({self.inputs[at]!r}), a shape or a number of places, depends on the data"
            )
        if at in operator.host or (at in operator.either and known is not None):
            return known
        return _as_tensor(value)


def _known(value: Any) -> Array | None:
    return value.host if isinstance(value, _Stored) else value if isinstance(value, np.ndarray) else None


def _as_tensor(value: Any) -> torch.Tensor:
    if isinstance(value, _Stored):
        return value.tensor
    return constant(value) if isinstance(value, np.ndarray) else value


@dataclass
class _Builder:
    version: int
    stored: dict[str, _Stored]

    def graph(self, proto: onnx.GraphProto) -> _Graph:
        for one in proto.initializer:
            self.stored[one.name] = _stored(one.name, numpy_helper.to_array(one))
        if proto.sparse_initializer:
            raise UnsupportedModel("the file holds sparse tensors", hint=WAY_OUT)
        steps = [step for at, node in enumerate(proto.node) if (step := self.step(node, at)) is not None]
        inputs = tuple(one.name for one in proto.input if one.name not in self.stored)
        outputs = tuple(one.name for one in proto.output)
        _release(steps, outputs)
        return _Graph(inputs, outputs, steps)

    def step(self, proto: onnx.NodeProto, at: int) -> _Step | None:
        """None for a node whose outputs are known already: it is computed here and now."""
        name = proto.name or f"{proto.op_type}_{at}"
        if proto.op_type == "Constant":
            self.stored[proto.output[0]] = _stored(proto.output[0], _constant(proto, name))
            return None
        attributes = {one.name: _attribute(one) for one in proto.attribute if one.type != onnx.AttributeProto.GRAPH}
        if proto.op_type == "QuantizeLinear":
            attributes |= self.quantized_to(proto)
        held = frozenset(at for at, one in enumerate(proto.input) if one in self.stored)
        node = Node(name, proto.op_type, attributes, self.version, sum(map(bool, proto.output)), held)
        step = _Step(node, list(proto.input), list(proto.output), self.branches(proto))
        if proto.input and not step.branches and all(one in self.stored or not one for one in proto.input):
            self.fold(step)
            return None
        return step

    def quantized_to(self, proto: onnx.NodeProto) -> dict[str, int]:
        """What the type of its zero point says, of few bits: no tensor of torch will say it any more."""
        zero = self.stored.get(proto.input[2]) if len(proto.input) > 2 else None
        kind = "" if zero is None or zero.host is None else zero.host.dtype.name
        return {"output_dtype": onnx.TensorProto.DataType.Value(kind.upper())} if kind in NARROW else {}

    def branches(self, proto: onnx.NodeProto) -> list[_Graph]:
        found = {one.name: one.g for one in proto.attribute if one.type == onnx.AttributeProto.GRAPH}
        return [self.graph(found[name]) for name in ("then_branch", "else_branch") if name in found]

    def fold(self, step: _Step) -> None:
        with torch.no_grad():
            found = step.computed([self.stored[name] if name else None for name in step.inputs])
        for name, value in zip(step.outputs, found, strict=False):
            if name:
                known = _known(value)
                self.stored[name] = _Stored(name, _numbers(value), value) if known is None else _stored(name, known)


def _numbers(value: torch.Tensor) -> Array:
    return value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()


def _constant(proto: onnx.NodeProto, name: str) -> Array:
    attribute = proto.attribute[0]
    if attribute.name not in ("value", "value_float", "value_floats", "value_int", "value_ints"):
        raise UnsupportedModel(f"node {name!r} (Constant) holds a {attribute.name}", hint=WAY_OUT)
    value = _attribute(attribute)
    if isinstance(value, np.ndarray):
        return value
    return np.array(value, np.int64 if attribute.name.startswith("value_int") else np.float32)


def _attribute(one: onnx.AttributeProto) -> Any:
    value = onnx.helper.get_attribute_value(one)
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    if isinstance(value, bytes):
        return value.decode()
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else value


def _release(steps: Sequence[_Step], outputs: Sequence[str]) -> None:
    """Values of this graph die after their last use in it, branches included."""
    made = {name for step in steps for name in step.outputs if name}
    seen = set(outputs)
    for step in reversed(steps):
        used = {name for one in _within(step) for name in one.inputs} | {n for b in step.branches for n in b.outputs}
        step.last = tuple((used & made) - seen)
        seen |= used


def _within(step: _Step) -> Iterator[_Step]:
    yield step
    for branch in step.branches:
        yield from branch.all_steps()


def _used(graph: _Graph, stored: Mapping[str, _Stored]) -> dict[str, _Stored]:
    """Of the stored tensors those that are needed yet; those that some node takes as a tensor are the module's own.
    Single whole numbers stay constants."""
    needed, taken = set(graph.outputs), set(graph.outputs)
    for step in graph.all_steps():
        named = {*step.inputs, *(name for branch in step.branches for name in branch.outputs)}
        needed |= named
        taken |= named - {name for at, name in enumerate(step.inputs) if at in _hosted(step)}
    return {name: _settled(stored[name], name in taken) for name in stored if name in needed}


def _hosted(step: _Step) -> frozenset[int]:
    operator = OPERATORS.get(step.node.op)
    return operator.host | operator.either if operator else frozenset()


def _settled(one: _Stored, taken: bool) -> _Stored:
    if not taken or (one.tensor.numel() == 1 and not one.tensor.is_floating_point()):
        return one
    return one._replace(kept=True, host=one.host if one.tensor.numel() <= LARGEST else None)
