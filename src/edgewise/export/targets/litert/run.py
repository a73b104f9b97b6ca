"""A .tflite file on ai-edge-litert: opened, given rows, watched.

Rows come as the source takes them; a file may want images with their channels last, whole numbers of 32 bits, or
inputs and outputs in int8, and gets them so.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from ai_edge_litert.interpreter import (
    Interpreter,
    OpResolverType,
)

from edgewise.errors import SourceError, UnsupportedModel, UsageError
from edgewise.export.work.job import Tensor

Array = npt.NDArray[Any]

PLAIN: Final = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
MISSING: Final = re.compile(r"Didn't find op for builtin opcode '(\w+)'|unresolved custom op: ([\w:]+)")
MASKING: Final = ("ADD", "SUB", "MUL", "RESHAPE", "TRANSPOSE", "BROADCAST_TO", "SELECT", "SELECT_V2", "CAST", "MAXIMUM")
LAST: Final = (0, 2, 3, 1)  # [rows, channels, height, width] to channels last
FIRST: Final = (0, 3, 1, 2)


@dataclass(frozen=True, slots=True)
class Port:
    """An input or an output of the file. `order` are the axes of the source's tensor in the order of the file's, for an
    input, and the other way round for an output; None if they are the same."""

    name: str
    index: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    scale: float
    zero: int
    order: tuple[int, ...] | None

    def given(self, value: Array) -> Array:
        """What the source takes, as the file takes it."""
        if self.order is not None:
            value = value.transpose(self.order)
        if self.scale and value.dtype.kind == "f":
            held = np.iinfo(self.dtype)
            value = np.clip(np.round(value / self.scale) + self.zero, held.min, held.max)
        return np.ascontiguousarray(value.astype(self.dtype))

    def found(self, value: Array) -> Array:
        """What the file gives, in float32 as the source gives it."""
        real = value.astype(np.float32)
        if self.scale:
            real = (real - self.zero) * np.float32(self.scale)
        return real if self.order is None else real.transpose(self.order)


def relative_l2(expected: Array, found: Array) -> float:
    """Infinite where a number is none."""
    difference = np.asarray(found, np.float64) - np.asarray(expected, np.float64)
    error = float(np.linalg.norm(difference) / (np.linalg.norm(np.asarray(expected, np.float64)) or 1.0))
    return error if np.isfinite(error) else float("inf")


def opened(path: Path, threads: int, **how: Any) -> Any:
    """An interpreter whose tensors are allocated. SourceError for a file that is none or is damaged, UnsupportedModel
    for one with operators that the runtime has not."""
    try:
        interpreter = Interpreter(str(path), num_threads=threads, **how)
        interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as e:
        raise _refused(path, str(e)) from e
    return interpreter


def _refused(path: Path, why: str) -> SourceError | UnsupportedModel:
    missing = MISSING.search(why)
    if missing:
        op = missing.group(1) or missing.group(2)
        return UnsupportedModel(
            f"{path.name} was written, and LiteRT cannot load it: it has no operator {op}",
            hint=INSTEAD.get(op, "compute that part outside of the network, or export to onnx"),
        )
    if "Select TensorFlow op" in why:
        return UnsupportedModel(
            f"{path.name} holds TensorFlow operators that LiteRT's own runtime has not",
            hint="convert it with TFLITE_BUILTINS alone",
        )
    return SourceError(f"{path.name} is no .tflite file, or is damaged: {why.strip()[:300]}", hint="export it again")


INSTEAD: Final = {
    "STABLEHLO_SORT": "topk and sort become an operator that no LiteRT runtime has: let the network give the scores,"
    " and sort them outside of it",
}


class Net:
    """A file ready to run, one row at a time; `inputs` and `outputs` are the source's."""

    def __init__(
        self, path: Path, inputs: Sequence[Tensor], outputs: Sequence[Tensor], threads: int, **how: Any
    ) -> None:
        self.interpreter = opened(path, threads, **how)
        named = _signature(self.interpreter)
        self.inputs = _ports(self.interpreter.get_input_details(), named["inputs"], inputs, LAST)
        self.outputs = _ports(self.interpreter.get_output_details(), named["outputs"], outputs, FIRST)
        self.rows = self.inputs[0].shape[0] if self.inputs and self.inputs[0].shape else 1

    @property
    def free(self) -> bool:
        """Whether the file leaves its first axis free."""
        details = self.interpreter.get_input_details()
        return all(len(one["shape_signature"]) > 0 and one["shape_signature"][0] == -1 for one in details)

    def resize(self, rows: int) -> None:
        for port in self.inputs:
            self.interpreter.resize_tensor_input(port.index, [rows, *port.shape[1:]])
        self.interpreter.allocate_tensors()
        self.rows = rows

    def feed(self, rows: Sequence[Array], at: int) -> list[Array]:
        """The file's inputs from row `at` on, as many as it takes at once; the last row fills up."""
        places = np.arange(at, at + self.rows).clip(max=len(rows[0]) - 1)
        return [port.given(value[places]) for port, value in zip(self.inputs, rows, strict=True)]

    def run(self, feed: Sequence[Array]) -> list[Array]:
        self.compute(feed)
        return [port.found(self.interpreter.get_tensor(port.index)) for port in self.outputs]

    def compute(self, feed: Sequence[Array]) -> None:
        for port, value in zip(self.inputs, feed, strict=True):
            self.interpreter.set_tensor(port.index, value)
        try:
            self.interpreter.invoke()
        except RuntimeError as e:
            raise UnsupportedModel(
                f"LiteRT fails as it computes: {' '.join(str(e).split())[:300]}",
                hint="fix the shapes of its inputs: a shape that depends on values is the usual cause",
            ) from e

    def all(self, rows: Sequence[Array], count: int) -> list[Array]:
        """The outputs of the first `count` rows, float32."""
        parts = [self.run(self.feed(rows, at)) for at in range(0, count, self.rows)]
        return [np.concatenate(values)[:count] for values in zip(*parts, strict=True)]

    def latency_ms(self, rows: Sequence[Array], runs: int) -> tuple[float, ...]:
        """Single runs, each with a row of its own, after one that is not counted."""
        feeds = [self.feed(rows, at % len(rows[0])) for at in range(runs + 1)]
        found = []
        for feed in feeds:
            started = time.perf_counter()
            self.compute(feed)
            found.append((time.perf_counter() - started) * 1e3)
        return tuple(found[1:])


def _signature(interpreter: Any) -> Mapping[str, Mapping[int, str]]:
    """By tensor index, the names that the file gives its inputs and outputs, if it gives any."""
    signatures = interpreter.get_signature_list()
    if not signatures:
        return {"inputs": {}, "outputs": {}}
    runner = interpreter.get_signature_runner(next(iter(signatures)))
    found = {"inputs": runner.get_input_details(), "outputs": runner.get_output_details()}
    return {side: {int(one["index"]): name for name, one in details.items()} for side, details in found.items()}


def _ports(
    details: Sequence[Mapping[str, Any]], named: Mapping[int, str], wanted: Sequence[Tensor], order: tuple[int, ...]
) -> tuple[Port, ...]:
    """In the order of `wanted`: by name where the file has these names, else by place."""
    if len(details) != len(wanted):
        raise UsageError(
            f"the file has {len(details)} of them, the source has {len(wanted)}: {', '.join(x.name for x in wanted)}",
            hint="a file is compared with the network that it was made of",
        )
    by_name = {named.get(int(one["index"]), one["name"]): one for one in details}
    known = set(by_name) == {one.name for one in wanted}
    placed = [by_name[one.name] for one in wanted] if known else details
    return tuple(_port(one, tensor, order) for one, tensor in zip(placed, wanted, strict=True))


def _port(detail: Mapping[str, Any], wanted: Tensor, order: tuple[int, ...]) -> Port:
    shape = tuple(int(axis) for axis in detail["shape"])
    dtype = np.dtype(detail["dtype"])
    scale, zero = detail["quantization"]
    quantized = dtype.kind in "iu" and scale and np.dtype(wanted.dtype).kind == "f"
    return Port(
        name=wanted.name,
        index=int(detail["index"]),
        shape=shape,
        dtype=dtype,
        scale=float(scale) if quantized else 0.0,
        zero=int(zero),
        order=_order(shape, wanted, order),
    )


def _order(shape: tuple[int, ...], wanted: Tensor, order: tuple[int, ...]) -> tuple[int, ...] | None:
    """SourceError for a shape that is the source's in no order."""
    if _fits(shape, wanted.shape):
        return None
    moved = [wanted.shape[n] for n in LAST] if len(wanted.shape) == len(LAST) else []
    if moved and _fits(shape, moved):
        return order
    raise SourceError(
        f"the file's {wanted.name} has the shape {list(shape)}, the source's has {list(wanted.shape)}",
        hint="a file is compared with the network that it was made of",
    )


def _fits(shape: Sequence[int], wanted: Sequence[int | None]) -> bool:
    """The first axis, the rows, may be any."""
    if len(shape) != len(wanted):
        return False
    return all(w is None or s == w for s, w in zip(shape[1:], wanted[1:], strict=True))


class Watched:
    """A file whose every intermediate tensor is kept. It runs without a delegate: one would swallow them."""

    def __init__(self, path: Path, inputs: Sequence[Tensor], outputs: Sequence[Tensor], threads: int) -> None:
        how = {"experimental_preserve_all_tensors": True, "experimental_op_resolver_type": PLAIN}
        self.net = Net(path, inputs, outputs, threads, **how)
        details = {int(one["index"]): one for one in self.net.interpreter.get_tensor_details()}
        made = [int(out) for op in self.net.interpreter._get_ops_details() for out in op["outputs"]]
        self.made = [details[index] for index in made if index in details]
        self.masks = _masks(self.net.interpreter._get_ops_details(), details)

    def seen(self, rows: Sequence[Array], at: int) -> Iterator[tuple[str, Array]]:
        """Each tensor of real numbers, in the order of computing, as float32."""
        self.net.compute(self.net.feed(rows, at))
        for detail in self.made:
            value = _real(detail, self.net.interpreter)
            if value is not None:
                yield detail["name"], value


def _masks(ops: Sequence[Mapping[str, Any]], details: Mapping[int, Mapping[str, Any]]) -> frozenset[str]:
    """Tensors that reach a softmax and nothing else, through operators that work on each number alone or move it."""
    takers: dict[int, list[Mapping[str, Any]]] = {}
    for op in ops:
        for index in op["inputs"]:
            takers.setdefault(int(index), []).append(op)
    found: set[int] = set()
    for op in reversed(ops):
        for index in map(int, op["outputs"]):
            after = takers.get(index, [])
            if after and all(
                one["op_name"] == "SOFTMAX"
                or (one["op_name"] in MASKING and all(int(out) in found for out in one["outputs"]))
                for one in after
            ):
                found.add(index)
    return frozenset(details[index]["name"] for index in found if index in details)


def _real(detail: Mapping[str, Any], interpreter: Any) -> Array | None:
    """None for whole numbers, which are indices or shapes."""
    scales = detail["quantization_parameters"]["scales"]
    if np.dtype(detail["dtype"]).kind != "f" and not len(scales):
        return None
    try:
        value: Array = interpreter.get_tensor(detail["index"])
    except ValueError:  # it was never computed: a constant's copy, a branch not taken
        return None
    if not len(scales):
        return value.astype(np.float32)
    axes = [1] * value.ndim
    if len(scales) > 1:
        axes[detail["quantization_parameters"]["quantized_dimension"]] = len(scales)
    zero = detail["quantization_parameters"]["zero_points"].reshape(axes)
    found: Array = ((value.astype(np.float32) - zero) * scales.reshape(axes)).astype(np.float32)
    return found
