"""Qualcomm's Hexagon NPU, by onnxruntime-qnn: a graph in int8 weights and 8- or 16-bit activations, or in half
precision, and for each chip a context binary, which is the graph compiled. Both are made, and the graph is emulated
bit for bit as the NPU computes it, on Linux on x86-64; how long it takes on a device that does not say.

Options: `socs`, names of SOCS (all three by default); `activations`, 8 or 16. By default 8, and 16 for what is built
like a transformer: there, 8 bits leave a cosine of 0.8 of all-MiniLM-L6-v2's embeddings, 16 bits 0.9995.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import platform
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.calibrate import CalibrationDataReader
from onnxruntime.quantization.execution_providers.qnn import get_qnn_qdq_config

from edgewise.errors import EdgewiseError, ExportError, SourceError, UnsupportedModel, UsageError
from edgewise.export.sources.onnx_file import load, plain, save
from edgewise.export.targets.onnx import graph as graphs
from edgewise.export.targets.onnx.int8 import paired, ranges
from edgewise.export.targets.onnx.observe import computed, observed
from edgewise.export.targets.onnx.products import floating, is_transformer
from edgewise.export.targets.onnx.rewrite import settled, tamed
from edgewise.export.targets.onnx.typed import calibration
from edgewise.export.work.job import Array, Check, Converted, Coverage, Fallback, Job, Layers, Proved, write_arrays
from edgewise.export.work.start import end_with

EP: Final = "QNNExecutionProvider"
NPU: Final = "Hexagon HTP"
PIECE: Final = 8  # rows that one process emulates before it takes the next
EMULATED_AS: Final = "sm8650"  # what the NPU computes is the same on all


@dataclass(frozen=True, slots=True)
class Soc:
    """Numbers of QAIRT, and the name that its binaries carry."""

    arch: str
    model: str
    stamp: str
    title: str


SOCS: Final[Mapping[str, Soc]] = {
    "sm8650": Soc("75", "57", "SM8650", "Snapdragon 8 Gen 3"),
    "sm8750": Soc("79", "69", "SM8750", "Snapdragon 8 Elite"),
    "x-elite": Soc("73", "60", "SC8380XP", "Snapdragon X Elite"),
}


def convert(job: Job) -> Converted:
    """Write `job.artifact`.onnx, and .SOC.bin with .SOC.onnx, which opens it, for each chip."""
    _check_host()
    socs = _socs(job.options)
    work = Path(job.work)
    model = prepared(load(job.hub), job, work)
    save(model, work / "float32.onnx")
    checks = graphs.check_conversion(job, work / "float32.onnx")
    notes: list[str] = []
    if job.precision == "int8":
        model = _paired(model, job, work, notes)
    artifact = Path(f"{job.artifact}.onnx")
    files = list(save(model, artifact))
    for name in socs:
        try:
            files += _apart(_compiled, str(artifact), name, str(work))
        except UnsupportedModel as e:
            notes.append(f"no binary for {SOCS[name].title}: {e.message}")
    return Converted(str(artifact), tuple(files), checks, tuple(notes))


def prove(job: Job) -> Proved:
    """Emulate the graph over all rows with nothing allowed to run on the processor, and look at each chip's binary."""
    _check_host()
    model = load(job.artifact)
    with _processes(job.threads) as pool:
        taken, left, reasons = _result(pool.submit(_assigned, job.artifact))
        outputs = [] if left else _emulated(pool, job)
        ops = ", ".join(dict.fromkeys(op for _, op in left))
        said = f"not without the processor, for {ops}" if left else "compiled for the NPU"
        checks = [Check("loads", not left, said)]
        checks += _binaries(pool, job) if not left else []
    if outputs:
        write_arrays(Path(job.work) / "outputs", {str(place): value for place, value in enumerate(outputs)})
        checks.append(graphs.check_finite(outputs))
    return Proved(
        "emulated" if outputs else "unverified",
        bool(outputs),
        f"the x86 emulator of onnxruntime-qnn {_version()}, CPU fallback disabled",
        _coverage(taken, left, reasons),
        graphs.weight_bytes(model),
        tuple(map(graphs.label, floating(model))) if job.precision == "int8" else (),
        tuple(checks),
        notes=_notes(job.precision),
    )


def _notes(precision: str) -> tuple[str, ...]:
    timeless = "emulation takes no time that means anything for a device"
    half = "the graph holds float32, of which the NPU's binaries hold half precision, and compute in it"
    return (timeless, half) if precision == "fp16" else (timeless,)


def layers(job: Job) -> Layers:
    """By the graph in onnxruntime on the processor: the emulator shows no tensor between."""
    return graphs.layers(job, job.artifact)


# The graph


def prepared(model: onnx.ModelProto, job: Job, work: Path) -> onnx.ModelProto:
    """For one row, without free axes, and without what the NPU lacks and others have under another name."""
    found = _plain_gathers(settled(model, work, job.inputs))
    return tamed(_plain_sigmoids(found) if job.precision == "fp16" else found)


def _plain_gathers(model: onnx.ModelProto) -> onnx.ModelProto:
    """GatherND of single numbers at fixed places, as exported masks have it, as a Gather of them all in a row."""
    shapes = _shapes(model)
    stored = graphs.constants(model)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        places = stored.get(node.input[1]) if node.op_type == "GatherND" else None
        shape = shapes.get(node.input[0]) if node.op_type == "GatherND" else None
        plain = places is not None and shape is not None and places.dims[-1] == len(shape)
        if not plain or graphs.attribute(node, "batch_dims", 0):
            nodes.append(node)
            continue
        assert places is not None
        assert shape is not None
        nodes += _gathered(model, node, graphs.as_numpy(places), shape)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def _plain_sigmoids(model: onnx.ModelProto) -> onnx.ModelProto:
    """HardSigmoid as what it is made of. onnxruntime-qnn 2.7 makes one HardSwish of it and the product with its input,
    and in half precision the emulator's is wrong: by 74 % in relative L2 where all else stays below 0.05 %."""
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type != "HardSigmoid":
            nodes.append(node)
            continue
        name = node.name or node.output[0]
        given = {one.name: one.f for one in node.attribute}
        numbers = {"alpha": given.get("alpha", 0.2), "beta": given.get("beta", 0.5), "zero": 0.0, "one": 1.0}
        model.graph.initializer.extend(
            numpy_helper.from_array(np.asarray(value, np.float32), f"{name}_{one}") for one, value in numbers.items()
        )
        steps = [
            ("Mul", [node.input[0], f"{name}_alpha"], f"{name}_scaled"),
            ("Add", [f"{name}_scaled", f"{name}_beta"], f"{name}_moved"),
            ("Clip", [f"{name}_moved", f"{name}_zero", f"{name}_one"], node.output[0]),
        ]
        nodes += [helper.make_node(op, given, [made], f"{name}_{op}") for op, given, made in steps]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def _shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Of tensors whose shape is known and fixed."""
    found = {}
    for value in [*model.graph.input, *model.graph.value_info]:
        shape = tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        if shape and all(shape):
            found[value.name] = shape
    return found


def _gathered(
    model: onnx.ModelProto, node: onnx.NodeProto, places: Array, shape: tuple[int, ...]
) -> list[onnx.NodeProto]:
    positive = places + (places < 0) * np.asarray(shape)
    flat = np.ravel_multi_index(tuple(np.moveaxis(positive, -1, 0)), shape)
    name = node.name or node.output[0]
    made = [(f"{name}_shape", np.asarray(flat.shape, np.int64))]
    found = []
    source = node.input[0]
    if not np.array_equal(flat.ravel(), np.arange(np.prod(shape))):
        made += [(f"{name}_row", np.asarray([-1], np.int64)), (f"{name}_places", flat.ravel().astype(np.int64))]
        found = [
            helper.make_node("Reshape", [source, f"{name}_row"], [f"{name}_flat"], f"{name}_flat"),
            helper.make_node("Gather", [f"{name}_flat", f"{name}_places"], [f"{name}_taken"], f"{name}_taken", axis=0),
        ]
        source = f"{name}_taken"
    model.graph.initializer.extend(numpy_helper.from_array(value, one) for one, value in made)
    return [*found, helper.make_node("Reshape", [source, f"{name}_shape"], [node.output[0]], name)]


class _NoRows(CalibrationDataReader):  # type: ignore[misc]  # the library has no types
    """The ranges are ours."""

    def get_next(self) -> None:
        return None


def _paired(model: onnx.ModelProto, job: Job, work: Path, notes: list[str]) -> onnx.ModelProto:
    bits = job.options.get("activations") or (16 if is_transformer(model) else 8)
    notes.append(f"activations of {bits} bits")
    wide = QuantType.QUInt16 if bits == 16 else QuantType.QUInt8
    seen = observed(model, computed(model), calibration(job, model), work, job.threads)
    config = get_qnn_qdq_config(
        model,
        _NoRows(),
        activation_type=wide,
        weight_type=QuantType.QInt8,
        per_channel=True,
        init_overrides=_overrides(model, wide),
    )
    return paired(
        model,
        ranges(seen, bits, symmetric=False, whole=is_transformer(model)),
        activations=config.activation_type,
        weights=config.weight_type,
        ops=config.op_types_to_quantize,
        extra=config.extra_options,
    )


def _overrides(model: onnx.ModelProto, wide: Any) -> dict[str, list[dict[str, Any]]]:
    """What onnxruntime's own choice for QNN lacks: a scale for each column of a matrix (one for all left a cosine of
    0.964 of all-MiniLM-L6-v2), and a normalisation's weights as unsigned numbers: the NPU refuses signed ones."""
    stored = graphs.constants(model)
    found: dict[str, list[dict[str, Any]]] = {}
    for node in model.graph.node:
        weight = stored.get(node.input[1]) if len(node.input) > 1 else None
        if weight is None:
            continue
        if node.op_type == "MatMul" and len(weight.dims) == 2:
            found[weight.name] = [{"quant_type": QuantType.QInt8, "symmetric": True, "axis": 1}]
        elif node.op_type == "LayerNormalization":
            found[weight.name] = [{"quant_type": wide}]
    return found


# Where it is emulated


def _check_host() -> None:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise ExportError(
            f"Hexagon's compiler and emulator are for Linux on x86-64, and this is {sys.platform} {platform.machine()}",
            hint="export this target on such a machine",
        )


def _socs(options: Mapping[str, Any]) -> list[str]:
    found = graphs.listed(options.get("socs", SOCS))
    for name in found:
        if name not in SOCS:
            raise UsageError(f"there is no chip {name!r}", hint=f"allowed are {', '.join(SOCS)}")
    return found


def _version() -> str:
    from importlib.metadata import version

    return version("onnxruntime-qnn")


@contextlib.contextmanager
def _processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """The emulator computes on one core, and a damaged binary may end its process: so it never runs in this one, which
    forks as long as it has not loaded it."""
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(count, fork, initializer=end_with, initargs=(os.getpid(),)) as pool:
        yield pool


def _result(future: Any) -> Any:
    try:
        return future.result()
    except BrokenProcessPool as e:
        raise ExportError("Hexagon's compiler or emulator crashed", hint="is the file whole? export it again") from e


def _apart(function: Any, *given: Any) -> Any:
    with _processes(1) as pool:
        return _result(pool.submit(function, *given))


def _session(path: str, soc: str, *, fallback: bool, severity: int = 4, extra: Mapping[str, str] | None = None) -> Any:
    import onnxruntime_qnn as qnn

    if EP not in {device.ep_name for device in ort.get_ep_devices()}:
        ort.register_execution_provider_library(qnn.EP_NAME, qnn.get_library_path())
    devices = [device for device in ort.get_ep_devices() if device.ep_name == EP]
    options = ort.SessionOptions()
    options.log_severity_level = severity
    options.intra_op_num_threads = 1
    entries = {"session.record_ep_graph_assignment_info": "1", **(extra or {})}
    if not fallback:
        entries["session.disable_cpu_ep_fallback"] = "1"
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    chip = SOCS[soc]
    backend = {"backend_path": qnn.get_qnn_htp_path(), "htp_arch": chip.arch, "soc_model": chip.model}
    options.add_provider_for_devices(devices[:1], {**backend, "offload_graph_io_quantization": "0"})
    return ort.InferenceSession(path, options)


def _opened(path: str, soc: str, extra: Mapping[str, str] | None = None) -> Any:
    try:
        return _session(path, soc, fallback=False, extra=extra)
    except Exception as e:
        why = plain(e)
        if "fallback" in why:
            raise UnsupportedModel(
                "some of its operators would run on the processor", hint="the coverage names them"
            ) from e
        raise SourceError(f"onnxruntime-qnn cannot load {Path(path).name}: {why}", hint="export it again") from e


def _assigned(path: str) -> tuple[int, list[tuple[str, str]], dict[str, str]]:
    """How many nodes the NPU takes, which the processor (name, operator), and the reasons by operator."""
    session = _session(path, EMULATED_AS, fallback=True)
    taken, left = 0, []
    for part in session.get_provider_graph_assignment_info():
        nodes = [(node.name, node.op_type) for node in part.get_nodes()]
        if part.ep_name == EP:
            taken += len(nodes)
        else:
            left += nodes
    return taken, left, _reasons(path) if left else {}


def _reasons(path: str) -> dict[str, str]:
    """From what it logs."""
    with tempfile.TemporaryFile() as log:
        kept = os.dup(2)
        os.dup2(log.fileno(), 2)
        try:
            with contextlib.suppress(Exception):
                _session(path, EMULATED_AS, fallback=True, severity=0)
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        log.seek(0)
        text = re.sub(r"\x1b\[[0-9;]*m", "", log.read().decode(errors="replace"))
    found: dict[str, str] = {}
    for unit in re.split(r"Validation FAILED", text)[1:]:
        operator = re.search(r"Operator type:\s*(\w+)|OrtNodeUnit \((\w+)\)", unit)
        reason = re.search(r"REASON\s*:\s*([^\n]+)", unit)
        if operator and reason:
            found.setdefault(operator[1] or operator[2], reason[1].strip()[:200])
    return found


def _coverage(taken: int, left: Sequence[tuple[str, str]], reasons: Mapping[str, str]) -> Coverage:
    """What stands between two that fall back, as roundings do, is not named beside them."""
    names: dict[str, list[str]] = {}
    for name, op in left:
        if op not in ("QuantizeLinear", "DequantizeLinear"):
            names.setdefault(op, []).append(name)
    counts = {op: len(some) for op, some in names.items()} or dict(Counter(op for _, op in left))
    found = tuple(
        Fallback(
            op,
            count,
            reasons.get(op, "onnxruntime-qnn does not take it") + f" ({', '.join(names.get(op, [])[:3])})",
            f"replace {op} in the network, or compute it before or after it: an NPU that waits for the processor is "
            "slower than the processor alone",
        )
        for op, count in counts.items()
    )
    return Coverage(taken + len(left), taken, NPU, found)


def _emulated(pool: ProcessPoolExecutor, job: Job) -> list[Array]:
    count = len(np.load(Path(job.rows) / f"{job.inputs[0].name}.npy", mmap_mode="r"))
    parts = [pool.submit(_rows, job, job.artifact, start, start + PIECE) for start in range(0, count, PIECE)]
    return [np.concatenate(values) for values in zip(*map(_result, parts), strict=True)]


_OPEN: dict[str, Any] = {}  # of this process: a session for each file, as compiling takes as long as a row


def _rows(job: Job, path: str, start: int, stop: int, soc: str = EMULATED_AS) -> list[Array]:
    if path not in _OPEN:
        _OPEN[path] = _opened(path, soc)
    session = _OPEN[path]
    rows = {name: value[start:stop] for name, value in graphs.feeds(session, job, job.rows).items()}
    return graphs.answers(session, rows, 1)


# Binaries


def _compiled(artifact: str, name: str, work: str) -> list[str]:
    """The binary for a chip, and the little graph that opens it."""
    stem = Path(artifact).with_suffix("")
    part = Path(work) / f"{name}.onnx"
    context = {
        "ep.context_enable": "1",
        "ep.context_file_path": str(part),
        "ep.context_embed_mode": "0",
    }
    _opened(artifact, name, context)
    model = onnx.load(part)
    binary, opener = Path(f"{stem}.{name}.bin"), Path(f"{stem}.{name}.onnx")
    found = [one for node in model.graph.node for one in node.attribute if one.name == "ep_cache_context"]
    if len(found) != 1:
        raise UnsupportedModel(f"it becomes {len(found)} pieces", hint="the coverage names what splits it")
    (part.parent / found[0].s.decode()).replace(binary)
    found[0].s = binary.name.encode()
    opener.write_bytes(model.SerializeToString())
    return [str(binary), str(opener)]


def _binaries(pool: ProcessPoolExecutor, job: Job) -> list[Check]:
    """Each that lies beside the artifact: whether it is for its chip, loads, and computes what the graph does."""
    stem = Path(job.artifact).with_suffix("")
    found = {name: Path(f"{stem}.{name}.bin") for name in SOCS}
    found = {name: path for name, path in found.items() if path.with_suffix(".onnx").is_file()}
    expected = _result(pool.submit(_rows, job, job.artifact, 0, 1)) if found else []
    return [_binary(pool, job, name, path, expected) for name, path in found.items()]


def _binary(pool: ProcessPoolExecutor, job: Job, name: str, path: Path, expected: Sequence[Array]) -> Check:
    chip = SOCS[name]
    if not path.is_file():
        raise SourceError(f"{path.name} is missing", hint=f"it belongs beside {path.with_suffix('.onnx').name}")
    stamps = {one.decode() for one in re.findall(rb"soc_type=([A-Z0-9]+)", path.read_bytes())}
    try:
        opened = _apart(_rows, job, str(path.with_suffix(".onnx")), 0, 1, name)
    except EdgewiseError as e:
        raise SourceError(f"{path.name} is damaged: {e.message}", hint="copy or export it again") from e
    apart = graphs.difference(opened, expected)
    ok = stamps == {chip.stamp} and apart.relative < 1e-3
    return Check(f"binary {name}", ok, f"for {', '.join(sorted(stamps)) or 'no chip'}; against the graph: {apart}")
