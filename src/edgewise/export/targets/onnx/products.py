"""What int8 is for in an ONNX graph: convolutions and matrix products, with what is stored in the file or without."""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from edgewise.export.targets.onnx.graph import WEIGHTY, attribute, constants, makers, weight_of


def is_product(node: onnx.NodeProto, stored: Mapping[str, onnx.TensorProto]) -> bool:
    """With a matrix that is stored in the file."""
    if node.op_type not in ("Gemm", "MatMul") or node.input[1] not in stored or len(stored[node.input[1]].dims) != 2:
        return False
    scaled = any(one.name == "alpha" and one.f != 1 for one in node.attribute)
    return not attribute(node, "transA", 0) and not scaled


def with_weights(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Conv, Gemm and MatMul whose filter or matrix is stored in the file."""
    stored, made = constants(model), makers(model)
    nodes = [node for node in model.graph.node if node.op_type in WEIGHTY]
    return [node for node in nodes if weight_of(node, stored, made) is not None]


def without_weights(model: onnx.ModelProto) -> list[str]:
    """The names of the others: products of two computed tensors, as attention has them."""
    known = {node.name for node in with_weights(model)}
    return [node.name for node in model.graph.node if node.op_type in WEIGHTY and node.name not in known]


def is_transformer(model: onnx.ModelProto) -> bool:
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
