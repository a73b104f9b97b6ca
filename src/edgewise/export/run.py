"""From a network to its artifacts, each with proof.

    begin      the source is loaded once: rows, calibration rows, what it answers
    hub        float32 ONNX, where a target begins there
    convert    each target in a process of its own
    prove      another process reads the file back from the disk
    judge      parity, the checks of proof/gate.py, the verdict
    where      of what was refused: the layer at which it went wrong

An artifact that is let through lies in `OUTPUT/KEY/`, one that is refused in `OUTPUT/refused/KEY/`; `report.json` and
`report.html` stand beside them.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from edgewise.errors import EdgewiseError, UsageError
from edgewise.export.limits import THREADS, Bounds
from edgewise.export.proof import bisect, gate, hints
from edgewise.export.proof.gate import Gate
from edgewise.export.proof.parity import Parity, compared
from edgewise.export.report.facts import Result
from edgewise.export.wanted import Wanted
from edgewise.export.work.environments import source_python, target_python
from edgewise.export.work.job import (
    Begun,
    Check,
    Converted,
    Job,
    Proved,
    Source,
    Step,
    begun_of,
    converted_of,
    proved_of,
    read_array,
)
from edgewise.export.work.process import run, versions

Array = npt.NDArray[Any]
Show = Callable[[str, int, int], None]

FROM_HUB: Final = ("onnx", "tensorrt", "qnn")
SOURCE: Final = "source"
WORST_ROWS: Final = 2  # that are looked at layer by layer
TRACED: Final = ("conversion", "weights", "finite", "numbers", "drop", "batch")  # checks that a layer can explain


@dataclass(frozen=True, slots=True)
class Order:
    """What to do. `checked` is an artifact that somebody else has made, to be proved instead of converting."""

    source: Source
    wanted: tuple[Wanted, ...]
    output: Path
    data: Path | None = None
    calibration: Path | None = None
    gate: Gate = field(default_factory=Gate)
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    checked: Path | None = None
    bounds: Bounds = field(default_factory=Bounds)
    threads: int = THREADS


@dataclass(frozen=True, slots=True)
class Exported:
    """The source as it was read, and what became of each artifact."""

    begun: Begun
    results: Mapping[str, Result]


def export(order: Order, home: Path, show: Show = lambda what, done, total: None) -> Exported:
    """UsageError for data that do not fit or are too few to gate on, SourceError for a source that cannot be loaded,
    MissingEnvironment before any work begins. What goes wrong with one target is its result."""
    pythons = _pythons(order, home)
    if order.checked is not None and len(order.wanted) != 1:
        raise UsageError("--check takes one target", hint="name the artifact's: --to litert")
    order.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=order.output) as work:
        return _Export(order, Path(work).absolute(), pythons, show).done()


def _pythons(order: Order, home: Path) -> dict[str, Path]:
    """The Python of the source and of each target; those that cannot be had are named before anything is done."""
    kind = order.source.kind
    if kind == "savedmodel" and (others := {one.target for one in order.wanted} - {"litert"}):
        raise UsageError(
            f"a SavedModel goes to litert alone, not to {', '.join(sorted(others))}", hint="give a torch or ONNX model"
        )
    found = {SOURCE: source_python(kind, home)}
    for one in order.wanted:
        from_file = one.target == "onnx" and kind == "onnx"  # needs no converter
        found[one.target] = found[SOURCE] if from_file else target_python(one.target, home)
    return found


class _Export:
    def __init__(self, order: Order, work: Path, pythons: Mapping[str, Path], show: Show) -> None:
        self._order, self._work, self._pythons, self._show = order, work, pythons, show
        self._began = work / "begin"
        self._steps = 0

    def done(self) -> Exported:
        order = self._order
        self._show(f"reading {order.source.name}", 0, 1)
        self._begun = begun_of(self._run(self._beginning(), SOURCE))
        self._show(f"reading {order.source.name}", 1, 1)
        gate.check_rows(order.gate, self._begun.rows, random=self._begun.random)
        self._labels = np.load(self._began / "labels.npy") if self._begun.labelled else None
        self._source = replace(order.source, shapes=_shapes(self._begun))
        self._hub: str | EdgewiseError = self._made_hub()
        results = {}
        for at, wanted in enumerate(order.wanted):
            self._show(f"{wanted.key}: {wanted.precision}", at, len(order.wanted))
            results[wanted.key] = self._result(wanted)
            self._show(f"{wanted.key}: {wanted.precision}", at + 1, len(order.wanted))
        return Exported(self._begun, results)

    # Steps

    def _beginning(self) -> Job:
        order = self._order
        data, calibration = (str(one.absolute()) if one else "" for one in (order.data, order.calibration))
        return Job(
            "begin",
            order.source,
            str(self._began),
            data=data,
            calibration_data=calibration,
            threads=order.threads,
            options={"preprocessing": dict(order.preprocessing)} if order.preprocessing else {},
        )

    def _job(self, step: Step, **more: Any) -> Job:
        """A step after the first, in a directory of its own."""
        self._steps += 1
        return Job(
            step,
            self._source,
            str(self._work / f"{self._steps}-{step}"),
            inputs=self._begun.inputs,
            outputs=self._begun.outputs,
            rows=str(self._began / "rows"),
            calibration=str(self._began / "calibration"),
            reference=str(self._began / "reference"),
            threads=self._order.threads,
            **more,
        )

    def _run(self, job: Job, python: str) -> Mapping[str, Any]:
        return run(job, self._pythons[python], self._order.bounds)

    def _made_hub(self) -> str | EdgewiseError:
        """The path of the float32 ONNX, or why there is none; empty where no target wants it."""
        if not any(map(_from_hub, self._order.wanted)) or self._order.checked is not None:
            return ""
        if self._begun.hub:
            return self._begun.hub
        self._show("converting to ONNX", 0, 1)
        job = self._job("convert", target="onnx", artifact=str(self._work / "hub"))
        try:
            return converted_of(self._run(job, SOURCE)).artifact
        except EdgewiseError as e:
            return e
        finally:
            self._show("converting to ONNX", 1, 1)

    # One artifact

    def _result(self, wanted: Wanted) -> Result:
        started = time.monotonic()
        place = self._work / wanted.key.replace(":", "-")
        place.mkdir()
        try:
            made = self._made(wanted, place)
            result = self._judged(wanted, made)
        except EdgewiseError as e:
            result = Result.failed(wanted, e)
        result = replace(result, seconds=time.monotonic() - started)
        return result if self._order.checked is not None else result.stored(place, self._order.output)

    def _made(self, wanted: Wanted, place: Path) -> Converted:
        if self._order.checked is not None:
            path = self._order.checked.absolute()
            return Converted(str(path), (str(path),))
        if wanted.options.get("dynamic") and self._source.kind == "onnx":
            raise UsageError("onnx.dynamic is for what becomes ONNX here", hint="an ONNX file says itself what is free")
        hub = self._hub if _from_hub(wanted) else ""
        if isinstance(hub, EdgewiseError):
            raise hub
        artifact = str(place / self._source.name)
        job = self._job(
            "convert",
            target=wanted.target,
            precision=wanted.precision,
            artifact=artifact,
            hub=hub,
            options=wanted.options,
        )
        by_source = self._source.kind == "savedmodel"  # whose converter comes with TensorFlow
        return converted_of(self._run(job, SOURCE if by_source else wanted.target))

    def _judged(self, wanted: Wanted, made: Converted) -> Result:
        job = self._job(
            "prove",
            target=wanted.target,
            precision=wanted.precision,
            artifact=made.artifact,
            hub=self._hub if isinstance(self._hub, str) else "",
            options=wanted.options,
        )
        proved = self._hinted(proved_of(self._run(job, wanted.target)), wanted)
        checks = [*made.checks, *proved.checks, gate.precision_check(proved, wanted.precision)]
        parity, found = self._compared(Path(job.work) / "outputs", proved, wanted, checks)
        told = gate.told_once(checks)
        refused = [one for one in told if not one.ok]
        traced = any(one.name in TRACED for one in refused)
        return Result(
            wanted,
            "refused" if refused else "ok",
            made,
            proved,
            told,
            parity,
            where=self._where(wanted, made, found) if traced else None,
            versions=versions(job),
        )

    def _hinted(self, proved: Proved, wanted: Wanted) -> Proved:
        """With a way out for each operator that falls back, and what users find out on the device."""
        operators = tuple(one.op for one in proved.coverage.fallback)
        notes = hints.for_artifact(hints.Seen(wanted.target, wanted.precision, self._begun.inputs, operators))
        coverage = hints.with_hints(wanted.target, wanted.precision, proved.coverage)
        return replace(proved, coverage=coverage, notes=(*proved.notes, *notes))

    def _compared(
        self, outputs: Path, proved: Proved, wanted: Wanted, checks: list[Check]
    ) -> tuple[Parity | None, Sequence[Array]]:
        """The figures, if the artifact's outputs are there; what they say is added to the checks."""
        budget = self._order.gate
        if not proved.ran:
            if budget.max_drop is not None:
                checks.append(Check("drop", False, "it could not be run, so nothing holds the budget against it"))
            return None, ()
        expected = [read_array(self._began / "reference", str(n)) for n in range(len(self._begun.outputs))]
        files = sorted(outputs.glob("*.npy"), key=lambda one: int(one.stem))
        found = [read_array(outputs, file.stem) for file in files]
        if [one.shape for one in found] != [one.shape for one in expected]:
            shapes = [[list(one.shape) for one in some] for some in (found, expected)]
            checks.append(Check("outputs", False, f"outputs have the shapes {shapes[0]}, the source's {shapes[1]}"))
            return None, ()
        checks.append(gate.finite_check(found, expected))
        if not checks[-1].ok:
            return None, found
        parity = compared(found, expected, self._begun.task, self._labels)
        checks += [gate.numbers_check(one, wanted.precision) for one in parity.outputs]
        if parity.drop is not None and (check := gate.drop_check(parity.drop, budget)) is not None:
            checks.append(check)
        return parity, found

    def _where(self, wanted: Wanted, made: Converted, found: Sequence[Array]) -> Mapping[str, Any] | None:
        """None where a runtime does not show its layers."""
        only = self._worst(found)
        sides: list[list[tuple[str, Array]]] = []
        try:
            for target, artifact, python in (("", "", SOURCE), (wanted.target, made.artifact, wanted.target)):
                job = self._job(
                    "layers",
                    target=target,
                    artifact=artifact,
                    precision=wanted.precision,
                    only=only,
                    options=wanted.options,
                )
                names = self._run(job, python)["names"]
                sides.append([(name, read_array(f"{job.work}/layers", str(n))) for n, name in enumerate(names)])
        except EdgewiseError as e:
            return {"unknown": e.message}
        at = bisect.where(sides[0], sides[1], noise=bisect.NOISE[wanted.precision])
        return {"unknown": "no layer of the source has a counterpart"} if at is None else at.facts()

    def _worst(self, found: Sequence[Array]) -> tuple[int, ...]:
        """The rows whose first output is furthest from the source's."""
        if not found:
            return tuple(range(min(WORST_ROWS, self._begun.rows)))
        wanted = np.asarray(read_array(self._began / "reference", "0"), np.float64).reshape(self._begun.rows, -1)
        mine = np.asarray(found[0], np.float64).reshape(self._begun.rows, -1)
        with np.errstate(invalid="ignore"):
            errors = np.nan_to_num(((mine - wanted) ** 2).sum(axis=1), nan=np.inf, posinf=np.inf)
        return tuple(int(row) for row in np.argsort(-errors, kind="stable")[:WORST_ROWS])


def _from_hub(wanted: Wanted) -> bool:
    """The hub is free along its first axis alone."""
    return wanted.target in FROM_HUB and not wanted.options.get("dynamic")


def _shapes(begun: Begun) -> dict[str, tuple[int, ...]]:
    return {one.name: tuple(axis or 1 for axis in one.shape) for one in begun.inputs}
