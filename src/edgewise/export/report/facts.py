"""What became of each artifact, as --json, `report.json` and the page show it."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edgewise.devices.machine import this_machine
from edgewise.errors import EdgewiseError
from edgewise.export.proof.gate import Gate
from edgewise.export.proof.parity import Parity
from edgewise.export.wanted import Wanted
from edgewise.export.work.job import WEIGHTS, Begun, Check, Converted, Proved, Source
from edgewise.models.bundle import sha256

Status = Literal["ok", "refused", "failed"]
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Result:
    """One artifact: `failed` has an error and nothing else, `refused` a check that is not ok."""

    wanted: Wanted
    status: Status
    made: Converted | None = None
    proved: Proved | None = None
    checks: tuple[Check, ...] = ()
    parity: Parity | None = None
    where: Mapping[str, Any] | None = None
    error: EdgewiseError | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @classmethod
    def failed(cls, wanted: Wanted, error: EdgewiseError) -> Result:
        return cls(wanted, "failed", error=error)

    def stored(self, place: Path, output: Path) -> Result:
        """Moves the artifact's directory to where it belongs, `output` or `refused` in it. An older one of its name
        gives way, also to a failure: it would pass for what the report is about."""
        output = output.absolute()
        home = output / ("refused" if self.status == "refused" else "") / place.name
        for old in (output / place.name, output / "refused" / place.name):
            shutil.rmtree(old, ignore_errors=True)
        if self.status == "failed":
            return self
        home.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(place, home)
        return self._moved(place, home)

    def _moved(self, old: Path, new: Path) -> Result:
        assert self.made is not None
        files = tuple(_in(new, old, file) for file in self.made.files)
        made = replace(self.made, artifact=_in(new, old, self.made.artifact), files=files)
        return replace(self, made=made)

    def facts(self) -> dict[str, Any]:
        """docs/export.md names every field."""
        made, proved = self.made, self.proved
        common = {
            "status": self.status,
            "target": self.wanted.target,
            "precision": self.wanted.precision,
            "seconds": round(self.seconds, 1),
            "error": _error(self.error),
        }
        if made is None or proved is None:
            return {**common, "level": "unverified", **dict.fromkeys(_ABSENT)}
        files = [Path(one) for one in made.files]
        read = proved.level == "spec-checked"  # by us; the runtime never ran it
        return {
            **common,
            "level": proved.level,
            "by": proved.by,
            "path": made.artifact,
            "files": list(made.files),
            "bytes": tree_bytes([Path(made.artifact), *(one for one in files if str(one) == made.artifact + WEIGHTS)]),
            "sha256": tree_sha256(Path(made.artifact)),
            "files_sha256": {one.name: tree_sha256(one) for one in files},
            "parity": None if read else _parity(self.parity),
            "interpreted": _parity(self.parity) if read else None,
            "drop": None if self.parity is None or self.parity.drop is None else asdict(self.parity.drop),
            "coverage": asdict(proved.coverage),
            "weights": dict(proved.weights),
            "skipped": list(proved.skipped),
            "checks": [asdict(one) for one in self.checks],
            "latency_ms": _latency(proved.latency_ms),
            "where": self.where,
            "versions": dict(self.versions),
            "notes": [*made.notes, *proved.notes],
        }


_ABSENT = (
    *("by", "path", "files", "bytes", "sha256", "files_sha256", "parity", "interpreted", "drop", "coverage"),
    *("weights", "skipped", "checks", "latency_ms", "where", "versions", "notes"),
)


def report(source: Source, begun: Begun, gate: Gate, results: Mapping[str, Result], seconds: float) -> dict[str, Any]:
    """The whole of it. `targets` is what programs read."""
    return {
        "format": FORMAT,
        "model": {
            "name": source.name,
            "kind": source.kind,
            "task": begun.task,
            "parameters": begun.parameters,
            "inputs": [asdict(one) for one in begun.inputs],
            "outputs": [asdict(one) for one in begun.outputs],
            "preprocessing": dict(begun.preprocessing),
        },
        "data": {
            "rows": begun.rows,
            "labelled": begun.labelled,
            "random": begun.random,
            "calibration_rows": begun.calibration_rows,
            "calibration_shared": begun.shared,
        },
        "gate": asdict(gate),
        "host": host(),
        "seconds": round(seconds, 1),
        "notes": list(begun.notes),
        "targets": {key: one.facts() for key, one in results.items()},
    }


def host() -> dict[str, Any]:
    machine = this_machine()
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "cores": machine.usable_cores,
        "simd": list(machine.simd),
    }


def write(output: Path, facts: Mapping[str, Any], page: str) -> None:
    """`report.json` and `report.html`."""
    text = json.dumps(facts, indent=1, ensure_ascii=False)
    for name, content in (("report.json", text), ("report.html", page)):
        part = output / f".{name}"
        part.write_text(content, encoding="utf-8")
        part.replace(output / name)


def tree_bytes(files: Sequence[Path]) -> int:
    """Of files and of directories with all they hold."""
    return sum(
        part.stat().st_size
        for file in files
        for part in ([file] if file.is_file() else file.rglob("*"))
        if part.is_file()
    )


def tree_sha256(path: Path) -> str:
    """Of a file; of a directory, that of the lines `HASH  NAME` of its files, sorted by name."""
    if path.is_file():
        return sha256(path)
    files = sorted(one for one in path.rglob("*") if one.is_file())
    lines = (f"{sha256(one)}  {one.relative_to(path).as_posix()}\n" for one in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _in(new: Path, old: Path, file: str) -> str:
    return str(new / Path(file).relative_to(old))


def _error(error: EdgewiseError | None) -> dict[str, Any] | None:
    return None if error is None else {"kind": type(error).__name__, "message": error.message, "hint": error.hint}


def _parity(parity: Parity | None) -> dict[str, Any] | None:
    """The first output's numbers and the choices; of more outputs, the numbers of each."""
    if parity is None:
        return None
    outputs = [asdict(one) for one in parity.outputs]
    choices = asdict(parity.choices) if parity.choices else {}
    return {**outputs[0], **choices, **({"outputs": outputs} if len(outputs) > 1 else {})}


def _latency(samples: Sequence[float]) -> dict[str, Any] | None:
    if not samples:
        return None
    low, median, high = np.quantile(samples, [0.1, 0.5, 0.9])
    return {"median": float(median), "p10": float(low), "p90": float(high), "n": len(samples), "where": "host"}
