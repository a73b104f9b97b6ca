"""What a worker is asked and what it answers: the contract between Edgewise and the environments of the targets.

A worker imports this file, `errors.py` and one target. So it holds nothing but the standard library and numpy, and
every value of it is JSON, arrays aside: they lie in directories of `.npy` files, one per tensor, the first axis the
rows, and are opened memory-mapped. A job is written to `job.json` in a directory of its own, its answer to
`answer.json` there.

    begin     (sources/) load the source, read the user's data, write rows, calibration rows and the reference's outputs
    convert   (targets/) write the artifact
    prove     (targets/) load the artifact from the disk, run or read it, write its outputs
    layers    (sources/ and targets/) write the intermediate tensors of a few rows, in the order of computing
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np
import numpy.typing as npt

from edgewise.export.limits import MAX_TOKENS, THREADS

Array = npt.NDArray[Any]
Step = Literal["begin", "convert", "prove", "layers"]
Kind = Literal["torch", "program", "hf", "onnx", "savedmodel", "efficientnet", "language"]
Task = Literal["classify", "embed", "numbers"]
Precision = Literal["fp32", "fp16", "int8", "int8-dynamic", "int4"]
Level = Literal["executed", "emulated", "built", "spec-checked", "unverified"]

PRECISIONS: Final[tuple[Precision, ...]] = get_args(Precision)
JOB: Final = "job.json"
ANSWER: Final = "answer.json"
WEIGHTS: Final = ".data"  # after an ONNX file's own name: what its weights are called where they lie beside it


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input or an output: `shape` of one run, its first axis 1 (the rows) and None where an axis is free."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str  # numpy's name


@dataclass(frozen=True, slots=True)
class Source:
    """A model as the user named it. `shapes` are the user's own, by input, for a source that does not say its own;
    `search` are directories in which Python looks for its code; `max_tokens` the length to which texts are padded."""

    kind: Kind
    ref: str  # a path, `module:attr`, or one of names.py
    name: str
    task: Task
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    search: tuple[str, ...] = ()
    max_tokens: int = MAX_TOKENS


@dataclass(frozen=True, slots=True)
class Job:
    """One step. Paths are absolute. What a step does not need is empty.

    `rows`, `calibration` and `reference` are directories of arrays; `inputs` names their files in the order of the
    network's inputs, and `outputs` those of the reference (`0.npy`, `1.npy`, … in the order of its outputs). `hub` is
    the source as float32 ONNX with a free first axis, for targets that begin there. `artifact` is a path without its
    suffix for `convert`, and the file or directory itself for `prove` and `layers`."""

    step: Step
    source: Source
    work: str  # an empty directory for results and scratch files
    target: str = ""
    precision: Precision = "fp32"
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    rows: str = ""
    calibration: str = ""
    reference: str = ""
    hub: str = ""
    artifact: str = ""
    data: str = ""  # begin: the user's --inputs; empty for random ones
    calibration_data: str = ""  # begin: the user's --calibration
    only: tuple[int, ...] = ()  # layers: which rows
    threads: int = THREADS
    options: Mapping[str, Any] = field(default_factory=dict)  # of the target, each documented in its file


@dataclass(frozen=True, slots=True)
class Fallback:
    """Operators that do not run where the target is meant to run them."""

    op: str
    count: int
    why: str
    hint: str | None = None


@dataclass(frozen=True, slots=True)
class Coverage:
    """Of `nodes` operators of the artifact, `accelerated` are taken by `accelerator`; the rest is in `fallback`."""

    nodes: int
    accelerated: int
    accelerator: str  # "XNNPACK", "Hexagon HTP", ...
    fallback: tuple[Fallback, ...] = ()


@dataclass(frozen=True, slots=True)
class Check:
    """Something that was looked at, by name, and what was seen."""

    name: str  # "loads", "conversion", "precision", "weights", "finite", ...
    ok: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Converted:
    """`artifact` is the file or directory that was written; `files` all that belongs to it, itself included, absolute.
    `checks` are of the way there: `conversion` compares the float32 form with the reference before anything is
    quantized."""

    artifact: str
    files: tuple[str, ...]
    checks: tuple[Check, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Proved:
    """What an artifact is and does, read from the disk.

    `weights` are bytes by number type ("float32", "float16", "int8", "int4", ...) of weight matrices and filters (two
    axes or more); `skipped` names those that should have the precision that was asked for, could have, and have not.
    Outputs lie in the job's `work/outputs/` as `0.npy`, … float32, a row for each of the job's rows, if `ran`; `by`
    says what computed them. `latency_ms` are single runs of one row on this host, after one that is not counted."""

    level: Level
    ran: bool
    by: str  # "onnxruntime 1.32.0, CPU"
    coverage: Coverage
    weights: Mapping[str, int]
    skipped: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()
    latency_ms: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Begun:
    """The source as it was loaded, and how many rows there are to judge on (`rows/`), to calibrate with
    (`calibration/`), and what its outputs (`reference/`) are. `labels.npy` is there if `labelled`. `shared` says that
    the calibration rows are judged on too, as there are too few to keep some back. `hub` is the ONNX file that
    the source is, if it is one: in half precision, a copy of it in float32."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    rows: int
    calibration_rows: int
    labelled: bool
    random: bool
    shared: bool
    parameters: int
    task: Task
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    hub: str = ""


@dataclass(frozen=True, slots=True)
class Layers:
    """The names of tensors in `work/layers/` (`0.npy`, … in the order of computing), [rows, …] each."""

    names: tuple[str, ...]


# Arrays


def write_arrays(directory: Path, arrays: Mapping[str, Array]) -> None:
    """One file each; names may hold any character but a slash."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, value in arrays.items():
        np.save(directory / f"{name}.npy", value, allow_pickle=False)


def read_array(directory: str | Path, name: str) -> Array:
    """Memory-mapped."""
    found: Array = np.load(Path(directory) / f"{name}.npy", mmap_mode="r", allow_pickle=False)
    return found


def read_arrays(directory: str | Path, tensors: Sequence[Tensor]) -> dict[str, Array]:
    return {one.name: read_array(directory, one.name) for one in tensors}


# JSON


def job_text(job: Job) -> str:
    return json.dumps(asdict(job))


def job_of(text: str) -> Job:
    value: dict[str, Any] = json.loads(text)
    its = value["source"]
    shapes = {name: tuple(axes) for name, axes in its["shapes"].items()}
    value["source"] = Source(**{**its, "shapes": shapes, "search": tuple(its["search"])})
    value["only"] = tuple(value["only"])
    for name in ("inputs", "outputs"):
        value[name] = tensors_of(value[name])
    return Job(**value)


def tensors_of(values: Sequence[Mapping[str, Any]]) -> tuple[Tensor, ...]:
    return tuple(Tensor(one["name"], tuple(one["shape"]), one["dtype"]) for one in values)


def begun_of(value: Mapping[str, Any]) -> Begun:
    lists = {name: tensors_of(value[name]) for name in ("inputs", "outputs")}
    return Begun(**{**value, **lists, "notes": tuple(value["notes"])})


def converted_of(value: Mapping[str, Any]) -> Converted:
    return Converted(value["artifact"], tuple(value["files"]), _checks(value), tuple(value["notes"]))


def proved_of(value: Mapping[str, Any]) -> Proved:
    coverage = value["coverage"]
    fallback = tuple(Fallback(**one) for one in coverage["fallback"])
    names = ("skipped", "latency_ms", "notes")
    rest = {**value, **{name: tuple(value[name]) for name in names}, "checks": _checks(value)}
    return Proved(**{**rest, "coverage": Coverage(**{**coverage, "fallback": fallback})})


def _checks(value: Mapping[str, Any]) -> tuple[Check, ...]:
    return tuple(Check(**one) for one in value["checks"])
