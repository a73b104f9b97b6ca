"""The ONNX target's number types beside float32.

int8 rounds activations to uint8 and weights to int8 per channel. In a transformer only what goes into products with
stored matrices is rounded: the sums between its layers hold a few numbers far larger than all others. There, channels
are made alike before (smooth.py), and where the outputs would move too far, the products that cost most stay floating
(mixed.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from onnxruntime.quantization.onnx_model import ONNXModel

from edgewise.export.sources.onnx_file import network_inputs, save
from edgewise.export.targets.onnx import graph as graphs
from edgewise.export.targets.onnx.half import halved
from edgewise.export.targets.onnx.int8 import paired, quiet, ranges, with_small_tables
from edgewise.export.targets.onnx.mixed import mixed
from edgewise.export.targets.onnx.observe import computed, observed
from edgewise.export.targets.onnx.products import is_transformer, with_weights, without_weights
from edgewise.export.targets.onnx.rewrite import check_size, folded, modern, tamed
from edgewise.export.targets.onnx.smooth import smoothed
from edgewise.export.work.job import Array, Job, read_array

BLOCK: Final = 32  # int4 numbers that share a scale
MATRICES: Final = ["MatMul", "Gemm"]
INT8_OPS: Final = (  # that onnxruntime has int8 kernels for on processors, and what passes int8 through
    "Add",
    "AveragePool",
    "Clip",
    "Concat",
    "Conv",
    "Flatten",
    "Gemm",
    "GlobalAveragePool",
    "LeakyRelu",
    "MatMul",
    "MaxPool",
    "Mul",
    "Pad",
    "Relu",
    "Reshape",
    "Resize",
    "Sigmoid",
    "Transpose",
)


def typed(model: onnx.ModelProto, job: Job, work: Path, notes: list[str]) -> onnx.ModelProto:
    """In `job.precision`, which is not fp32; what was done is added to `notes`."""
    check_size(model)
    if job.precision == "int4":
        return _int4(model)
    rows = calibration(job, model)
    if job.precision == "int8-dynamic":
        return _dynamic_int8(tamed(modern(model)), rows, job, work, notes)
    if job.precision == "fp16":
        half, kept = halved(model, rows, work, job.threads)
        if kept:
            notes.append(f"{len(kept)} nodes stay float32, as half precision may not hold what they compute")
        return half
    return _int8(tamed(folded(modern(model), work)), rows, job, work, notes)


def calibration(job: Job, model: onnx.ModelProto) -> dict[str, Array]:
    """Calibration rows by the names of a network's inputs."""
    names = [one.name for one in network_inputs(model)]
    ours = [one.name for one in job.inputs]
    by_name = set(names) == set(ours)
    directory = job.calibration or job.rows
    return {name: read_array(directory, name if by_name else other) for name, other in zip(names, ours, strict=True)}


def _int8(model: onnx.ModelProto, rows: Mapping[str, Array], job: Job, work: Path, notes: list[str]) -> onnx.ModelProto:
    attends = is_transformer(model)
    model = smoothed(model, rows, work, job.threads) if attends else model
    seen = observed(model, computed(model), rows, work, job.threads)
    has = {node.op_type for node in model.graph.node}
    ops = [op for op in INT8_OPS if op in (graphs.WEIGHTY if attends else has)]
    ends = ranges(seen, 8, symmetric=False, whole=attends)

    def pair(floating: Sequence[str]) -> onnx.ModelProto:
        made = paired(
            model,
            ends,
            activations=QuantType.QUInt8,
            weights=QuantType.QInt8,
            ops=list(ops),
            leave=[*without_weights(model), *floating],
            apart=attends or bool(floating),
            reduce_range=bool(job.options.get("reduce_range", False)),
            extra={
                "WeightSymmetric": True,
                "OpTypesToExcludeOutputQuantization": list(graphs.WEIGHTY) if attends else [],
                "QuantizeBias": not attends,
            },
        )
        return with_small_tables(made)

    products = [node.name for node in with_weights(model) if node.op_type in ops]
    found, said = mixed(model, products, pair, rows, job, work)
    notes += said
    return found


def _dynamic_int8(
    model: onnx.ModelProto, rows: Mapping[str, Array], job: Job, work: Path, notes: list[str]
) -> onnx.ModelProto:
    """Matrices alone: with ranges of the moment, onnxruntime has convolutions with one scale for all channels only."""
    whole = ONNXModel(model)
    whole.replace_gemm_with_matmul()  # as the quantizer would, under names that are not known before
    model = tamed(whole.model)
    model = smoothed(model, rows, work, job.threads) if is_transformer(model) else model
    save(model, work / "float.onnx")

    def pair(floating: Sequence[str]) -> onnx.ModelProto:
        with quiet():
            quantize_dynamic(
                work / "float.onnx",
                work / "dynamic.onnx",
                per_channel=True,
                weight_type=QuantType.QInt8,
                op_types_to_quantize=MATRICES,
                nodes_to_exclude=list(floating),
                reduce_range=bool(job.options.get("reduce_range", False)),
            )
        return with_small_tables(onnx.load(work / "dynamic.onnx"))

    products = [node.name for node in with_weights(model) if node.op_type in MATRICES]
    found, said = mixed(model, products, pair, rows, job, work)
    notes += said
    return found


def _int4(model: onnx.ModelProto) -> onnx.ModelProto:
    whole = ONNXModel(model)
    whole.replace_gemm_with_matmul()
    quantizer = MatMulNBitsQuantizer(
        whole.model, bits=4, block_size=BLOCK, is_symmetric=True, op_types_to_quantize=("MatMul",)
    )
    quantizer.process()
    found: onnx.ModelProto = quantizer.model.model
    return found
