"""What the tensors of an ONNX graph hold, seen on rows of inputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import onnx
import onnxruntime as ort

from edgewise.export.sources.onnx_file import network_inputs, save
from edgewise.export.targets.onnx.graph import CPU, constants, pieces, session_options
from edgewise.export.targets.ranges import SAMPLE, Seen, seen_of, together
from edgewise.export.work.job import Array


def observed(
    model: onnx.ModelProto, tensors: Collection[str], rows: Mapping[str, Array], work: Path, threads: int
) -> dict[str, Seen]:
    """Of the floating tensors among those, a row at a time."""
    each = max(1, SAMPLE // len(next(iter(rows.values()))))
    found: dict[str, list[Seen]] = {}

    def look(name: str, value: Array) -> None:
        some = found.setdefault(name, [])
        some.append(seen_of(value, each, len(some)))

    watch(model, tensors, rows, work, threads, look)
    return {name: together(parts) for name, parts in found.items()}


def watch(
    model: onnx.ModelProto,
    tensors: Collection[str],
    rows: Mapping[str, Array],
    work: Path,
    threads: int,
    look: Callable[[str, Array], None],
) -> None:
    """Shows each of those tensors for each row, if its numbers are floating."""
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    inputs = {one.name for one in network_inputs(model)}
    given = {one.name for one in wide.graph.output}
    names = [name for name in dict.fromkeys(tensors) if name and name not in inputs]
    wide.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in given)
    save(wide, work / "observed.onnx")
    options = session_options(threads, optimize=False)
    session = ort.InferenceSession(str(work / "observed.onnx"), options, providers=CPU)
    for _, piece in pieces(session, rows, 1):
        values = dict(zip(names, session.run(names, piece), strict=True)) if names else {}  # none would mean all
        values |= {name: value for name, value in piece.items() if name in tensors}
        for name, value in values.items():
            if value.dtype.kind == "f" and value.size:
                look(name, value)


def all_tensors(model: onnx.ModelProto) -> list[str]:
    return [name for node in model.graph.node for name in [*node.input, *node.output] if name]


def computed(model: onnx.ModelProto) -> list[str]:
    stored = constants(model)
    return [name for name in all_tensors(model) if name not in stored]
