"""Half precision for ONNX graphs, where it cannot overflow."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

from edgewise.export.targets.onnx.graph import as_numpy, attribute, constants, makers
from edgewise.export.targets.onnx.observe import computed, observed
from edgewise.export.targets.onnx.rewrite import inferred, ordered, tamed
from edgewise.export.work.job import Array

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


def halved(
    model: onnx.ModelProto, rows: Mapping[str, Array], work: Path, threads: int
) -> tuple[onnx.ModelProto, list[str]]:
    """In float16 between float32 inputs and outputs, and the names of nodes that stay float32 as what they compute may
    not fit: seen on calibration rows, beside those that add up."""
    named = tamed(model)
    seen = observed(named, computed(named), rows, work, threads)
    large = {name for name, one in seen.items() if max(-one.least, one.most) * HALF_ROOM > HALF_MOST}
    large |= {name for name, one in constants(named).items() if _too_large(one)}
    blocked = [node.name for node in named.graph.node if large.intersection([*node.input, *node.output])]
    half = convert_float_to_float16(
        named,
        keep_io_types=True,
        op_block_list=[*DEFAULT_OP_BLOCK_LIST, *SUMMING],
        node_block_list=blocked,
    )
    del half.graph.value_info[:]  # of before
    own = {node.name for node in named.graph.node}
    return inferred(ordered(_direct(half, own))), blocked


def _direct(model: onnx.ModelProto, own: Collection[str]) -> onnx.ModelProto:
    """Without the casts to half and back that were put between two nodes that stay float32: what they are kept for
    would be lost. The network's `own` casts may come from integers, and stay."""
    made, stored = makers(model), constants(model)
    change = {}
    for node in model.graph.node:
        before = made.get(node.input[0]) if _casts_to(node, onnx.TensorProto.FLOAT) else None
        halves = before is not None and _casts_to(before, onnx.TensorProto.FLOAT16) and before.name not in own
        if before is None or not halves or before.input[0] in stored:
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
