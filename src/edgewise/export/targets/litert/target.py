"""LiteRT: networks as .tflite files, run with XNNPACK.

Options: `layout`, "nhwc" (the default: images have their channels last, as LiteRT computes) or "nchw"; `dynamic_batch`,
whether the first axis is free. It is 1 otherwise, which accelerators want.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from edgewise.errors import SourceError
from edgewise.export.targets.litert.coverage import coverage, fully_accelerated
from edgewise.export.targets.litert.file import File, distinct, plain_name, skipped
from edgewise.export.targets.litert.run import Net, Watched, relative_l2
from edgewise.export.work.job import Check, Converted, Job, Layers, Proved, read_array, read_arrays, write_arrays

Array = npt.NDArray[Any]

COMPARED: Final = 8  # rows, of the float32 file with the source
TOLERATED: Final = 1e-3  # relative L2 there
RUNS: Final = 20  # that are timed
TOGETHER: Final = 7  # rows at once, for a file with a free first axis
HALF_MOST: Final = float(np.finfo(np.float16).max)
LAYOUT: Final = "nhwc"


def convert(job: Job) -> Converted:
    """See job.py. The float32 file is compared with the source before anything is quantized."""
    from edgewise.export.sources import torch_source
    from edgewise.export.targets.litert import from_torch

    loaded = torch_source.load(job.source, job.inputs)
    last = from_torch.images(loaded.inputs) if job.options.get("layout", LAYOUT) == "nhwc" else ()
    artifact = Path(f"{job.artifact}.tflite")
    artifact.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=artifact.parent, prefix=".litert-") as scratch:
        plain = Path(scratch) / "float32.tflite"
        free = bool(job.options.get("dynamic_batch", False))
        from_torch.write(loaded, [one.name for one in job.outputs], plain, last, free=free)
        return finished(job, plain, artifact, _notes(job, last))


def finished(job: Job, plain: Path, artifact: Path, notes: Sequence[str] = ()) -> Converted:
    """The float32 file `plain`, whatever made it, compared with the source, quantized, and moved to `artifact`."""
    from edgewise.export.targets.litert import quantize, recipe

    checks = (_compared(job, plain),)
    written = plain
    if job.precision != "fp32":
        written = plain.with_name("quantized.tflite")
        calibration = recipe.Calibration(job.inputs, job.outputs, _calibration(job), job.threads, job.source.task)
        notes = (*notes, *quantize.quantize(plain, written, job.precision, calibration))
    written.replace(artifact)
    artifact.chmod(0o644)
    return Converted(str(artifact), (str(artifact),), checks, tuple(notes))


def _notes(job: Job, last: Sequence[str]) -> tuple[str, ...]:
    notes = []
    if last:
        notes.append(f"{', '.join(last)} takes its channels last: [rows, height, width, channels]")
    narrowed = [one.name for one in job.inputs if one.dtype == "int64"]
    if narrowed:
        notes.append(f"{', '.join(narrowed)} became int32")
    return tuple(notes)


def _compared(job: Job, plain: Path) -> Check:
    net = Net(plain, job.inputs, job.outputs, job.threads)
    rows = _rows(job)
    count = min(COMPARED, len(rows[0]))
    found = net.all(rows, count)
    errors = [relative_l2(read_array(job.reference, str(n))[:count], value) for n, value in enumerate(found)]
    return Check("conversion", max(errors) <= TOLERATED, f"relative L2 {max(errors):.1e} on {count} rows, in float32")


def _calibration(job: Job) -> Sequence[Array]:
    if not job.calibration:
        return ()
    return list(read_arrays(job.calibration, job.inputs).values())


def _rows(job: Job) -> list[Array]:
    return list(read_arrays(job.rows, job.inputs).values())


# Proof


def prove(job: Job) -> Proved:
    """See job.py. The file may be anyone's."""
    path = _there(job.artifact)
    net = Net(path, job.inputs, job.outputs, job.threads)
    checks = [Check("loads", True, f"{path.stat().st_size} bytes; its tensors are allocated")]
    if net.free:
        checks.append(_together(net, _rows(job)))
        net.resize(1)
    rows = _rows(job)
    outputs = net.all(rows, len(rows[0]))
    write_arrays(Path(job.work) / "outputs", {str(n): value for n, value in enumerate(outputs)})
    if job.precision == "fp16":
        checks.append(_fits_half(job, path, rows))
    file = File(path)
    return Proved(
        level="executed",
        ran=True,
        by=f"ai-edge-litert {version('ai-edge-litert')}, XNNPACK, CPU",
        coverage=coverage(path, file, job.threads),
        weights=file.bytes_by_type,
        skipped=skipped(file.weights, job.precision),
        checks=tuple(checks),
        latency_ms=net.latency_ms(rows, RUNS),
        notes=_proof_notes(path, net),
    )


def _there(artifact: str) -> Path:
    path = Path(artifact)
    if not path.is_file():
        raise SourceError(f"there is no file {path}", hint="give the path of a .tflite file")
    return path


def _together(net: Net, rows: Sequence[Array]) -> Check:
    """Several rows at once against the same ones by themselves."""
    count = min(TOGETHER, len(rows[0]))
    net.resize(1)
    single = net.all(rows, count)
    net.resize(count)
    error = max(relative_l2(a, b) for a, b in zip(single, net.all(rows, count), strict=True))
    return Check("batch", error <= TOLERATED, f"{count} rows at once: relative L2 {error:.1e} from one at a time")


def _fits_half(job: Job, path: Path, rows: Sequence[Array]) -> Check:
    """A GPU computes an fp16 file in float16 throughout; this CPU does not, so what would not fit is looked for."""
    watched = Watched(path, job.inputs, job.outputs, job.threads)
    most: dict[str, float] = {}
    for at in range(0, min(COMPARED, len(rows[0]))):
        for name, value in watched.seen(rows, at):
            most[name] = max(most.get(name, 0.0), _largest(value, masks=name in watched.masks))
    if not most:
        return Check("range", True, "no real number is computed")
    name = max(most, key=lambda one: most[one])
    what = f"the largest number on {min(COMPARED, len(rows[0]))} rows is {most[name]:.4g}, at {plain_name(name)}"
    return Check("range", most[name] <= HALF_MOST, f"{what}; float16 ends at {HALF_MOST:.0f}")


def _largest(value: Array, *, masks: bool) -> float:
    """Of what feeds nothing but a softmax, only the positive side matters: minus infinity masks as well."""
    return float((value if masks else np.abs(value)).max(initial=0))


def _proof_notes(path: Path, net: Net) -> tuple[str, ...]:
    moved = [port.name for port in net.inputs if port.order]
    notes = [f"{', '.join(moved)} was given with its channels last"] if moved else []
    quantized = [port.name for port in (*net.inputs, *net.outputs) if port.scale]
    if quantized:
        notes.append(f"{', '.join(quantized)} is {net.inputs[0].dtype.name} in the file")
    notes.append(fully_accelerated(path))
    return tuple(notes)


def layers(job: Job) -> Layers:
    """See job.py. Channels of images come last here, as LiteRT computes."""
    watched = Watched(_there(job.artifact), job.inputs, job.outputs, job.threads)
    rows = _rows(job)
    runs: list[Mapping[str, Array]] = [dict(watched.seen(rows, row)) for row in job.only]
    names = [name for name in runs[0] if all(name in run for run in runs)] if runs else []
    write_arrays(
        Path(job.work) / "layers",
        {str(n): _stacked([run[name] for run in runs]) for n, name in enumerate(names)},
    )
    return Layers(distinct([plain_name(name) for name in names]))


def _stacked(values: Sequence[Array]) -> Array:
    """A row for each; a tensor of one row has its own axis for it already."""
    whole = all(value.ndim and value.shape[0] == 1 for value in values)
    return np.concatenate(values) if whole else np.stack(values)
