"""Steps of the targets that are made of ONNX, for their tests: a process of the exporters' environment for each room,
as importing torch takes seconds, and what runs Hexagon's emulator must not have loaded it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from steps import Worker

from edgewise.export.work.job import (
    Converted,
    Job,
    Layers,
    Precision,
    Proved,
    Source,
    Step,
    begun_of,
    converted_of,
    proved_of,
    read_array,
)

Array = npt.NDArray[Any]
HERE: Final = Path(__file__).parent
ROWS: Final = 12


class Bench:
    """Networks of nets.py begun once, their hubs, and the steps of one target."""

    def __init__(self, torch: Worker, worker: Worker, target: str, place: Path) -> None:
        self.target, self.place = target, place
        self._torch, self._worker = torch, worker
        self._jobs: dict[str, Job] = {}
        self._made: dict[tuple[str, str], Converted] = {}
        self._count = 0

    def job(self, name: str, rows: Mapping[str, Array]) -> Job:
        """With the network as a hub, if this is not the ONNX target itself."""
        if name not in self._jobs:
            work = self.place / name
            work.mkdir()
            np.savez(work / "rows.npz", **rows)
            source = Source("torch", f"nets:{name}", name, "classify", search=(str(HERE),))
            begin = Job("begin", source, str(work / "begin"), data=str(work / "rows.npz"), threads=1)
            found = begun_of(self._torch("begin", begin, "sources.torch_source"))
            directories = {one: str(work / "begin" / one) for one in ("rows", "calibration", "reference")}
            job = replace(begin, inputs=found.inputs, outputs=found.outputs, target=self.target, **directories)
            if self.target != "onnx":
                hub = replace(job, step="convert", work=str(work / "hub"), artifact=str(work / "hub" / "hub"))
                job = replace(job, hub=converted_of(self._torch("convert", hub, "targets.onnx.target")).artifact)
            self._jobs[name] = job
        return self._jobs[name]

    def converted(self, job: Job, precision: Precision, **options: Any) -> Converted:
        key = (job.source.name, f"{precision} {options} {job.hub}")
        if key not in self._made:
            work = self._work(job)
            answer = self._do("convert", job, work, f"{work}/made", precision, options)
            self._made[key] = converted_of(answer)
        return self._made[key]

    def proved(self, job: Job, artifact: str | Path, precision: Precision, **options: Any) -> tuple[Proved, float]:
        """And the relative L2 of its outputs against the reference; no number if it did not run."""
        work = self._work(job)
        found = proved_of(self._do("prove", job, work, str(artifact), precision, options))
        if not found.ran:
            return found, float("nan")
        ours, theirs = (read_array(where, "0") for where in (f"{work}/outputs", job.reference))
        assert ours.shape == theirs.shape
        return found, float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))

    def layers(self, job: Job, artifact: str, only: tuple[int, ...]) -> dict[str, Array]:
        work = self._work(job)
        answer = self._do("layers", replace(job, only=only), work, artifact, "fp32", {})
        names = Layers(tuple(answer["names"])).names
        return {one: read_array(f"{work}/layers", str(place)) for place, one in enumerate(names)}

    def _work(self, job: Job) -> str:
        self._count += 1
        return str(self.place / f"{job.source.name}-{self._count}")

    def _do(
        self, step: Step, job: Job, work: str, artifact: str, precision: Precision, options: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        made = replace(job, step=step, work=work, artifact=artifact, precision=precision, options=options)
        return (self._torch if self.target == "onnx" else self._worker)(step, made, f"targets.{self.target}.target")


@contextmanager
def bench(target: str, python: Path, place: Path) -> Iterator[Bench]:
    torch, worker = Worker(python), Worker(python)
    try:
        yield Bench(torch, worker, target, place)
    finally:
        torch.close()
        worker.close()


def images(rows: int = ROWS) -> dict[str, Array]:
    return {"image": np.random.default_rng(1).standard_normal((rows, 3, 32, 32)).astype(np.float32)}


def vectors(rows: int = ROWS) -> dict[str, Array]:
    return {"x": np.random.default_rng(1).standard_normal((rows, 24)).astype(np.float32)}


def tokens(rows: int = ROWS) -> dict[str, Array]:
    mask = np.ones((rows, 16), np.int64)
    mask[1::2, 9:] = 0
    return {"input_ids": np.random.default_rng(1).integers(0, 100, (rows, 16)), "attention_mask": mask}


NETS: Final = {
    "cnn": images,
    "convs": images,
    "mlp": vectors,
    "overflowing": vectors,
    "encoder": tokens,
    "spiky": tokens,
    "repeated": tokens,
    "touchy": vectors,
}
