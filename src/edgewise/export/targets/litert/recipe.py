"""What ai-edge-quantizer is told and given: operators by its names, ranges of activations, and where its file goes."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from ai_edge_quantizer import qtyping, quantizer

from edgewise.export.targets.litert.file import File, Operator
from edgewise.export.targets.litert.run import Net
from edgewise.export.work.job import Task, Tensor

Array = npt.NDArray[Any]

ALL: Final = qtyping.TFLOperationName.ALL_SUPPORTED
TABLE: Final = "EMBEDDING_LOOKUP"
STATIC: Final = ("CONV_2D", "DEPTHWISE_CONV_2D", "CONV_2D_TRANSPOSE", "FULLY_CONNECTED")
QUANTIZER_NAME: Final = {"TRANSPOSE_CONV": "CONV_2D_TRANSPOSE"}  # what it calls an operator, where it is not the file's
Ranges = Mapping[str, tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Calibration:
    """Rows as the source takes them, and what the network is for."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    rows: Sequence[Array]
    threads: int
    task: Task


def write(source: Path, output: Path, recipe: Any, ranges: Ranges, calibration: Calibration) -> None:
    """`ranges` of activations, by the file's names of tensors, for recipes that are static."""
    made = quantizer.Quantizer(str(source))
    made.load_quantization_recipe(recipe.get_quantization_recipe())
    with contextlib.redirect_stdout(sys.stderr):  # it prints sizes
        given = _with_ranges(_calibrated(made, source, calibration), ranges) if made.need_calibration else None
        done = made.quantize(given, enable_progress_bar=False, enable_progress_report=False)
        output.unlink(missing_ok=True)
        done.export_model(str(output))


def _calibrated(made: Any, source: Path, calibration: Calibration) -> Mapping[str, Any]:
    """The quantizer's own statistics of one row: which tensors it wants, and in which form."""
    net = Net(source, calibration.inputs, calibration.outputs, calibration.threads)
    signatures = net.interpreter.get_signature_list()
    feed = dict(zip((port.name for port in net.inputs), net.feed(calibration.rows, 0), strict=True))
    found: Mapping[str, Any] = made.calibrate({next(iter(signatures)): [feed]}, num_threads=calibration.threads)
    return found


def _with_ranges(wanted: Mapping[str, Any], ranges: Ranges) -> dict[str, Any]:
    """The quantizer lets the first rows weigh most (a moving average); these are the ranges of all rows."""
    made = dict(wanted)
    for name, value in wanted.items():
        if value and name in ranges:
            low, high = ranges[name]
            made[name] = {"min": np.full_like(value["min"], low), "max": np.full_like(value["max"], high)}
    return made


def with_flat_biases(source: Path) -> Path:
    """litert-torch may leave a bias as [1, n] where it folds constants; ai-edge-quantizer then gives it n scales along
    its first axis, and LiteRT refuses the file. The kernels want [n] and take both."""
    from ai_edge_litert.tools import flatbuffer_utils

    file = File(source)
    biases = {"CONV_2D": 2, "DEPTHWISE_CONV_2D": 2, "FULLY_CONNECTED": 2, "TRANSPOSE_CONV": 3}
    found = {
        op.inputs[biases[op.name]] for op in file.operators if len(op.inputs) > biases.get(op.name, len(op.inputs))
    }
    wrong = [n for n in found if n >= 0 and file.tensors[n].constant and len(file.tensors[n].shape) > 1]
    if not wrong:
        return source
    model = flatbuffer_utils.read_model(str(source))
    for n in wrong:
        tensor = model.subgraphs[0].tensors[n]
        tensor.shape, tensor.shapeSignature = [int(np.prod(tensor.shape))], None
    changed = source.with_name("flat-biases.tflite")
    flatbuffer_utils.write_model(model, str(changed))
    return changed


def scope(file: File, op: Operator) -> str:
    """A pattern that fits this operator alone, as the quantizer names it: by its output."""
    return f"^{re.escape(file.tensors[op.outputs[0]].name)};?$"


def named(op: Operator) -> str:
    return QUANTIZER_NAME.get(op.name, op.name)


def constant(file: File, op: Operator) -> bool:
    return len(op.inputs) > 1 and op.inputs[1] >= 0 and file.tensors[op.inputs[1]].constant


def has(file: File, name: str) -> bool:
    return any(op.name == name for op in file.operators)


def attends(file: File) -> bool:
    """Whether it is a transformer: it has products of two computed tensors."""
    return any(op.name == "BATCH_MATMUL" and not constant(file, op) for op in file.operators)
