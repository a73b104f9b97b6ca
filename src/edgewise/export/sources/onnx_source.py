"""ONNX files as sources: looked over, run in onnxruntime as they stand (nothing optimised), and every tensor between.

The first axis of an input is its rows, free or of a fixed number; a file that takes so many at once is run in pieces of
so many, the last filled up with a row that is already there. Other free axes are the user's to say (`--shape`), or what
the arrays of their data have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import onnx
import onnxruntime as ort

from edgewise.errors import EngineError, UnsupportedModel, UsageError
from edgewise.export.sources import data
from edgewise.export.sources.onnx_file import load_float, network_inputs, plain, save, unable
from edgewise.export.sources.pieces import answers, of_one_row, task_of
from edgewise.export.work.job import Array, Begun, Job, Layers, Source, Tensor, read_arrays, write_arrays

if TYPE_CHECKING:
    from edgewise.export.sources.loaded import Loaded

FLOATS: Final = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16)
EIGHT_BITS: Final = (
    onnx.TensorProto.INT8,
    onnx.TensorProto.UINT8,
    onnx.TensorProto.INT4,
    onnx.TensorProto.UINT4,
)


# The steps


def begin(job: Job) -> Begun:
    """See job.py. SourceError for a damaged file, UnsupportedModel for one that onnxruntime cannot run or whose outputs
    have no rows."""
    path, work = Path(job.source.ref), Path(job.work)
    model, half = load_float(path)
    if half:
        path = work / path.name
        _save_widened(model, path)
    inputs = inputs_of(model, job.source, _shown(job))
    preprocessing = dict(job.options.get("preprocessing", {}))
    rows = data.rows(job, inputs, preprocessing)
    rows.write(work)
    session = _session(path, job.threads)
    names = [one.name for one in session.get_outputs()]
    reference = answers(lambda piece: _run(session, piece, None), rows.arrays, _at_once(model) or 0, names)
    write_arrays(work / "reference", {str(n): value for n, value in enumerate(reference)})
    return Begun(
        inputs=inputs,
        outputs=tuple(
            Tensor(name, (1, *value.shape[1:]), str(value.dtype)) for name, value in zip(names, reference, strict=True)
        ),
        rows=len(rows),
        calibration_rows=rows.calibration_rows,
        labelled=rows.labels is not None,
        random=rows.random,
        shared=rows.shared,
        parameters=_parameters(model),
        task=task_of(job.source.task, reference),
        preprocessing=preprocessing,
        notes=_notes(model, half=half),
        hub=str(path),
    )


def _save_widened(model: onnx.ModelProto, path: Path) -> None:
    save(model, path)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as e:  # C++ errors of many kinds
        raise UnsupportedModel(
            f"the half-precision numbers of {path.name} cannot be widened to float32: {plain(e)}",
            hint="give the file in float32",
        ) from e


def layers(job: Job) -> Layers:
    """Every floating tensor that follows from the inputs, in the order of computing, for the rows `job.only`: each
    named by its node."""
    from onnx import inliner

    model = load_float(job.source.ref)[0]
    model = inliner.inline_local_functions(model) if model.functions else model
    names = _between(model)
    del model.graph.value_info[:]
    given = {one.name for one in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in given)
    place = Path(job.work) / "layers.onnx"
    save(model, place)
    session, at_once = _session(place, job.threads), _at_once(model) or 1
    arrays = read_arrays(job.rows, job.inputs)
    found: dict[str, list[Array]] = {name: [] for name in names}
    for row in job.only:
        piece = {name: np.repeat(value[row : row + 1], at_once, 0) for name, value in arrays.items()}
        for name, value in zip(names, _run(session, piece, list(names)), strict=True):
            found[name].append(of_one_row(value, at_once))
    kept = {label: found[name] for name, label in names.items() if found[name][0].dtype.kind == "f"}
    write_arrays(
        Path(job.work) / "layers",
        {str(n): np.concatenate(parts).astype(np.float32) for n, parts in enumerate(kept.values())},
    )
    return Layers(tuple(kept))


def loaded(source: Source) -> Loaded:
    """The file as a torch module, for targets that begin at torch."""
    from edgewise.export.sources.loaded import Loaded
    from edgewise.export.sources.onnx_torch import module_of

    model, _ = load_float(source.ref)
    module = module_of(model)
    return Loaded(module, inputs_of(model, source), module.outputs, source.task)


# Inputs


def inputs_of(
    model: onnx.ModelProto, source: Source, shown: Mapping[str, tuple[int, ...]] | None = None
) -> tuple[Tensor, ...]:
    """In the order of the file. What it leaves free is taken from `source.shapes`, or else from `shown`, the shapes of
    the user's arrays. UsageError for shapes that do not fit, UnsupportedModel for inputs that are no arrays of rows."""
    ports = network_inputs(model)
    strange = set(source.shapes) - {port.name for port in ports}
    if strange:
        raise UsageError(
            f"the file has no input {', '.join(sorted(strange))}",
            hint=f"its inputs are {', '.join(port.name for port in ports)}",
        )
    return tuple(_input(port, source.shapes.get(port.name), (shown or {}).get(port.name)) for port in ports)


def _input(port: onnx.ValueInfoProto, wanted: Sequence[int] | None, shown: Sequence[int] | None) -> Tensor:
    axes = _axes(port)
    if wanted is not None:
        _check_shape(port.name, axes, wanted)
    said = wanted or (shown if shown is not None and len(shown) == len(axes) else None) or axes
    shape = tuple(own if own is not None else other for own, other in zip(axes[1:], said[1:], strict=True))
    return Tensor(port.name, (1, *shape), _dtype(port))


def _axes(port: onnx.ValueInfoProto) -> list[int | None]:
    """Lengths, None for a free one."""
    if port.type.WhichOneof("value") != "tensor_type" or not port.type.tensor_type.HasField("shape"):
        raise UnsupportedModel(
            f"the file takes {port.name!r} as no array of a known number of axes",
            hint="export it with the shapes of its inputs",
        )
    axes = [axis.dim_value if axis.dim_value > 0 else None for axis in port.type.tensor_type.shape.dim]
    if not axes:
        raise UnsupportedModel(
            f"the file takes {port.name!r} as a single number, with no axis for rows",
            hint="make it a constant of the network, or give it a first axis",
        )
    return axes


def _check_shape(name: str, axes: Sequence[int | None], wanted: Sequence[int]) -> None:
    fits = len(axes) == len(wanted) and all(own in (None, axis) for own, axis in zip(axes[1:], wanted[1:], strict=True))
    if not fits:
        own = ",".join("?" if axis is None else str(axis) for axis in axes)
        raise UsageError(
            f"the shape {list(wanted)} is not one of the input {name!r}", hint=f"the file says {own}, ? for any number"
        )


def _dtype(port: onnx.ValueInfoProto) -> str:
    number = port.type.tensor_type.elem_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(number) if number else np.dtype(object)
    if dtype.kind not in "fiub":
        raise UnsupportedModel(
            f"the file takes {port.name!r} as {onnx.TensorProto.DataType.Name(number).lower()}",
            hint="cut the network behind that: inputs are arrays of numbers that numpy has",
        )
    return dtype.name


def _shown(job: Job) -> dict[str, tuple[int, ...]]:
    """The shapes of the arrays in the user's .npz."""
    path = Path(job.data)
    if path.suffix.lower() != ".npz" or not path.is_file():
        return {}
    return {name: value.shape for name, value in data.npz(path).items() if name != data.LABELS}


def _at_once(model: onnx.ModelProto) -> int | None:
    """The fixed number of rows; None if any."""
    numbers = {_axes(port)[0] for port in network_inputs(model)}
    fixed = numbers - {None}
    if len(fixed) > 1:
        raise UnsupportedModel(
            f"the inputs' first axes are {', '.join(str(n) for n in sorted(n for n in fixed if n))}, not of one length",
            hint="the first axis of every input must be its rows",
        )
    return next(iter(fixed), None)


def _notes(model: onnx.ModelProto, *, half: bool) -> tuple[str, ...]:
    found = []
    if half:
        found.append("the file's half-precision numbers were widened: it is converted, and computed here, in float32")
    if (fixed := _at_once(model) or 1) != 1:
        found.append(f"the file takes {fixed} rows at once: targets that take one need it with a free first axis")
    return tuple(found)


def _parameters(model: onnx.ModelProto) -> int:
    """Numbers that are stored, other than single ones, shapes and places; quantized ones too."""
    return sum(
        int(np.prod(one.dims))
        for one in model.graph.initializer
        if (one.data_type in FLOATS and one.dims) or (one.data_type in EIGHT_BITS and len(one.dims) > 1)
    )


# Running


def _options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return options


def _session(path: Path, threads: int) -> Any:
    options = _options(threads)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4  # what fails is raised
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as e:  # its classes share no other than Exception
        raise unable(e, path.name) from e


def _run(session: Any, piece: Mapping[str, Array], names: list[str] | None) -> list[Array]:
    try:
        found: list[Array] = session.run(names, dict(piece))
    except Exception as e:
        shapes = {name: list(value.shape) for name, value in piece.items()}
        raise UsageError(
            f"the source fails on inputs {shapes}: {plain(e)}",
            hint="check the shapes and values of its inputs: --shape NAME=1,3,224,224, --inputs FILE.npz",
        ) from e
    return found


# Between


def _between(model: onnx.ModelProto) -> dict[str, str]:
    """Floating tensors that follow from the inputs, in the order of computing, and what to call each."""
    kinds = _kinds(model)
    reached = {one.name for one in network_inputs(model)}
    found: dict[str, str] = {}
    for node in model.graph.node:
        if not reached & set(node.input):
            continue
        reached.update(name for name in node.output if name)
        floats = [name for name in node.output if name and kinds.get(name, FLOATS[0]) in FLOATS]
        for name in floats:
            label = node.name if node.name and len(floats) == 1 else name
            found[name] = name if label in found.values() else label
    return found


def _kinds(model: onnx.ModelProto) -> dict[str, int]:
    """ONNX's number of the type of each tensor that inference could find out."""
    try:
        graph = onnx.shape_inference.infer_shapes(model).graph
    except Exception as e:  # it was accepted before, by the checker's own inference
        raise EngineError(f"onnx cannot infer the types of the file any more: {plain(e)}") from e
    return {one.name: one.type.tensor_type.elem_type for one in (*graph.value_info, *graph.output)}
