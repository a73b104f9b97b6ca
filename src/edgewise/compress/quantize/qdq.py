"""ONNX networks for NPUs: weights in int8 per channel, activations in uint8 or uint16, as QuantizeLinear and
DequantizeLinear pairs (QDQ), their ranges taken from real inputs.

What came of it is measured on inputs that were held back, each node computed as it stands: what the file says, not what
this processor's int8 kernels make of it (those without VNNI saturate, and an NPU does not).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import onnx

from edgewise.compress.judge.nets import size
from edgewise.engines.onnx_part import OnnxPart
from edgewise.errors import SourceError, UnsupportedModel, UsageError

Array = npt.NDArray[Any]
Tensors = Mapping[str, Array]
Show = Callable[[str, int, int], None]

HELD_BACK: Final = 5  # every so-many-th input is judged on, and calibrates nothing
LEAST: Final = 5  # inputs
ROWS: Final = 8  # that run at once where the file takes any number


@dataclass(frozen=True, slots=True)
class NetQuantization:
    """A finished file against its source, over `inputs` that were held back: the largest difference of an output's
    numbers, the cosine of all outputs of an input (mean), and how often both have their largest number at the same
    place of the first output's last axis."""

    path: Path
    bytes: int
    bytes_source: int
    calibrated_on: int
    inputs: int
    max_abs: float
    cosine: float
    top1_agreement: float


def quantize_net(
    source: Path,
    output: Path,
    inputs: Tensors,
    *,
    activation_bits: Literal[8, 16],
    show: Show = lambda what, done, total: None,
) -> NetQuantization:
    """Write the network as QDQ, once it was compared. `inputs` has an array [n, …] for each of its inputs, n alike and
    at least LEAST.

    SourceError for a file that is no network, UsageError for inputs that do not fit or are too few and for an `output`
    that is there already, UnsupportedModel for a network that cannot be quantized."""
    if output.exists():
        raise UsageError(f"{output} is there already", hint="take another name, or remove that file")
    model = _loaded(source)
    names, count = _checked(model, inputs)
    rows = _rows(model)
    held = np.arange(HELD_BACK - 1, count, HELD_BACK)
    calibrating = np.setdiff1d(np.arange(count), held)
    show("calibrating", 0, 1)
    with tempfile.TemporaryDirectory(prefix="quantize-") as work:
        written = Path(work) / "qdq.onnx"
        feeds = _pieces({name: inputs[name][calibrating] for name in names}, rows)
        _quantized(source, written, feeds, activation_bits)
        show("calibrating", 1, 1)
        quantized = onnx.load(written)
    found = _compared(model, quantized, _pieces({name: inputs[name][held] for name in names}, rows), show, len(held))
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(f".{output.name}.partial")
    part.write_bytes(quantized.SerializeToString(deterministic=True))
    part.replace(output)
    return NetQuantization(output, output.stat().st_size, size(source), len(calibrating), len(held), *found)


def _loaded(source: Path) -> onnx.ModelProto:
    try:
        return onnx.load(source)
    except FileNotFoundError as e:
        raise SourceError(f"there is no file {e.filename or source}", hint="give the path of an .onnx file") from e
    except Exception as e:  # protobuf's and onnx's own
        raise SourceError(f"{source} is no ONNX file: {e}", hint="give the path of an .onnx file") from e


def _checked(model: onnx.ModelProto, inputs: Tensors) -> tuple[list[str], int]:
    """The network's inputs, and how many each has."""
    stored = {one.name for one in model.graph.initializer}
    names = [value.name for value in model.graph.input if value.name not in stored]
    missing = [name for name in names if name not in inputs]
    if missing:
        raise UsageError(
            f"the calibration data has {', '.join(inputs) or 'nothing'}", hint=f"the network takes {', '.join(names)}"
        )
    counts = {len(inputs[name]) if inputs[name].ndim else 0 for name in names}
    if len(counts) != 1 or min(counts) < LEAST:
        raise UsageError(
            f"the calibration data has {sorted(counts)} inputs",
            hint=f"give as many of each, {LEAST} at least; every {HELD_BACK}th is kept to judge on",
        )
    return names, counts.pop()


def _rows(model: onnx.ModelProto) -> int | None:
    """How many inputs the network takes at once; None if any number."""
    stored = {one.name for one in model.graph.initializer}
    shapes = [value.type.tensor_type.shape for value in model.graph.input if value.name not in stored]
    fixed = {shape.dim[0].dim_value for shape in shapes if shape.dim and shape.dim[0].dim_value}
    return min(fixed, default=None)


def _pieces(inputs: Tensors, rows: int | None) -> list[dict[str, Array]]:
    """Inputs that run at once: so many, the last piece filled up with its last input; without a number at most ROWS."""
    count = len(next(iter(inputs.values())))
    found = []
    for at in range(0, count, rows or ROWS):
        places = np.arange(at, min(at + ROWS, count) if rows is None else at + rows).clip(max=count - 1)
        found.append({name: value[places] for name, value in inputs.items()})
    return found


def _quantized(source: Path, output: Path, feeds: list[dict[str, Array]], activation_bits: int) -> None:
    """In a process of its own: onnxruntime's quantizer wants threads of its own, which this process may have for all
    its models together."""
    data = output.with_name("inputs.npz")
    arrays: dict[str, Any] = {f"{n} {name}": value for n, feed in enumerate(feeds) for name, value in feed.items()}
    np.savez(data, **arrays)
    call = [sys.executable, "-m", "edgewise.compress.quantize.qdq_process", str(source), str(output), str(data)]
    done = subprocess.run([*call, str(activation_bits)], capture_output=True, text=True, errors="replace")
    if done.returncode or not output.is_file():
        why = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise UnsupportedModel(
            f"{source.name} cannot be quantized: {why[0]}", hint="is its calibration data what the network takes?"
        )


def _compared(
    source: onnx.ModelProto, quantized: onnx.ModelProto, pieces: list[dict[str, Array]], show: Show, count: int
) -> tuple[float, float, float]:
    """max_abs, cosine, top1_agreement of the first `count` inputs; what follows only fills up."""
    ours, theirs = OnnxPart(quantized, plain=True), OnnxPart(source, plain=True)
    largest = 0.0
    cosines: list[float] = []
    agreed: list[float] = []
    try:
        for piece in pieces:
            show("comparing", len(cosines), count)
            rows, left = len(next(iter(piece.values()))), count - len(cosines)
            found, expected = (_floats(part.run(piece), rows, left) for part in (ours, theirs))
            largest = max(largest, *(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True)))
            flat, wanted = (np.concatenate([o.reshape(len(o), -1) for o in some], 1) for some in (found, expected))
            cosines += [*_cosine(flat, wanted)]
            agreed += [*(found[0].argmax(-1) == expected[0].argmax(-1)).reshape(len(found[0]), -1).mean(axis=1)]
        show("comparing", count, count)
    finally:
        ours.close()
        theirs.close()
    return largest, float(np.mean(cosines)), float(np.mean(agreed))


def _floats(outputs: Mapping[str, Array], rows: int, left: int) -> list[npt.NDArray[np.float64]]:
    """The outputs of numbers with a row for each of `rows` inputs, of which the first `left` count. Where one runs
    alone, whatever comes out is its row."""
    found = [value.astype(np.float64) for value in outputs.values() if value.dtype.kind == "f" and value.ndim]
    if rows == 1:
        found = [value if len(value) == 1 else value[None] for value in found]
    found = [value[:left] for value in found if len(value) == rows]
    if not found:
        raise UnsupportedModel("the network has no floating output to compare", hint="quantize its encoder alone")
    return found


def _cosine(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Of each row."""
    sizes = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.asarray(np.divide((a * b).sum(axis=1), sizes, out=np.ones(len(a)), where=sizes > 0))
