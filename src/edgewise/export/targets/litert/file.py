"""What a .tflite file says of itself: its operators, its constant tensors, and the weights that they are."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Final

from ai_edge_litert import schema_py_generated as schema

from edgewise.errors import SourceError

WEIGHT: Final[Mapping[str, int]] = {  # which input of an operator is its matrix or its filters
    "CONV_2D": 1,
    "DEPTHWISE_CONV_2D": 1,
    "TRANSPOSE_CONV": 1,
    "CONV_3D": 1,
    "FULLY_CONNECTED": 1,
    "EMBEDDING_LOOKUP": 1,
    "GATHER": 0,
}
PRODUCT: Final = "BATCH_MATMUL"  # either side may be a constant
TABLES: Final = ("EMBEDDING_LOOKUP", "GATHER")  # rows are read, nothing is multiplied
TYPES: Final = {value: name.lower() for name, value in vars(schema.TensorType).items() if isinstance(value, int)}
OPERATORS: Final = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}
MODULE: Final = re.compile(r"(?:\w+\.)+_*[A-Za-z0-9]+_(\w+)")  # package.module.Class_attribute
BITS: Final = {"int2": 2, "int4": 4, "uint4": 4, "bool": 8, "float16": 16, "bfloat16": 16}


@dataclass(frozen=True, slots=True)
class TensorOf:
    """A tensor of the main graph."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    buffer: int
    constant: bool

    @property
    def bytes(self) -> int:
        """As it is stored: two int4 to a byte."""
        bits = BITS.get(self.dtype) or int("".join(filter(str.isdigit, self.dtype)) or 8)
        return -(-prod(self.shape) * bits // 8)


@dataclass(frozen=True, slots=True)
class Operator:
    """`inputs` and `outputs` are indices of tensors, -1 for one that is left out."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Weight:
    """A constant matrix or filter, and how the operator that takes it computes: `unpacked` if it is first made float32
    by a DEQUANTIZE, `activation` the number type of the operator's other side. `name` is the operator's, as weights
    themselves are often but numbered constants."""

    name: str
    tensor: TensorOf
    op: str
    unpacked: bool
    activation: str


class File:
    """The main graph of a file whose flatbuffer was verified (the interpreter does that)."""

    def __init__(self, path: Path) -> None:
        try:
            self._model = schema.Model.GetRootAs(path.read_bytes(), 0)
        except Exception as e:  # struct's and flatbuffers' own
            raise SourceError(f"{path} is no .tflite file: {e}", hint="export it again") from e

    @cached_property
    def tensors(self) -> tuple[TensorOf, ...]:
        graph = self._model.Subgraphs(0)
        return tuple(self._tensor(graph.Tensors(n)) for n in range(graph.TensorsLength()))

    @cached_property
    def operators(self) -> tuple[Operator, ...]:
        graph = self._model.Subgraphs(0)
        return tuple(self._operator(graph.Operators(n)) for n in range(graph.OperatorsLength()))

    @cached_property
    def weights(self) -> tuple[Weight, ...]:
        """Of two axes or more, each constant once."""
        found: dict[int, Weight] = {}
        made = {out: op for op in self.operators for out in op.outputs}
        for op in self.operators:
            for place in _weight_places(op):
                weight = self._weight(op, place, made)
                if weight is not None and len(weight.tensor.shape) >= 2:
                    found.setdefault(weight.tensor.buffer, weight)
        return tuple(found.values())

    @property
    def bytes_by_type(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for weight in self.weights:
            found[weight.tensor.dtype] = found.get(weight.tensor.dtype, 0) + weight.tensor.bytes
        return found

    def _weight(self, op: Operator, place: int, made: Mapping[int, Operator]) -> Weight | None:
        """The constant at an operator's input, if it is one, behind a DEQUANTIZE or not."""
        index = op.inputs[place]
        maker = made.get(index)
        unpacked = maker is not None and maker.name == "DEQUANTIZE"
        tensor = self.tensors[maker.inputs[0] if maker is not None and unpacked else index]
        if not tensor.constant:
            return None
        other = [n for n in op.inputs[:3] if n >= 0 and n != index and not self.tensors[n].constant]
        name = plain_name(self.tensors[op.outputs[0]].name)
        return Weight(name, tensor, op.name, unpacked, self.tensors[other[0]].dtype if other else "")

    def _tensor(self, tensor: Any) -> TensorOf:
        shape = tuple(int(tensor.Shape(n)) for n in range(tensor.ShapeLength()))
        buffer = self._model.Buffers(tensor.Buffer())
        held = buffer.DataLength() > 0 or buffer.Size() > 1  # beyond 2 GB a buffer lies behind the flatbuffer
        name = (tensor.Name() or b"").decode(errors="replace")
        return TensorOf(name, TYPES.get(tensor.Type(), "unknown"), shape, int(tensor.Buffer()), held)

    def _operator(self, operator: Any) -> Operator:
        code = self._model.OperatorCodes(operator.OpcodeIndex())
        kind = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
        custom = code.CustomCode()
        name = custom.decode(errors="replace") if custom else OPERATORS.get(kind, str(kind))
        return Operator(
            name,
            tuple(int(operator.Inputs(n)) for n in range(operator.InputsLength())),
            tuple(int(operator.Outputs(n)) for n in range(operator.OutputsLength())),
        )


def _weight_places(op: Operator) -> Sequence[int]:
    places = (0, 1) if op.name == PRODUCT else (WEIGHT[op.name],) if op.name in WEIGHT else ()
    return [place for place in places if place < len(op.inputs) and op.inputs[place] >= 0]


def plain_name(name: str) -> str:
    """`encoder.layer.0.output.dense #2`, of what litert-torch calls a tensor: the classes and names of the modules that
    it comes from, the innermost last, with a number. Others' names stay as they are."""
    number = re.search(r";(\d+)$", name)
    places = [place for place in re.split(r";\d*", name) if "/" in place or MODULE.fullmatch(place)]
    if not places:
        return name
    steps = [MODULE.fullmatch(step) for step in max(places, key=len).split("/")]
    path = ".".join(step.group(1) for step in steps if step is not None)
    path = path.removeprefix("net").removeprefix(".")
    path = path or "network"
    return f"{path} #{number.group(1)}" if number else path


def distinct(names: Sequence[str]) -> tuple[str, ...]:
    """A second one of a name is numbered."""
    seen: dict[str, int] = {}
    found = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return tuple(found)


def skipped(weights: Sequence[Weight], precision: str) -> tuple[str, ...]:
    """Weights that should have a precision, could have it, and have not, each with what it is instead.

    Static int8 means the activations too. Where most operators have them, the few that measure the range of theirs as
    they run were meant to (quantize.py says why); where they are the rule, they are named."""
    if precision == "fp32":
        return ()
    judged = [one for one in weights if one.op not in UNABLE.get(precision, ("GATHER",))]
    if precision == "int8-dynamic" and any(one.tensor.dtype in SMALL for one in judged):
        judged = [one for one in judged if prod(one.tensor.shape) >= LEAST]
    found = {one: why for one in judged if (why := _wrong(one, precision))}
    if precision == "int8":
        products = [one for one in judged if one.op not in TABLES]
        loose = [one for one in products if one.activation not in ("int8", "uint8", "int16")]
        if 2 * len(loose) > len(products):
            found = {**{one: f"activations in {one.activation}" for one in loose}, **found}
    return distinct([f"{one.name}: {one.op} ({why})" for one, why in found.items()])


def _wrong(weight: Weight, precision: str) -> str | None:
    dtype = weight.tensor.dtype
    allowed = ALLOWED[precision]
    if precision == "int4" and weight.op not in INT4:
        allowed = ALLOWED["int8-dynamic"]
    if dtype not in allowed:
        return dtype
    if precision == "int8" and weight.unpacked and weight.op not in TABLES:
        return "computed in float32"
    return None


LEAST: Final = 1024  # numbers; TensorFlow's converter leaves smaller weights of dynamic int8 alone, as it means to
UNABLE: Final[Mapping[str, tuple[str, ...]]] = {"fp16": ("GATHER", "BATCH_MATMUL")}  # no quantizer keeps these so
SMALL: Final = ("int8", "uint8", "int4", "uint4", "int2")
ALLOWED: Final[Mapping[str, tuple[str, ...]]] = {
    "fp16": ("float16", "bfloat16"),
    "int8": SMALL,
    "int8-dynamic": SMALL,
    "int4": ("int4", "uint4", "int2"),
}
INT4: Final = ("FULLY_CONNECTED", "EMBEDDING_LOOKUP")  # for which there are int4 kernels that are worth having
