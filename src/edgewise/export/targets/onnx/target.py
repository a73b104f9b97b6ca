"""The ONNX target: one file that onnxruntime runs anywhere, and the hub from which TensorRT and Hexagon begin.

Options: `dynamic`, input name -> axes beyond the first that are free as well; `input_name`, `batch_name`: what to call
the only input and the free first axis; `optimize` (true), whether the proof lets onnxruntime rewrite the graph as it
does for users; `reduce_range` (false), int8 weights of 7 bits, for processors without VNNI, whose kernels saturate: of
EfficientNet-Lite0's top-1 that takes 2 points more. Number types are in typed.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import onnx
import onnxruntime as ort

from edgewise.errors import UnsupportedModel, UsageError
from edgewise.export.sources.onnx_file import load, network_inputs, nodes, plain, save
from edgewise.export.targets.onnx import graph as graphs
from edgewise.export.targets.onnx.mixed import BY_CHOICE, floating_by_choice
from edgewise.export.targets.onnx.products import floating, with_weights
from edgewise.export.targets.onnx.rewrite import check_float, rename, with_matrices_once
from edgewise.export.targets.onnx.typed import MATRICES, typed
from edgewise.export.work.job import Array, Check, Converted, Coverage, Fallback, Job, Layers, Proved, write_arrays

OPSET: Final = 20
LARGEST_BATCH: Final = 1024
AT_ONCE: Final = 8
BATCH_WITHIN: Final = {"fp32": 1e-4, "fp16": 2e-2, "int8": 5e-2, "int8-dynamic": 0.2, "int4": 1e-2}


def convert(job: Job) -> Converted:
    """Write `job.artifact`.onnx: from `job.hub` where that is given, else from torch."""
    work = Path(job.work)
    notes: list[str] = []
    plain = Path(job.hub) if job.hub else _exported(job, work / "float32.onnx", notes)
    model = load(plain)
    if job.precision != "fp32":
        check_float(model)
    checks = graphs.check_conversion(job, plain)
    if job.precision != "fp32":
        model = typed(model, job, work, notes)
    _as_called(model, job.options)
    artifact = Path(f"{job.artifact}.onnx")
    files = save(model, artifact)
    return Converted(str(artifact), files, checks, tuple(notes))


def prove(job: Job) -> Proved:
    """Check the file, run it over all rows, and look at what it is made of."""
    model = load(job.artifact)
    optimize = bool(job.options.get("optimize", True))
    session = graphs.opened(job.artifact, job.threads, optimize=optimize)
    rows = graphs.feeds(session, job, job.rows)
    outputs = graphs.answers(session, rows, AT_ONCE)
    write_arrays(Path(job.work) / "outputs", {str(place): value for place, value in enumerate(outputs)})
    checks = [
        Check("loads", True, "onnx.checker with shapes, onnxruntime"),
        graphs.check_finite(outputs),
        _check_batch(session, rows, job.precision),
    ]
    if job.precision == "int8":
        checks.append(_check_kernels(job, rows, outputs))
    left = _left(model, job.precision)
    chosen = floating_by_choice(model)
    return Proved(
        "executed",
        True,
        f"onnxruntime {ort.__version__}, CPU, {job.threads} threads{'' if optimize else ', graph as it stands'}",
        _coverage(model, left, chosen, job.precision),
        graphs.weight_bytes(model),
        tuple(graphs.label(one) for one in left if _could(one, job.precision) and one.name not in chosen),
        tuple(checks),
        graphs.latencies(session, rows),
    )


def layers(job: Job) -> Layers:
    return graphs.layers(job, job.artifact)


# From torch


def _exported(job: Job, path: Path, notes: list[str]) -> Path:
    import torch

    from edgewise.export.sources import torch_source

    loaded = torch_source.load(job.source, job.inputs)
    _check_dynamic(job)
    axes = [_free_axes(one.name, job.options) for one in job.inputs]
    example = tuple(_example(job, one.name, rows=2) for one in job.inputs)
    try:
        program = _program(loaded.module, example, job, axes)
    except torch.onnx.OnnxExporterError as e:
        if "onstraints violated" not in str(e) and "pecialized" not in str(e):
            raise refused(e, loaded.module, example) from e
        notes.append("its first axis is fixed: the network computes otherwise with another number of rows")
        one_row = tuple(value[:1] for value in example)
        try:
            program = _program(loaded.module, one_row, job, None)
        except torch.onnx.OnnxExporterError as again:
            raise refused(again, loaded.module, one_row) from again
    model = renamed(program.model_proto, [one.name for one in job.inputs], loaded.outputs)
    save(with_matrices_once(_without_traces(model)), path)
    return path


def _without_traces(model: onnx.ModelProto) -> onnx.ModelProto:
    """torch's exporter writes into each node which lines of code it comes from, with their places on this disk."""
    graph = model.graph
    made = [*nodes(graph), *(node for function in model.functions for node in function.node)]
    for one in (model, graph, *made, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del one.metadata_props[:]
        one.ClearField("doc_string")
    return model


def _program(module: Any, example: tuple[Any, ...], job: Job, axes: Sequence[Mapping[int, Any]] | None) -> Any:
    import torch

    with torch.no_grad():
        return torch.onnx.export(
            module,
            example,
            dynamo=True,
            dynamic_shapes=None if axes is None else _dynamic(module, axes),
            opset_version=OPSET,
            verbose=False,
        )


def _dynamic(module: Any, axes: Sequence[Mapping[int, Any]]) -> Any:
    """As torch.export wants them: by the parameters of `forward`, of which one may take all."""
    import inspect

    kinds = [one.kind for one in inspect.signature(module.forward).parameters.values()]
    return (tuple(axes),) if inspect.Parameter.VAR_POSITIONAL in kinds[:1] else tuple(axes)


def _check_dynamic(job: Job) -> None:
    ranks = {one.name: len(one.shape) for one in job.inputs}
    for name, axes in job.options.get("dynamic", {}).items():
        if name not in ranks:
            raise UsageError(f"dynamic names {name!r}, which is no input", hint=f"inputs are {', '.join(ranks)}")
        if strange := [axis for axis in axes if axis >= ranks[name]]:
            raise UsageError(
                f"dynamic names axis {strange[0]} of {name!r}", hint=f"it has the axes 1 to {ranks[name] - 1} to free"
            )


def _free_axes(name: str, options: Mapping[str, Any]) -> dict[int, Any]:
    """The first one, by the name that all inputs share, and what the user wants besides."""
    import torch

    found: dict[int, Any] = {0: torch.export.Dim("batch", min=1, max=LARGEST_BATCH)}
    for axis in options.get("dynamic", {}).get(name, ()):
        found[axis] = torch.export.Dim(f"axis_{axis}", min=1)
    return found


def _example(job: Job, name: str, rows: int) -> Any:
    import numpy as np
    import torch

    from edgewise.export.work.job import read_array

    value = np.resize(read_array(job.rows, name)[:rows], (rows, *read_array(job.rows, name).shape[1:]))
    return torch.from_numpy(np.array(value))


def _as_called(model: onnx.ModelProto, options: Mapping[str, Any]) -> None:
    """The only input, and the first axis of everything, under the user's names."""
    ports = network_inputs(model)
    if (name := options.get("input_name")) is not None:
        if len(ports) != 1:
            called = ", ".join(one.name for one in ports)
            raise UsageError(f"input_name is {name!r}, and the network has {called}", hint="it is for one input")
        renamed(model, [str(name)], [])
    if (axis := options.get("batch_name")) is not None:
        for value in [*model.graph.input, *model.graph.output, *model.graph.value_info]:
            for dim in value.type.tensor_type.shape.dim[:1]:
                if dim.dim_param:
                    dim.dim_param = str(axis)


def renamed(model: onnx.ModelProto, inputs: Sequence[str], outputs: Sequence[str]) -> onnx.ModelProto:
    """With those names for its inputs and outputs. A tensor in the middle that has one of them already, as the exporter
    calls them after operators, gets another."""
    graph = model.graph
    ports = [one.name for one in [*network_inputs(model), *graph.output]]
    wanted = dict(zip(ports, [*inputs, *outputs], strict=False))
    taken = set(graphs.all_names(model)) | set(wanted.values())
    change = {old: new for old, new in wanted.items() if old != new}
    for name in set(change.values()).intersection(graphs.all_names(model)) - set(change):
        free = next(f"{name}_{n}" for n in range(1, len(taken) + 2) if f"{name}_{n}" not in taken)
        change[name] = free
        taken.add(free)
    rename(graph, change)
    for value in [*graph.input, *graph.output, *graph.value_info, *graph.initializer]:
        value.name = change.get(value.name, value.name)
    return model


def refused(error: Exception, module: Any, example: tuple[Any, ...]) -> UnsupportedModel:
    """torch's refusal as ours, with the operator and the line of the user's code that it is about."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    where = _where(text)
    operator = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", text)
    if operator:
        return UnsupportedModel(
            f"ONNX has no operator for {operator[1]}{_where_is(operator[1], module, example)}",
            hint="compute it before or after the network, or with operators that ONNX has",
        )
    if "data-dependent" in text or "GuardOnDataDependent" in text:
        return UnsupportedModel(
            f"what the network computes depends on the numbers in its input{where}",
            hint="write it without `if` on tensors: torch.where, or torch.cond",
        )
    return UnsupportedModel(
        f"torch.onnx cannot export it{where}: {plain(text)}", hint="does `torch.export.export` take it?"
    )


def _where_is(operator: str, module: Any, example: tuple[Any, ...]) -> str:
    """The line of code that calls an operator: the exporter's refusal does not say it, the program does."""
    import torch

    with torch.no_grad():
        program = torch.export.export(module, example).run_decompositions({})
    traces = [node.meta.get("stack_trace") for node in program.graph.nodes if str(node.target).startswith(operator)]
    return next((_where(one) for one in traces if one), "")


def _where(text: str) -> str:
    """The last line of code named that is not torch's own."""
    lines = re.findall(r'File "?([^",\s]+)"?,? (?:line )?:?(\d+),? in (\w+)', text)
    own = [one for one in lines if "site-packages" not in one[0] and "<" not in one[0]]
    return f", at {Path(own[-1][0]).name}:{own[-1][1]} in {own[-1][2]}" if own else ""


# The proof


def _check_batch(session: Any, rows: Mapping[str, Array], precision: str) -> Check:
    alone, together = (graphs.answers(session, rows, at_once, graphs.BATCHES[-1]) for at_once in graphs.BATCHES)
    apart = graphs.difference(together, alone)
    first = session.get_inputs()[0].shape[0]
    if isinstance(first, int):
        return Check("batch", True, f"the file takes {first} rows at once and no other number")
    why = "; int8-dynamic takes its ranges over all rows that run together" if precision == "int8-dynamic" else ""
    return Check("batch", apart.relative <= BATCH_WITHIN[precision], f"batch 7 against batch 1: {apart}{why}")


def _check_kernels(job: Job, rows: Mapping[str, Array], outputs: Sequence[Array]) -> Check:
    """This processor's int8 kernels against what the file says: without VNNI they saturate, and other devices do
    not."""
    session = graphs.opened(job.artifact, job.threads, optimize=False)
    found = graphs.answers(session, rows, AT_ONCE, graphs.LOOKED_AT)
    apart = graphs.difference([one[: graphs.LOOKED_AT] for one in outputs], found)
    ok = apart.relative <= BATCH_WITHIN["int8"]
    hint = "" if ok else "; they saturate here: --option onnx.reduce_range=true, or judge it on the device"
    return Check("kernels", ok, f"int8 kernels of this processor against the graph as it stands: {apart}{hint}")


def _left(model: onnx.ModelProto, precision: str) -> list[onnx.NodeProto]:
    """Nodes with weights of another number type than was asked for."""
    if precision == "fp32":
        return []
    if precision == "fp16":
        stored, made = graphs.constants(model), graphs.makers(model)
        single = onnx.TensorProto.FLOAT
        some = [node for node in with_weights(model) if graphs.weight_of(node, stored, made).data_type == single]
        return [node for node in some if not _blocked(node, made)]
    return floating(model, activations=precision == "int8")


def _blocked(node: onnx.NodeProto, made: Mapping[str, onnx.NodeProto]) -> bool:
    """Whether it stands in float32 between casts, as what was kept from overflowing does."""
    before = made.get(node.input[0])
    return before is not None and before.op_type == "Cast"


def _could(node: onnx.NodeProto, precision: str) -> bool:
    return precision == "fp16" or node.op_type in (("Conv", *MATRICES) if precision == "int8" else MATRICES)


def _coverage(
    model: onnx.ModelProto, left: Sequence[onnx.NodeProto], chosen: Collection[str], precision: str
) -> Coverage:
    nodes = [one for one in model.graph.node if one.op_type not in ("QuantizeLinear", "DequantizeLinear", "Constant")]
    counts = Counter((node.op_type, node.name in chosen) for node in left)
    fallback = tuple(
        Fallback(op, count, BY_CHOICE, None)
        if by_choice
        else Fallback(op, count, f"stays floating in {precision}", _way_out(op, precision))
        for (op, by_choice), count in counts.items()
    )
    return Coverage(len(nodes), len(nodes) - len(left), f"onnxruntime CPU, {precision}", fallback)


def _way_out(op: str, precision: str) -> str | None:
    if op == "Conv" and precision in ("int8-dynamic", "int4"):
        return "onnxruntime has that for matrices alone: use int8"
    if op == "ConvTranspose":
        return "onnxruntime's CPU kernels have it in floating point alone; a Resize and a Conv can be int8"
    return None
