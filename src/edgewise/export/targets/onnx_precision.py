"""Other number types for ONNX graphs: half precision where it cannot overflow, and int8 as QuantizeLinear and
DequantizeLinear pairs (Q/DQ) whose ranges come from calibration rows."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper
from onnxruntime.quantization import CalibrationMethod
from onnxruntime.quantization.calibrate import TensorData, TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

from edgewise.export.targets.onnx_graph import (
    CPU,
    WEIGHTY,
    as_numpy,
    attribute,
    constants,
    graph_inputs,
    inferred,
    makers,
    pieces,
    save,
    session_options,
    weight_of,
)
from edgewise.export.work.job import Array

Range = tuple[float, float]

SAMPLE: Final = 16384  # numbers of each tensor that its range is chosen by, over all rows
STEPS: Final = 32  # ranges that are tried
NARROWEST: Final = 0.2  # of the whole range
OFF_CENTRE: Final = 0.05  # of a range's width its middle may be away from zero
HALF_MOST: Final = 65504.0
HALF_ROOM: Final = 4.0  # other rows than those for calibration may reach so many times what these do
SUMMING: Final = [  # what adds up or raises numbers on the way, so that its inputs and outputs do not show an overflow
    "InstanceNormalization",
    "LayerNormalization",
    "LogSoftmax",
    "Pow",
    "ReduceL1",
    "ReduceL2",
    "ReduceMean",
    "ReduceSum",
    "ReduceSumSquare",
    "RMSNormalization",
    "Softmax",
]
MASKING: Final = {  # what a mask passes through before it is added to the scores of a softmax
    "Add",
    "Cast",
    "Concat",
    "Expand",
    "Identity",
    "Mul",
    "Reshape",
    "Slice",
    "Squeeze",
    "Sub",
    "Unsqueeze",
    "Where",
}
MASKED: Final = -1000.0  # below that, a number before a softmax is there to make a zero
MASK: Final = -40.0  # makes one too (4e-18), and leaves room for the scores in a range of integers or halves

logging.getLogger().setLevel(logging.ERROR)  # the quantizer warns at the root, of what is meant to be so


@dataclass(frozen=True, slots=True)
class Seen:
    """What a tensor held over the calibration rows: its ends, and some of its numbers."""

    least: float
    most: float
    sample: Array


def observed(
    model: onnx.ModelProto, tensors: Collection[str], rows: Mapping[str, Array], work: Path, threads: int
) -> dict[str, Seen]:
    """Of the floating tensors among those, a row at a time."""
    each = max(1, SAMPLE // len(next(iter(rows.values()))))
    found: dict[str, list[Seen]] = {}

    def look(name: str, value: Array) -> None:
        found.setdefault(name, []).append(_seen(value, each))

    watch(model, tensors, rows, work, threads, look)
    return {name: _together(parts) for name, parts in found.items()}


def watch(
    model: onnx.ModelProto,
    tensors: Collection[str],
    rows: Mapping[str, Array],
    work: Path,
    threads: int,
    look: Callable[[str, Array], None],
) -> None:
    """Shows each of those tensors for each row, if its numbers are floating."""
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    inputs = {one.name for one in graph_inputs(model)}
    given = {one.name for one in wide.graph.output}
    names = [name for name in dict.fromkeys(tensors) if name and name not in inputs]
    wide.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in given)
    save(wide, work / "observed.onnx")
    options = session_options(threads, optimize=False)
    session = ort.InferenceSession(str(work / "observed.onnx"), options, providers=CPU)
    for _, piece in pieces(session, rows, 1):
        values = dict(zip(names, session.run(names, piece), strict=True))
        values |= {name: value for name, value in piece.items() if name in tensors}
        for name, value in values.items():
            if value.dtype.kind == "f" and value.size:
                look(name, value)


def all_tensors(model: onnx.ModelProto) -> list[str]:
    return [name for node in model.graph.node for name in [*node.input, *node.output] if name]


def computed(model: onnx.ModelProto) -> list[str]:
    stored = constants(model)
    return [name for name in all_tensors(model) if name not in stored]


def _seen(value: Array, each: int) -> Seen:
    flat = value.ravel()
    # by chance: a stride that shares a factor with the shape would see the same channels again and again
    places = np.random.default_rng(flat.size).integers(0, flat.size, each) if flat.size > each else slice(None)
    return Seen(float(flat.min()), float(flat.max()), flat[places].astype(np.float32))


def _together(parts: Sequence[Seen]) -> Seen:
    sample = np.concatenate([one.sample for one in parts])
    return Seen(min(one.least for one in parts), max(one.most for one in parts), sample)


# Ranges


def ranges(seen: Mapping[str, Seen], bits: int, *, symmetric: bool, whole: bool) -> dict[str, Range]:
    """Of all tensors: the whole one, or the one in which rounding to so many bits costs the least squared error. In a
    convolution's inputs a few large numbers are not worth coarse steps for all others; in a transformer's they are: the
    cosine of all-MiniLM-L6-v2's embeddings is 0.87 with cut ranges, 0.988 with whole ones. All hold zero."""
    return {name: _fitted(one, bits, symmetric=symmetric, whole=whole) for name, one in seen.items()}


def _fitted(seen: Seen, bits: int, *, symmetric: bool, whole: bool) -> Range:
    low, high = min(seen.least, 0.0), max(seen.most, 0.0)
    if symmetric:
        high = max(high, -low)
        low = -high
    if whole or bits > 8 or high == low:
        return low, high
    best = low, high
    for ends in ((True, True),) if symmetric else ((True, True), (True, False), (False, True)):
        tried = [
            (best[0] * share if ends[0] else best[0], best[1] * share if ends[1] else best[1])
            for share in np.linspace(1, NARROWEST, STEPS)
        ]
        best = min(tried, key=lambda one: _cost(seen.sample, one, bits))
    return best


def _cost(sample: Array, ends: Range, bits: int) -> float:
    step = max(ends[1] - ends[0], 1e-12) / (2**bits - 1)
    near = np.rint(np.clip(sample, *ends) / step) * step
    return float(np.square(near - sample, dtype=np.float64).mean())


# int8


def paired(
    model: onnx.ModelProto,
    ranges: Mapping[str, Range],
    *,
    activations: Any,
    weights: Any,
    ops: Sequence[str],
    leave: Sequence[str] = (),
    reduce_range: bool = False,
    extra: Mapping[str, Any],
) -> onnx.ModelProto:
    """With Q/DQ pairs around the operators `ops`, but for the nodes in `leave`. `activations` and `weights` are
    onnxruntime's QuantType, `extra` the options of its quantizer. Weights have a scale for each channel."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
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
    quantizer.quantize_model()
    return ordered(quantizer.model.model)


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
        taken = middle * _as_int8(as_numpy(stored[node.input[1]]), axis).sum(axis=axis, dtype=np.float64)
        made = f"{node.output[0]}_uncentred"
        _store(copy, f"{made}_by", taken.astype(np.float32))
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
    used = Counter(name for node in model.graph.node for name in node.input)
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


def is_product(node: onnx.NodeProto, stored: Mapping[str, onnx.TensorProto]) -> bool:
    """With a matrix that is stored in the file."""
    if node.op_type not in ("Gemm", "MatMul") or node.input[1] not in stored or len(stored[node.input[1]].dims) != 2:
        return False
    scaled = any(one.name == "alpha" and one.f != 1 for one in node.attribute)
    return not attribute(node, "transA", 0) and not scaled


def _store(model: onnx.ModelProto, name: str, value: Any) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))


def with_weights(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Conv, Gemm and MatMul whose filter or matrix is stored in the file."""
    stored, made = constants(model), makers(model)
    nodes = [node for node in model.graph.node if node.op_type in WEIGHTY]
    return [node for node in nodes if weight_of(node, stored, made) is not None]


def without_weights(model: onnx.ModelProto) -> list[str]:
    """The names of the others: products of two computed tensors, as attention has them."""
    known = {node.name for node in with_weights(model)}
    return [node.name for node in model.graph.node if node.op_type in WEIGHTY and node.name not in known]


def attends(model: onnx.ModelProto) -> bool:
    """Whether it is built like a transformer. Its sums between the layers hold a few numbers hundreds of times as large
    as all others: in 8 bits, nothing is left of these."""
    return bool(without_weights(model)) or any(node.op_type == "LayerNormalization" for node in model.graph.node)


def floating(model: onnx.ModelProto, *, activations: bool = True) -> list[onnx.NodeProto]:
    """Those with weights that compute in floating point: by their weight or, if asked, by what they take."""
    stored, made = constants(model), makers(model)
    found = []
    for node in with_weights(model):
        weight = weight_of(node, stored, made)
        before = made.get(node.input[0])
        rounded = not activations or (before is not None and before.op_type == "DequantizeLinear")
        if weight.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16) or not rounded:
            found.append(node)
    return found


# Half precision


def halved(
    model: onnx.ModelProto, rows: Mapping[str, Array], work: Path, threads: int, *, also: Sequence[str] = ()
) -> tuple[onnx.ModelProto, list[str]]:
    """In float16 between float32 inputs and outputs, and the names of nodes that stay float32 as what they compute may
    not fit: seen on calibration rows, beside those that add up. `also` are more operators that stay."""
    named = tamed(model)
    seen = observed(named, computed(named), rows, work, threads)
    large = {name for name, one in seen.items() if max(-one.least, one.most) * HALF_ROOM > HALF_MOST}
    large |= {name for name, one in constants(named).items() if _too_large(one)}
    blocked = [node.name for node in named.graph.node if large.intersection([*node.input, *node.output])]
    half = convert_float_to_float16(
        named,
        keep_io_types=True,
        op_block_list=[*DEFAULT_OP_BLOCK_LIST, *SUMMING, *also],
        node_block_list=blocked,
    )
    del half.graph.value_info[:]  # of before
    return inferred(ordered(_direct(half))), blocked


def _direct(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without the casts to half and back between two nodes that stay float32: what they are kept for would be lost."""
    made, stored = makers(model), constants(model)
    change = {}
    for node in model.graph.node:
        before = made.get(node.input[0]) if _casts_to(node, onnx.TensorProto.FLOAT) else None
        if before is None or not _casts_to(before, onnx.TensorProto.FLOAT16) or before.input[0] in stored:
            continue
        change[node.output[0]] = before.input[0]
    for node in model.graph.node:
        node.input[:] = [change.get(name, name) for name in node.input]
    wanted = {name for node in model.graph.node for name in node.input} | {one.name for one in model.graph.output}
    kept = [node for node in model.graph.node if node.op_type != "Cast" or wanted.intersection(node.output)]
    wanted = {name for node in kept for name in node.input} | {one.name for one in model.graph.output}
    kept = [node for node in kept if node.op_type != "Cast" or wanted.intersection(node.output)]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return model


def _casts_to(node: onnx.NodeProto, kind: int) -> bool:
    return node.op_type == "Cast" and attribute(node, "to", 0) == kind


def _too_large(one: onnx.TensorProto) -> bool:
    return one.data_type == onnx.TensorProto.FLOAT and bool(np.abs(as_numpy(one)).max(initial=0) > HALF_MOST)


def tamed(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which each node has a name, and masks before a softmax are no lower than they must be: the least number
    of float32, added to scores, leaves no step for these in a range of integers, and overflows half precision."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for place, node in enumerate(copy.graph.node):
        node.name = node.name or f"{node.op_type}_{place}"
    made, stored = makers(copy), {one.name: one for one in copy.graph.initializer}
    todo = [node.input[0] for node in copy.graph.node if node.op_type == "Softmax"]
    seen: set[str] = set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in stored:
            _raise(stored[name])
        elif name in made and made[name].op_type in MASKING:
            todo += made[name].input
    return copy


def _raise(one: onnx.TensorProto) -> None:
    if one.data_type != onnx.TensorProto.FLOAT:
        return
    value = as_numpy(one)
    if (value < MASKED).any():
        one.CopyFrom(numpy_helper.from_array(np.where(value < MASKED, np.float32(MASK), value), one.name))


# Order


def ordered(model: onnx.ModelProto) -> onnx.ModelProto:
    """With each node after those that it needs, as the format wants it; else in the order they have."""
    waiting: dict[str, list[int]] = {}
    made = makers(model)
    nodes = list(model.graph.node)
    needs = [{name for name in _taken(node) if name in made} for node in nodes]
    for place, names in enumerate(needs):
        for name in names:
            waiting.setdefault(name, []).append(place)
    ready = [place for place, names in enumerate(needs) if not names]
    order: list[int] = []
    for place in ready:  # which grows
        order.append(place)
        for name in nodes[place].output:
            for other in waiting.get(name, ()):
                needs[other].discard(name)
                if not needs[other]:
                    ready.append(other)
    sorted_nodes = [nodes[place] for place in order]
    del model.graph.node[:]
    model.graph.node.extend(sorted_nodes)
    return model


def _taken(node: onnx.NodeProto) -> set[str]:
    """Its inputs, and those of the graphs inside it."""
    inner = [one.g for one in node.attribute if one.type == onnx.AttributeProto.GRAPH]
    return set(node.input).union(*(_taken(one) for graph in inner for one in graph.node))
