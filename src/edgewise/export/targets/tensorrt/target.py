"""TensorRT: a graph that says the number type of each tensor itself ("strongly typed"), an engine of TensorRT-RTX for
desktop GPUs, built ahead of time on a machine without one, and a script that builds an engine of the same graph with
TensorRT 10, as on Jetson, for which TensorRT-RTX is not made.

An engine runs on a GPU alone. Without one, the proof is that it was built, what the builder says each of its layers
computes in, and what the graph gives in onnxruntime: never the engine's own numbers.

Options: `compute`, the GPUs' compute capabilities (SM86, SM89); `batches`, least, best and largest number of rows (1,
1, 8). int8 rounds the inputs and weights of convolutions and products with stored matrices, symmetrically, and no
bias; those that cost most stay floating (../mixed.py)."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import onnx
import onnxruntime as ort
import tensorrt_rtx_bindings as trt

from edgewise.errors import ExportError, SourceError, UnsupportedModel, UsageError
from edgewise.export.sources.onnx_file import load, network_inputs, plain, save
from edgewise.export.targets.onnx import graph as graphs
from edgewise.export.targets.onnx.half import halved
from edgewise.export.targets.onnx.int8 import centred, paired, ranges
from edgewise.export.targets.onnx.mixed import BY_CHOICE, floating_by_choice, mixed
from edgewise.export.targets.onnx.observe import observed
from edgewise.export.targets.onnx.products import is_transformer, with_weights, without_weights
from edgewise.export.targets.onnx.rewrite import folded, modern, settled, tamed
from edgewise.export.targets.onnx.smooth import smoothed
from edgewise.export.targets.onnx.typed import calibration
from edgewise.export.targets.tensorrt import gpu
from edgewise.export.work.job import (
    Array,
    Check,
    Converted,
    Coverage,
    Fallback,
    Job,
    Layers,
    Level,
    Proved,
    write_arrays,
)

COMPUTE: Final = ("SM86", "SM89")
BATCHES: Final = (1, 1, 8)
NO_WORDS: Final = "its parser does not know it"
MAGIC: Final = b"vtrt"
LENGTH_AT: Final = 16  # in an engine: its own length, 8 bytes
GPU: Final = "TensorRT"
AT_ONCE: Final = 8
INT8_OPS: Final = (
    "Conv",
    "Gemm",
    "MatMul",
)  # TensorRT-RTX computes a ConvTranspose in floating point, whatever it takes


class Log(trt.ILogger):  # type: ignore[misc]  # a C++ class
    """Keeps what the builder says: its errors are nowhere else, and neither is what became of each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []
        self.layers = ""

    def log(self, severity: Any, message: str) -> None:
        if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
            self.errors.append(message)
        elif "LayerType" in message:
            self.layers = message


def convert(job: Job) -> Converted:
    """Write `job.artifact`.engine, and beside it .onnx, .layers.json, .engine.json and .trtexec.sh."""
    work = Path(job.work)
    compute, batches = _compute(job.options), list(job.options.get("batches", BATCHES))
    model, notes = _parsable(job, work)
    save(model, work / "float32.onnx")
    checks = graphs.check_conversion(job, work / "float32.onnx")
    graph = Path(f"{job.artifact}.onnx")
    files = list(save(_typed(model, job, work, notes), graph))
    log = Log()
    engine = Path(f"{job.artifact}.engine")
    engine.write_bytes(_built(graph, job, compute, batches, log))
    beside = {
        f"{job.artifact}.layers.json": json.dumps(engine_layers(log.layers), indent=1),
        f"{engine}.json": json.dumps(_card(engine, graph, job, compute, batches), indent=1),
        f"{job.artifact}.trtexec.sh": script(graph, job, batches),
    }
    for name, text in beside.items():
        Path(name).write_text(text + "\n", encoding="utf-8")
    Path(f"{job.artifact}.trtexec.sh").chmod(0o755)
    return Converted(str(engine), (str(engine), *files, *beside), checks, tuple(notes))


def prove(job: Job) -> Proved:
    """Look at the engine's bytes and at what its layers compute in, and run its graph in onnxruntime."""
    engine = Path(job.artifact)
    stem = engine.with_suffix("")
    checks = [_check_engine(engine, Path(f"{stem}.onnx"))]
    model = load(f"{stem}.onnx")
    run = _run(job, engine, f"{stem}.onnx")
    outputs = run.outputs
    write_arrays(Path(job.work) / "outputs", {str(place): value for place, value in enumerate(outputs)})
    checks.append(graphs.check_finite(outputs))
    skipped: tuple[str, ...] = ()
    notes = [*run.notes, f"{stem.name}.trtexec.sh builds an engine on a Jetson: it was not run"]
    if job.precision == "int8":
        chosen = floating_by_choice(model)
        weighty = [node for node in _rounded(model) if node.name not in chosen]
        real = _int8_layers(Path(f"{stem}.layers.json"))
        skipped = tuple(graphs.label(node) for node in weighty if node.name not in real)
        done = len(weighty) - len(skipped)
        detail = f"{done} of {len(weighty)} convolutions and products take int8, says the builder of each layer"
        checks.append(Check("engine precision", not skipped, detail))
        if chosen:
            notes.append(f"{len(chosen)} more: each {BY_CHOICE}")
        if floating := sum(node.op_type not in INT8_OPS for node in with_weights(model)):
            notes.append(
                f"{floating} transposed convolutions compute in floating point: TensorRT-RTX has no int8 for them"
            )
    return Proved(
        run.level,
        True,
        run.by,
        _coverage(f"{stem}.onnx", model),
        graphs.weight_bytes(model),
        skipped,
        tuple(checks),
        run.latency_ms,
        tuple(notes),
    )


@dataclass(frozen=True, slots=True)
class _Run:
    level: Level
    by: str
    outputs: list[Array]
    latency_ms: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()


def _run(job: Job, engine: Path, graph: str) -> _Run:
    """The engine on a GPU, where there is one that takes it, else its graph."""
    session = graphs.opened(graph, job.threads)
    rows = graphs.feeds(session, job, job.rows)
    notes: tuple[str, ...] = ()
    if (device := gpu.gpu()) is not None:
        try:
            count = len(session.get_outputs())
            outputs, taken = gpu.executed(device, engine.read_bytes(), Log(), rows, count)
            return _Run("executed", f"TensorRT-RTX {trt.__version__} on {device.name}", outputs, taken)
        except Exception as e:  # a way that was never tried must not cost what is known without it
            notes = (f"the engine was not run on {device.name}: {plain(e)}",)
    by = f"the typed graph in onnxruntime {ort.__version__} on the processor, not the engine, which needs a GPU"
    return _Run("built", by, graphs.answers(session, rows, AT_ONCE), (), notes)


def layers(job: Job) -> Layers:
    """Of the typed graph."""
    return graphs.layers(job, Path(job.artifact).with_suffix(".onnx"))


# The graph


def _parsable(job: Job, work: Path) -> tuple[onnx.ModelProto, list[str]]:
    """The hub with its free first axis if TensorRT takes that, else for one row. UnsupportedModel if neither."""
    hub = load(job.hub)
    hub = modern(hub) if job.precision == "int8" else hub
    model = folded(hub, work)
    save(model, work / "parse.onnx")
    if not (refused := _unsupported(work / "parse.onnx")):
        return tamed(model), []
    if graphs.first_axis(model) is None:
        model = settled(hub, work, job.inputs)
        save(model, work / "parse.onnx")
        if not _unsupported(work / "parse.onnx"):
            return tamed(model), [f"for one row at a time: with a free first axis, it has no {refused[0].op}"]
    found = "; ".join(f"{one.op}: {one.why}" for one in refused[:3])
    raise UnsupportedModel(
        f"TensorRT cannot take {found}", hint="replace that in the network, or compute it before or after it"
    )


def _typed(model: onnx.ModelProto, job: Job, work: Path, notes: list[str]) -> onnx.ModelProto:
    if job.precision == "fp32":
        return model
    rows = calibration(job, model)
    if job.precision == "fp16":
        half, kept = halved(model, rows, work, job.threads)
        if kept:
            notes.append(f"{len(kept)} nodes stay float32, as half precision may not hold what they compute")
        return half
    if job.precision != "int8":
        raise UsageError(f"TensorRT has no {job.precision} here", hint="ask for fp32, fp16 or int8")
    from onnxruntime.quantization import QuantType

    attends = is_transformer(model)
    model = smoothed(model, rows, work, job.threads) if attends else model
    weighty = _rounded(model)
    seen = observed(model, [node.input[0] for node in weighty], rows, work, job.threads)

    def pair(floating: Sequence[str]) -> onnx.ModelProto:
        whole, moved = centred(model, seen, floating) if attends else (model, {})
        return paired(
            whole,
            ranges(seen, 8, symmetric=True, whole=attends) | moved,
            activations=QuantType.QInt8,
            weights=QuantType.QInt8,
            ops=INT8_OPS,
            leave=[*without_weights(model), *floating],
            apart=True,
            extra={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "QuantizeBias": False,  # TensorRT refuses int32
                "OpTypesToExcludeOutputQuantization": list(INT8_OPS),  # what follows wants to be exact
            },
        )

    found, said = mixed(model, [node.name for node in weighty], pair, rows, job, work)
    notes += said
    return found


def _rounded(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Those that int8 is for."""
    return [node for node in with_weights(model) if node.op_type in INT8_OPS]


def _unsupported(graph: str | Path) -> list[Fallback]:
    """What the parser does not take, by operator."""
    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)  # the parser does not keep it
    parser = trt.OnnxParser(network, log)
    if parser.supports_model_v2(Path(graph).read_bytes()):
        return []
    found: dict[str, list[str]] = {}
    reasons: dict[str, str] = {}
    for place in range(parser.num_errors):
        error = parser.get_error(place)
        op = error.node_operator() or "graph"
        found.setdefault(op, []).append(error.node_name())
        why = plain(error.desc(), 160)
        reasons.setdefault(op, NO_WORDS if why == "false" else why)  # a bare assertion of its parser
    return [
        Fallback(op, len(names), _with_names(reasons[op], names), f"replace {op} in the network")
        for op, names in found.items()
    ]


def _with_names(why: str, names: Sequence[str]) -> str:
    known = [name for name in names if name]
    return f"{why} ({', '.join(known[:3])})" if known else why


def _coverage(path: str, model: onnx.ModelProto) -> Coverage:
    nodes = len(model.graph.node)
    refused = tuple(_unsupported(path))
    return Coverage(nodes, nodes - sum(one.count for one in refused), GPU, refused)


# The engine


def _built(graph: Path, job: Job, compute: Sequence[str], batches: Sequence[int], log: Log) -> bytes:
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        raise UnsupportedModel(
            f"TensorRT cannot read the typed graph: {plain(parser.get_error(0).desc())}",
            hint="ask for fp32 or fp16",
        )
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = len(compute)
    for place, name in enumerate(compute):
        config.set_compute_capability(getattr(trt.ComputeCapability, name), place)
    _add_profile(builder, network, config, batches)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        errors = [one for one in log.errors if "cudaError" not in one] or log.errors or ["it says nothing"]
        raise ExportError(
            f"TensorRT-RTX cannot build the engine: {plain(errors[0])}",
            hint=f"another precision, or fewer GPUs than {', '.join(compute)}: --option tensorrt.compute",
        )
    return bytes(engine)


def _add_profile(builder: Any, network: Any, config: Any, batches: Sequence[int]) -> None:
    free = [network.get_input(place) for place in range(network.num_inputs)]
    free = [one for one in free if -1 in tuple(one.shape)]
    if not free:
        return
    profile = builder.create_optimization_profile()
    for one in free:
        axes = tuple(one.shape)
        if -1 in axes[1:]:
            raise UnsupportedModel(
                f"the input {one.name!r} is free along an axis beyond the first: {axes}",
                hint="leave `dynamic` out for this target",
            )
        profile.set_shape(one.name, *((rows, *axes[1:]) for rows in batches))
    config.add_optimization_profile(profile)


def engine_layers(text: str) -> list[dict[str, Any]]:
    """Of the builder's own list: each layer's name and kind, the number types that it takes and gives, and the nodes of
    the graph that it is made of."""
    found = []
    for line in text.splitlines():
        head = re.search(r"Name: (.+?), LayerType: (\w+)", line)
        if head is None:
            continue
        takes, gives = (_types(line, part) for part in ("Inputs", "Outputs"))
        nodes = re.findall(r"\[ONNX Layer: ([^\]]+)\]", line)
        found.append({"name": head[1], "kind": head[2], "takes": takes, "gives": gives, "nodes": nodes})
    return found


def _types(line: str, part: str) -> list[str]:
    """After `Inputs: [` up to the bracket that closes it."""
    start = line.find(f"{part}: [")
    if start < 0:
        return []
    depth, stop = 0, start + len(part) + 2
    for place in range(stop, len(line)):
        stop = place
        depth += {"[": 1, "]": -1}.get(line[stop], 0)
        if depth == 0:
            break
    return re.findall(r"Datatype: (\w+)", line[start:stop])


def _int8_layers(path: Path) -> set[str]:
    """Nodes of the graph that a layer computes from int8; a layer of kind kgen only moves and rounds, unless a node
    has no other."""
    try:
        listed = json.loads(path.read_bytes())
        by_node: dict[str, list[dict[str, Any]]] = {}
        for layer in listed:
            for node in layer["nodes"]:
                by_node.setdefault(node, []).append(layer)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise SourceError(
            f"{path.name} is missing or damaged: {e}", hint="export again; it is written as the engine is built"
        ) from e
    return {
        node
        for node, some in by_node.items()
        if any("Int8" in one["takes"] for one in [x for x in some if x["kind"] != "kgen"] or some)
    }


# What lies beside it


def _card(engine: Path, graph: Path, job: Job, compute: Sequence[str], batches: Sequence[int]) -> dict[str, Any]:
    return {
        "engine_bytes": engine.stat().st_size,
        "engine_sha256": _sha256(engine),
        "graph_sha256": _sha256(graph),
        "precision": job.precision,
        "compute": list(compute),
        "batches": list(batches),
        "tensorrt_rtx": trt.__version__,
    }


def _check_engine(engine: Path, graph: Path) -> Check:
    """Its bytes against its own head and against what was written beside it. A GPU alone can load it."""
    try:
        head = engine.open("rb").read(64)
        size = engine.stat().st_size
    except OSError as e:
        raise SourceError(f"{engine.name} cannot be read: {e}", hint="give the path of an .engine file") from e
    said = int.from_bytes(head[LENGTH_AT : LENGTH_AT + 8], "little")
    if head[:4] != MAGIC or said != size:
        seen = f"{size} bytes, and its head says {said}" if head[:4] == MAGIC else "its head is another"
        raise SourceError(f"{engine.name} is no whole engine of TensorRT-RTX: {seen}", hint="copy or build it again")
    try:
        card = json.loads(Path(f"{engine}.json").read_bytes())
        pairs = ((engine, card["engine_sha256"]), (graph, card["graph_sha256"]))
        changed = [one.name for one, hash_ in pairs if _sha256(one) != hash_]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise SourceError(
            f"what belongs to {engine.name} is missing or damaged: {e}", hint="keep its files together, or export again"
        ) from e
    if changed:
        raise SourceError(f"{changed[0]} is not what was written", hint="copy it again, or export again")
    return Check("engine", True, f"whole, for {', '.join(card['compute'])}; a GPU alone can load it")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def script(graph: Path, job: Job, batches: Sequence[int]) -> str:
    """For TensorRT 10's trtexec."""
    model = load(graph)
    shapes = []
    if graphs.first_axis(model) is None:
        for flag, rows in zip(("min", "opt", "max"), batches, strict=True):
            each = [f"{one.name}:{'x'.join(map(str, _shape(one, rows)))}" for one in network_inputs(model)]
            shapes.append(f"--{flag}Shapes={','.join(each)}")
    lines = ['--onnx="$here"/' + shlex.quote(graph.name), "--stronglyTyped", '--saveEngine="$engine"']
    flags = " \\\n  ".join([*lines, *map(shlex.quote, shapes), '"$@"'])
    return f"""#!/bin/sh
# Builds an engine of {" ".join(graph.name.split())} with TensorRT 10 where it will run: a Jetson (JetPack 6.2 on).
# Neither this script nor what it builds was tried where it was written. More flags for trtexec may follow.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
engine="${{ENGINE:-$here/{_in_quotes(Path(job.artifact).name)}.trt10.engine}}"
trtexec=$(command -v trtexec || echo /usr/src/tensorrt/bin/trtexec)
"$trtexec" \\
  {flags}
echo "built $engine; compare its numbers with those of the graph before you use it\""""


def _in_quotes(name: str) -> str:
    return re.sub(r'([\\"$`])', r"\\\1", name)


def _shape(value: onnx.ValueInfoProto, rows: int) -> list[int]:
    return [rows, *(dim.dim_value for dim in value.type.tensor_type.shape.dim[1:])]


# Options


def _compute(options: Mapping[str, Any]) -> list[str]:
    found = graphs.listed(options.get("compute", COMPUTE))
    known = [one for one in trt.ComputeCapability.__members__ if re.fullmatch(r"SM\d+", one)]
    for name in found:
        if name not in known:
            raise UsageError(f"there is no compute capability {name!r} here", hint=f"allowed are {', '.join(known)}")
    return found
