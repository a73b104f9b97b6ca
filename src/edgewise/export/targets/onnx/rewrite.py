"""ONNX graphs written anew: simplified, with one fixed row, with masks that a narrow number type can hold, in order."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from heapq import heappop, heappush
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnx.version_converter
import onnxruntime as ort
from onnx import numpy_helper

from edgewise.errors import UnsupportedModel, UsageError
from edgewise.export.sources.onnx_file import LARGEST, network_inputs, nodes, plain, save, stored_bytes, unable
from edgewise.export.targets.onnx.graph import CPU, WEIGHTY, as_numpy, first_axis, makers, session_options
from edgewise.export.work.job import Tensor

PER_CHANNEL: Final = 13  # the first opset of which that can be said
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
QUANTIZED: Final = (
    *("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "MatMulNBits"),
    *("DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulBnb4", "QGemm", "QAttention", "GatherBlockQuantized"),
)
ADDED: Final = ("Add", "Where")  # how a mask comes to the scores
MASKED: Final = -9000.0  # below that, a number before a softmax is there to make a zero
MASK: Final = -40.0  # makes one too (4e-18), and leaves room for the scores in a range of integers or halves


def inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def check_float(model: onnx.ModelProto) -> None:
    """UsageError for a network that rounds already: by operators for that alone, or as what its products take comes
    from integers. An input of pixels in integers is none."""
    made = makers(model)
    done = Counter(node.op_type for node in nodes(model.graph) if node.op_type in QUANTIZED)
    products = [node for node in model.graph.node if node.op_type in WEIGHTY]
    rounded = [made.get(name) for node in products for name in node.input[:2]]
    done += Counter(node.op_type for node in rounded if node is not None and node.op_type == "DequantizeLinear")
    if done:
        raise UsageError(
            f"the network is quantized already: its products have {', '.join(f'{n} {op}' for op, n in done.items())}",
            hint="give it as it was before that, in float32; a finished file is proved with --check",
        )


def check_size(model: onnx.ModelProto) -> None:
    """UnsupportedModel for a network that cannot be written anew: that goes through one protobuf message."""
    if (size := stored_bytes(model)) >= LARGEST:
        raise UnsupportedModel(
            f"the network takes {size / 1e9:.1f} GB in float32, and ONNX graphs are rewritten up to {LARGEST / 1e9} GB",
            hint="fp32 ONNX it can be, or LiteRT or Core ML; a language model as a bundle: edgewise quantize",
        )


def settled(model: onnx.ModelProto, work: Path, inputs: Sequence[Tensor]) -> onnx.ModelProto:
    """For one row at a time, every shape fixed, and with nothing left to compute that does not depend on the inputs.

    UnsupportedModel if an axis stays free."""
    small = onnx.ModelProto()
    small.CopyFrom(model)
    wanted = {one.name: one.shape for one in inputs}
    for place, value in enumerate(network_inputs(small)):
        shape = wanted.get(value.name, inputs[place].shape if place < len(inputs) else ())
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if not dim.dim_value:
                dim.dim_value = 1 if axis == 0 else (shape[axis] if axis < len(shape) else None) or 0
            if not dim.dim_value:
                raise UnsupportedModel(
                    f"the input {value.name!r} has no fixed length along axis {axis}, and this target needs one",
                    hint=f"say it: --shape {value.name}=1,… with a number for each axis",
                )
    for value in small.graph.output:
        value.type.tensor_type.ClearField("shape")
    del small.graph.value_info[:]
    if first_axis(small) != 1:
        raise UnsupportedModel(
            f"the network takes {first_axis(small)} rows at once, and this target takes one",
            hint="export it with a free first axis, or with one of length 1",
        )
    return folded(small, work)


def folded(model: onnx.ModelProto, work: Path) -> onnx.ModelProto:
    """As onnxruntime simplifies it, with standard operators alone. Errors of the two checks above."""
    check_float(model)
    check_size(model)
    before, after = work / "fold-in.onnx", work / "fold-out.onnx"
    save(model, before)
    options = session_options(1, optimize=True)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(after)
    try:
        # its Gemm between two Reshapes would give layers other names and other shapes than the source has
        ort.InferenceSession(str(before), options, providers=CPU, disabled_optimizers=["MatMulAddFusion"])
    except Exception as e:
        raise unable(e, "the network") from e
    found = onnx.load(after)
    used = {node.domain for node in found.graph.node} | {""}
    kept = [one for one in found.opset_import if one.domain in used]
    del found.opset_import[:]
    found.opset_import.extend(kept)
    return inferred(found)


def modern(model: onnx.ModelProto) -> onnx.ModelProto:
    """In an opset whose QuantizeLinear takes a scale for each channel. UnsupportedModel if it cannot be."""
    opset = max((one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), default=PER_CHANNEL)
    if opset >= PER_CHANNEL:
        return model
    try:
        return onnx.version_converter.convert_version(model, PER_CHANNEL)
    except Exception as e:  # C++ errors of many kinds
        raise UnsupportedModel(
            f"the file is of opset {opset}, int8 needs {PER_CHANNEL}, and onnx cannot convert it: {plain(e)}",
            hint=f"export it again with opset {PER_CHANNEL} or more, or take fp32 or fp16",
        ) from e


def tamed(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which each node has a name of its own, nothing that is stored is an input as well, and masks before a
    softmax are no lower than they must be: the least number of float32, added to scores, leaves no step for these in a
    range of integers, and overflows half precision."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    _name_all(copy)
    inputs = network_inputs(copy)
    del copy.graph.input[:]
    copy.graph.input.extend(inputs)
    copy.ir_version = max(copy.ir_version, 4)  # before, what is stored had to be an input
    stored = {one.name: one for one in copy.graph.initializer}
    for node in _making_masks(copy):
        for place, name in enumerate(node.input):
            if name in stored and (raised := _raised(stored[name])) is not None:
                node.input[place] = raised.name  # others may take the old one
                if raised.name not in stored:
                    stored[raised.name] = raised
                    copy.graph.initializer.append(raised)
    return without_unused(copy)


def _making_masks(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """What makes masks that are added before a softmax, and scores: nodes whose outputs reach nothing else."""
    takers: dict[str, list[onnx.NodeProto]] = {one.name: [] for one in model.graph.output}
    others = set(takers)
    for node in model.graph.node:
        others |= taken(node) - set(node.input)
        for name in node.input:
            takers.setdefault(name, []).append(node)
    found: dict[str, onnx.NodeProto] = {}  # by their outputs
    for node in reversed(model.graph.node):
        name = node.output[0]
        ends = [one.op_type == "Softmax" for one in takers.get(name, [])]
        leads = all(end or one.output[0] in found for end, one in zip(ends, takers.get(name, []), strict=True))
        if node.op_type not in MASKING or not ends or not leads or name in others:
            continue
        if not any(ends) or node.op_type in ADDED:  # a factor right before a softmax is a temperature
            found[name] = node
    return list(found.values())


def _name_all(model: onnx.ModelProto) -> None:
    taken = Counter(node.name for node in model.graph.node)
    for place, node in enumerate(model.graph.node):
        if not node.name or taken[node.name] > 1:
            free = (f"{node.op_type}_{place}{end}" for end in ("", *(f"_{n}" for n in range(len(taken) + 1))))
            node.name = next(one for one in free if one not in taken)
            taken[node.name] += 1


def _raised(one: onnx.TensorProto) -> onnx.TensorProto | None:
    """A constant with what is lower than a mask must be as low as that; None where nothing is."""
    if one.data_type != onnx.TensorProto.FLOAT or not ((value := as_numpy(one)) < MASKED).any():
        return None
    return numpy_helper.from_array(np.where(value < MASKED, np.float32(MASK), value), f"{one.name}_raised")


def ordered(model: onnx.ModelProto) -> onnx.ModelProto:
    """With each node after those that it needs, as the format wants it; else in the order that they have."""
    waiting: dict[str, list[int]] = {}
    made = makers(model)
    nodes = list(model.graph.node)
    needs = [{name for name in taken(node) if name in made} for node in nodes]
    for place, names in enumerate(needs):
        for name in names:
            waiting.setdefault(name, []).append(place)
    ready = [place for place, names in enumerate(needs) if not names]
    order: list[int] = []
    while ready and len(order) <= len(nodes):
        place = heappop(ready)
        order.append(place)
        for name in nodes[place].output:
            for other in waiting.get(name, ()):
                needs[other].discard(name)
                if not needs[other]:
                    heappush(ready, other)
    sorted_nodes = [nodes[place] for place in order]
    assert len(order) == len(nodes), "two nodes make one tensor, or a tensor needs itself"
    del model.graph.node[:]
    model.graph.node.extend(sorted_nodes)
    return model


def taken(node: onnx.NodeProto) -> set[str]:
    """Its inputs, and those of the graphs inside it."""
    inner = [one.g for one in node.attribute if one.type == onnx.AttributeProto.GRAPH]
    return set(node.input).union(*(taken(one) for graph in inner for one in graph.node))


def without_unused(model: onnx.ModelProto) -> onnx.ModelProto:
    """Less what is stored and no node takes, those of graphs inside nodes included."""
    used = {one.name for one in model.graph.output}.union(*map(taken, model.graph.node))
    kept = [one for one in model.graph.initializer if one.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return model


def with_matrices_once(model: onnx.ModelProto) -> onnx.ModelProto:
    """Equal matrices and filters stored once: torch's exporter turns one anew for each layer that has it, and a file of
    ALBERT would hold its one layer twelve times."""
    first: dict[Any, str] = {}
    change = {}
    given = {one.name for one in (*model.graph.input, *model.graph.output)}
    for one in model.graph.initializer:
        if len(one.dims) < 2 or one.name in given:
            continue
        value = (one.data_type, tuple(one.dims), hashlib.sha256(as_numpy(one).tobytes()).digest())
        if (kept := first.setdefault(value, one.name)) != one.name:
            change[one.name] = kept
    rename(model.graph, change)
    return without_unused(model) if change else model


def rename(graph: onnx.GraphProto, change: Mapping[str, str]) -> None:
    """In graphs inside nodes, too: they take tensors from outside."""
    for node in graph.node:
        node.input[:] = [change.get(name, name) for name in node.input]
        node.output[:] = [change.get(name, name) for name in node.output]
        for one in node.attribute:
            if one.type == onnx.AttributeProto.GRAPH:
                rename(one.g, change)
