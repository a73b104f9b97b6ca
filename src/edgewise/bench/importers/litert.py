"""What LiteRT's (TensorFlow Lite's) `benchmark_model` prints, also through `adb logcat`.

Source of the format: tensorflow/tensorflow, tensorflow/lite/tools/benchmark/README.md ("Profiling model operators")
and benchmark_model.cc (OnBenchmarkEnd). Its result file, a protobuf, has no published sample and is not read.
"""

from __future__ import annotations

import re
from typing import Any

from edgewise.bench.importers.result import checked, imported, spread
from edgewise.bench.measure import Measurement
from edgewise.errors import UsageError

NUMBER = r"[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?"
SERIES = re.compile(rf"\bcount=([0-9]{{1,18}})((?: [a-z0-9]+={NUMBER})+)")
PAIR = re.compile(rf"([a-z0-9]+)=({NUMBER})")
TIMINGS = re.compile(rf"nference timings in us: ((?:[A-Za-z ()]+: {NUMBER}(?:, )?)+)")
TIMING = re.compile(rf"([A-Za-z ()]+): ({NUMBER})")
MEMORY = re.compile(rf"(?:emory footprint [a-z ]*\(MB\)): init=({NUMBER}) overall=({NUMBER})")
SETTING = re.compile(
    r"(Num threads|Graph|Min num runs|Min warmup runs|Use gpu|Use xnnpack|Use NNAPI): \[([^\]\n]{1,500})\]"
)
BY_TYPE = re.compile(rf"^[^\n]*?\t +([A-Za-z0-9_]+)\t +([0-9]{{1,18}})\t +({NUMBER})\t +{NUMBER}%", re.MULTILINE)
MEANS = {"avg": "mean", "std": "deviation"}  # its words and ours; the others are the same


def read(data: bytes) -> Measurement:
    """Its own summaries: the tool prints no raw samples, so nothing here has a median unless the tool gave it."""
    text = data.decode("utf-8", "replace")
    series = list(SERIES.finditer(text))
    timings = TIMINGS.search(text)
    if not series or timings is None:
        raise UsageError(
            "this is not the whole output of benchmark_model: that has lines with count= and one with Inference timings"
        )
    results: dict[str, Any] = {"inference": _series(series[-1])}  # the first are of warming up
    for name, value in TIMING.findall(timings.group(1)):
        results[name.strip().lower()] = _one(value, "us", name)
    memory = MEMORY.search(text)
    if memory is not None:
        results["memory after init"] = _one(memory.group(1), "MB", "init")
        results["memory overall"] = _one(memory.group(2), "MB", "overall")
    by_type = text.partition("Summary by node type")[2]
    for name, count, ms in BY_TYPE.findall(by_type):
        results[f"operator {name}"] = {"unit": "ms", "nodes": int(count), "mean": float(ms)}
    settings = {name.lower(): value.rpartition("/")[2] for name, value in SETTING.findall(text)}
    return imported("litert", results, settings=settings)


def _series(match: re.Match[str]) -> dict[str, Any]:
    values = {MEANS.get(name, name): checked(float(value), name) for name, value in PAIR.findall(match.group(2))}
    return {"unit": "us", "count": int(match.group(1))} | values


def _one(value: str, unit: str, name: str) -> dict[str, Any]:
    return spread([checked(float(value), name.strip())], unit)
