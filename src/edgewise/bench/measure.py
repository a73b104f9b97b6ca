"""Measurement files (docs/formats/measurement.md): what was run, on what, how often, and what came out."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import numpy as np

from edgewise.devices.machine import this_machine
from edgewise.errors import UsageError
from edgewise.evaluate.interval import bootstrap

FORMAT: Final = 1
SIZE_LIMIT: Final = 256 << 20  # bytes; raw samples are small, so a larger file is none of ours

Kind = Literal["measured", "emulated", "simulated", "predicted"]


class Measurement(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One run of a benchmark. `results` holds figures by name, as `figure` makes them, and whatever stands beside."""

    format: int = FORMAT
    name: str
    command: str
    kind: Kind = "measured"
    date: str
    machine: dict[str, Any]
    versions: dict[str, str]
    settings: dict[str, Any]
    results: dict[str, Any]

    @staticmethod
    def taken(
        name: str,
        *,
        command: str,
        results: dict[str, Any],
        settings: dict[str, Any],
        libraries: Iterable[str] = (),
        kind: Kind = "measured",
    ) -> Measurement:
        """A measurement made just now on this machine, with the versions of the libraries that took part."""
        return Measurement(
            name=name,
            command=command,
            kind=kind,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            machine=machine(),
            versions={library: version(library) for library in libraries},
            settings=settings,
            results=results,
        )

    @staticmethod
    def read(path: Path) -> Measurement:
        """UsageError, whatever the bytes are, if it is not a Measurement file of this format; OSError if unreadable."""
        if path.stat().st_size > SIZE_LIMIT:
            raise UsageError(f"{path} has {path.stat().st_size} bytes; a Measurement file has at most {SIZE_LIMIT}")
        data = path.read_bytes()
        try:
            found = msgspec.json.decode(data, type=_Version).format
            if found != FORMAT:
                raise UsageError(
                    f"{path} has format {found!r}; this version reads {FORMAT}", hint="run the command in it again"
                )
            return msgspec.json.decode(data, type=Measurement)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
            raise UsageError(f"{path} is not a Measurement file: {e}", hint="docs/formats/measurement.md") from e

    def save(self, directory: Path) -> Path:
        """Write DIRECTORY/NAME.json, the directory made if need be; returns its path."""
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{self.name}.json"
        part = path.with_name(f".{path.name}.{os.getpid()}")
        part.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")
        part.replace(path)  # a reader never meets half a file
        return path


class _Version(msgspec.Struct):
    """The one key that every format has."""

    format: Any = None


def figure(samples: Iterable[float], unit: str) -> dict[str, Any]:
    """`{unit, samples, median, low, high}`: a median with its 95 % bootstrap interval. UsageError without a sample."""
    values = [float(sample) for sample in samples]
    median = bootstrap(values, lambda drawn: float(np.median(drawn)))
    short = [float(f"{value:.10g}") for value in values]
    return {"unit": unit, "samples": short, "median": median.value, "low": median.low, "high": median.high}


def machine() -> dict[str, Any]:
    """This machine, without its name."""
    found = this_machine()
    return {
        "cpu": found.cpu,
        "cores": found.cores,
        "simd": list(found.simd),
        "memory_bytes": found.memory_bytes,
        "system": found.system,
        "python": platform.python_version(),
    }


def typed(script: str) -> str:
    """The call of a script as typed in the repository's root, but of files elsewhere only the name: a Measurement says
    nothing of the disk that it was made on."""
    arguments = [Path(a).name if Path(a).is_absolute() or a.startswith("..") else a for a in sys.argv[1:]]
    return shlex.join(["python", f"benchmarks/{Path(script).name}", *arguments])
