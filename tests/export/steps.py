"""One step of an export in a process of its own, for tests of targets and sources."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from edgewise.export.work.job import Begun, Converted, Job, Layers, Proved, Source, begun_of, converted_of, proved_of
from edgewise.export.work.process import Bounds, run

HERE = Path(__file__).parent
_NUMBERS = count()


def net(name: str, **shapes: tuple[int, ...]) -> Source:
    """A network of nets.py."""
    return Source("torch", f"nets:{name}", name, "classify", shapes=shapes, search=(str(HERE),))


def step(job: Job, python: Path) -> Mapping[str, Any]:
    """In a fresh directory beside `job.work`."""
    return run(replace(job, work=f"{job.work}/{next(_NUMBERS)}-{job.step}"), python, Bounds(seconds=200))


def begun(source: Source, work: Path, python: Path, data: Path | None = None) -> tuple[Job, Begun]:
    """The source's own step, and a job that a target's steps can be made of with `replace`."""
    job = Job("begin", source, str(work / "begin"), data="" if data is None else str(data))
    found = begun_of(run(job, python, Bounds(seconds=200)))
    made = Job(
        "convert",
        source,
        str(work),
        inputs=found.inputs,
        outputs=found.outputs,
        rows=str(work / "begin" / "rows"),
        calibration=str(work / "begin" / "calibration"),
        reference=str(work / "begin" / "reference"),
        artifact=str(work / source.name),
    )
    return made, found


def converted(job: Job, python: Path) -> Converted:
    return converted_of(step(replace(job, step="convert"), python))


def proved(job: Job, artifact: str, python: Path) -> tuple[Proved, Path]:
    """What was found, and the directory of the outputs."""
    work = f"{job.work}/{next(_NUMBERS)}-proof"
    answer = run(replace(job, step="prove", artifact=artifact, work=work), python, Bounds(seconds=200))
    return proved_of(answer), Path(work) / "outputs"


def layers(job: Job, artifact: str, python: Path) -> tuple[Layers, Path]:
    work = f"{job.work}/{next(_NUMBERS)}-layers"
    answer = run(replace(job, step="layers", artifact=artifact, work=work), python, Bounds(seconds=200))
    return Layers(tuple(answer["names"])), Path(work) / "layers"
