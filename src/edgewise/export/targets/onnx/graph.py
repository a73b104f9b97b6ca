"""ONNX graphs, as the targets that are made of them need them: looked up, run in onnxruntime, their weights counted by
number type, and with all that is between as outputs."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper

from edgewise.errors import UnsupportedModel
from edgewise.export.sources.onnx_file import load, network_inputs, plain, save, unable
from edgewise.export.work.job import Array, Check, Job, Layers, read_array, write_arrays

CPU: Final = ["CPUExecutionProvider"]
BATCHES: Final = (1, 7)  # both must give the same
LOOKED_AT: Final = 8  # rows, for checks of the way there
TIMED: Final = 20  # single rows
WEIGHTY: Final = ("Conv", "ConvTranspose", "Gemm", "MatMul")  # what int8 is for, with a filter or matrix as input 1
TYPES: Final[dict[int, str]] = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
    onnx.TensorProto.DOUBLE: "float64",
    onnx.TensorProto.INT8: "int8",
    onnx.TensorProto.UINT8: "int8",
    onnx.TensorProto.INT16: "int16",
    onnx.TensorProto.UINT16: "int16",
    onnx.TensorProto.INT4: "int4",
    onnx.TensorProto.UINT4: "int4",
}


def listed(value: Any) -> list[str]:
    """Names as a user gives them: in a list, or with commas."""
    return value.split(",") if isinstance(value, str) else list(value)


# Graphs


def constants(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """All that the file stores, by name."""
    found = {one.name: one for one in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            found.update((node.output[0], one.t) for one in node.attribute if one.name == "value")
    return found


def makers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """The node that computes each tensor."""
    return {name: node for node in model.graph.node for name in node.output if name}


def all_names(model: onnx.ModelProto) -> list[str]:
    nodes = [name for node in model.graph.node for name in [*node.input, *node.output]]
    return [*nodes, *(one.name for one in [*model.graph.input, *model.graph.output, *model.graph.initializer])]


def attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((one.i for one in node.attribute if one.name == name), default)


def first_axis(model: onnx.ModelProto) -> int | None:
    """How many rows the network takes at once; None where any number."""
    shapes = [one.type.tensor_type.shape for one in network_inputs(model)]
    return max((shape.dim[0].dim_value for shape in shapes if shape.dim), default=0) or None


# Running


def session_options(threads: int, *, optimize: bool) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what fails is raised
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def opened(path: str | Path, threads: int, *, optimize: bool = True) -> Any:
    """An onnxruntime session on this processor."""
    try:
        return ort.InferenceSession(str(path), session_options(threads, optimize=optimize), providers=CPU)
    except Exception as e:
        raise unable(e, Path(path).name) from e


def feeds(session: Any, job: Job, directory: str) -> dict[str, Array]:
    """A directory's arrays, as the session names its inputs and of the numbers that it takes."""
    taken = session.get_inputs()
    if len(taken) != len(job.inputs):
        raise UnsupportedModel(
            f"the file takes {len(taken)} inputs ({', '.join(one.name for one in taken)}), "
            f"the source {len(job.inputs)} ({', '.join(one.name for one in job.inputs)})",
            hint="is it the artifact of this source?",
        )
    ours = {one.name for one in job.inputs}
    by_name = all(one.name in ours for one in taken)
    found = {}
    for place, port in enumerate(taken):
        value = read_array(directory, port.name if by_name else job.inputs[place].name)
        _check_fits(port, value)
        found[port.name] = value
    return found


def _check_fits(port: Any, value: Array) -> None:
    axes = [axis if isinstance(axis, int) and axis > 0 else None for axis in port.shape]
    if len(axes) != value.ndim or any(a is not None and a != b for a, b in zip(axes[1:], value.shape[1:], strict=True)):
        raise UnsupportedModel(
            f"the file takes {port.name!r} as {port.shape}, the rows are {list(value.shape)}",
            hint="is it the artifact of this source, and are these its inputs?",
        )


def numpy_type(port: Any) -> np.dtype[Any]:
    """Of an onnxruntime port."""
    name = {"float": "float32", "double": "float64"}.get(kind := port.type[7:-1], kind)
    found: np.dtype[Any] = np.dtype(name)
    return found


def pieces(
    session: Any, rows: Mapping[str, Array], at_once: int, most: int | None = None
) -> Iterator[tuple[int, dict[str, Array]]]:
    """So many rows a time, where the file takes any number, and how many of them count: one that takes a fixed number
    is filled up with the last row."""
    count = len(next(iter(rows.values())))
    count = count if most is None else min(count, most)
    ports = {port.name: port for port in session.get_inputs()}
    fixed = max((port.shape[0] for port in ports.values() if port.shape and isinstance(port.shape[0], int)), default=0)
    size = fixed if fixed > 0 else at_once
    for start in range(0, count, size):
        stop = min(start + size, count)
        places = np.arange(start, start + size if fixed > 0 else stop).clip(max=count - 1)
        yield (
            stop - start,
            {
                name: np.asarray(value[places]).astype(numpy_type(ports[name]), copy=False)
                for name, value in rows.items()
            },
        )


def answers(session: Any, rows: Mapping[str, Array], at_once: int, most: int | None = None) -> list[Array]:
    """The outputs, float32 [rows, …] each."""
    found: list[list[Array]] = []
    for kept, piece in pieces(session, rows, at_once, most):
        found.append([_rows_of(value, piece, kept) for value in _run(session, piece)])
    return [np.concatenate(parts) for parts in zip(*found, strict=True)]


def _run(session: Any, piece: Mapping[str, Array]) -> list[Array]:
    try:
        return cast(list[Array], session.run(None, dict(piece)))
    except Exception as e:
        raise UnsupportedModel(
            f"onnxruntime stopped: {plain(e)}", hint="are its inputs what the network was made for?"
        ) from e


def _rows_of(value: Array, piece: Mapping[str, Array], kept: int) -> Array:
    given = len(next(iter(piece.values())))
    if value.ndim == 0 or len(value) != given:
        raise UnsupportedModel(
            f"the network took {given} rows and gives an output of the shape {list(value.shape)}",
            hint="its outputs need a row for each row of its inputs",
        )
    return value[:kept].astype(np.float32)


def latencies(session: Any, rows: Mapping[str, Array]) -> tuple[float, ...]:
    """Milliseconds of single rows; the first is not counted."""
    taken = []
    for _, piece in pieces(session, rows, 1, TIMED + 1):
        start = time.perf_counter()
        _run(session, piece)
        taken.append((time.perf_counter() - start) * 1000)
    return tuple(taken[1:] or taken)


# Looking at it


@dataclass(frozen=True, slots=True)
class Difference:
    """Of two arrays: the largest, and the L2 norm of all over the second's."""

    largest: float
    relative: float

    def __str__(self) -> str:
        return f"largest difference {self.largest:.2g}, relative {self.relative:.2g}"


def difference(ours: Sequence[Array], theirs: Sequence[Array]) -> Difference:
    largest, relative = 0.0, 0.0
    for one, other in zip(ours, theirs, strict=True):
        a, b = np.asarray(one, np.float64), np.asarray(other, np.float64)
        if a.shape != b.shape:
            return Difference(float("inf"), float("inf"))
        apart, size = float(np.linalg.norm((a - b).ravel())), float(np.linalg.norm(b.ravel()))
        largest = max(largest, float(np.abs(a - b).max(initial=0)))
        relative = max(relative, apart / size if size else float(apart > 0))
        if np.isnan(apart):
            return Difference(float("nan"), float("nan"))
    return Difference(largest, relative)


def check_conversion(job: Job, path: str | Path, within: float = 1e-3) -> tuple[Check, ...]:
    """The float32 form against the source, one row at a time and several, before anything is rounded."""
    if not job.reference or not job.outputs:
        return ()
    expected = [read_array(job.reference, str(place))[:LOOKED_AT] for place in range(len(job.outputs))]
    session = opened(path, job.threads)
    rows = feeds(session, job, job.rows)
    seen, ok = [], True
    for at_once in BATCHES:
        found = answers(session, rows, at_once, LOOKED_AT)
        if len(found) != len(expected):
            return (Check("conversion", False, f"{len(found)} outputs, the source has {len(expected)}"),)
        apart = difference(found, expected)
        ok = ok and apart.relative <= within
        seen.append(f"batch {at_once}: {apart}")
    return (Check("conversion", ok, f"float32 against the source, {len(expected[0])} rows; {'; '.join(seen)}"),)


def check_finite(outputs: Sequence[Array]) -> Check:
    bad = sum(int((~np.isfinite(one)).any(axis=tuple(range(1, one.ndim))).sum()) for one in outputs)
    return Check("finite", bad == 0, f"{bad} rows with an infinity or no number" if bad else "all outputs")


def weight_bytes(model: onnx.ModelProto) -> dict[str, int]:
    """Bytes of weight matrices and filters by number type."""
    found: dict[str, int] = {}
    blocks = _block_bits(model)
    for name, one in constants(model).items():
        if name in blocks:
            found[f"int{blocks[name]}"] = found.get(f"int{blocks[name]}", 0) + int(np.prod(one.dims))
        elif len(one.dims) > 1 and one.data_type in TYPES and int(np.prod(one.dims)) > 1:
            kind = TYPES[one.data_type]
            bits = int(re.sub(r"\D", "", kind))
            found[kind] = found.get(kind, 0) + -(-int(np.prod(one.dims)) * bits // 8)
    return found


def _block_bits(model: onnx.ModelProto) -> dict[str, int]:
    """What MatMulNBits stores, as bytes of so many bits each number."""
    return {node.input[1]: attribute(node, "bits", 4) for node in model.graph.node if node.op_type == "MatMulNBits"}


def weight_of(node: onnx.NodeProto, stored: Mapping[str, onnx.TensorProto], made: Mapping[str, onnx.NodeProto]) -> Any:
    """The stored filter or matrix of a Conv, Gemm or MatMul, seen through what only changes its number type or its
    shape; None if it has none."""
    name = node.input[1] if len(node.input) > 1 else ""
    for _ in range(6):
        if name in stored:
            return stored[name]
        before = made.get(name)
        if before is None or before.op_type not in (
            "DequantizeLinear",
            "QuantizeLinear",
            "Cast",
            "Transpose",
            "Reshape",
        ):
            return None
        name = before.input[0]
    return None


def label(node: onnx.NodeProto) -> str:
    return f"{node.op_type} {node.name or node.output[0]}"


# Layers


def layers(job: Job, path: str | Path) -> Layers:
    """Every floating tensor that a row makes, in the order of computing, for the rows in `job.only`.

    Where a tensor is rounded, what comes out of that stands for it, under its own name."""
    model = load(path)
    work = Path(job.work)
    names = _between(model)
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    given = {one.name for one in wide.graph.output}
    wide.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in given)
    save(wide, work / "layers.onnx")
    session = opened(work / "layers.onnx", job.threads, optimize=False)
    rows = {name: np.asarray(value)[list(job.only)] for name, value in feeds(session, job, job.rows).items()}
    found: dict[str, list[Array]] = {name: [] for name in names}
    for _, piece in pieces(session, rows, 1):
        for name, value in zip(names, session.run(names, piece), strict=True):
            found[name].append(value)
    kept = {name: _stacked(parts) for name, parts in found.items()}
    kept = {name: value for name, value in kept.items() if value is not None}
    write_arrays(work / "layers", {str(place): value for place, value in enumerate(kept.values())})
    return Layers(tuple(_own_name(name) for name in kept))


def _stacked(parts: Sequence[Array]) -> Any:
    """[rows, …] of what each row alone made, if those are numbers and belong to the row."""
    first = parts[0]
    if first.dtype.kind != "f" or first.size < 2:
        return None
    value = np.concatenate(parts) if first.ndim and len(first) == 1 else np.stack(parts)
    return value.astype(np.float32)


def _between(model: onnx.ModelProto) -> list[str]:
    """What depends on an input; where it is rounded, only what comes out."""
    moving = {one.name for one in network_inputs(model)}
    order, rounded = [], set()
    for node in model.graph.node:
        if not any(name in moving for name in node.input):
            continue
        moving.update(node.output)
        if node.op_type == "QuantizeLinear":
            rounded.add(node.input[0])
        else:
            order += [name for name in node.output if name and name not in order]
    return [name for name in order if name not in rounded]


def _own_name(name: str) -> str:
    return re.sub(r"(_DequantizeLinear_Output|_dq_out)(_\d+)?$", "", name)


def as_numpy(tensor: onnx.TensorProto) -> Array:
    return numpy_helper.to_array(tensor)
