"""Measurement files (docs/formats/measurement.md)."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SIMD = ("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimd", "sve")


def figure(samples: Iterable[float], unit: str) -> dict[str, Any]:
    """A median of raw samples with a 95 % bootstrap interval."""
    values = np.asarray(list(samples), dtype=float)
    draws = np.random.default_rng(0).choice(values, (2000, len(values)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return {
        "unit": unit,
        "samples": [round(v, 4) for v in values.tolist()],
        "median": float(np.median(values)),
        "low": float(low),
        "high": float(high),
    }


def machine() -> dict[str, Any]:
    """This machine, without its name."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    lines = dict(line.split(":", 1) for line in cpuinfo.splitlines() if ":" in line)
    lines = {key.strip(): value.strip() for key, value in lines.items()}
    flags = set(lines.get("flags", lines.get("Features", "")).split())
    return {
        "cpu": lines.get("model name", platform.processor() or platform.machine()),
        "cores": os.cpu_count(),
        "simd": [flag for flag in SIMD if flag in flags],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def command() -> str:
    """As typed, but of files elsewhere only the name: a Measurement says nothing of the disk that it was made on."""
    arguments = [Path(a).name if Path(a).is_absolute() or a.startswith("..") else a for a in sys.argv[1:]]
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments])


def write(
    name: str, *, results: dict[str, Any], libraries: Sequence[str], settings: dict[str, Any], kind: str = "measured"
) -> Path:
    """Write `benchmarks/results/NAME.json`; returns its path."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    measurement = {
        "format": 1,
        "name": name,
        "command": command(),
        "kind": kind,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": {library: version(library) for library in libraries},
        "settings": settings,
        "results": results,
    }
    path.write_text(json.dumps(measurement, indent=1) + "\n")
    return path
