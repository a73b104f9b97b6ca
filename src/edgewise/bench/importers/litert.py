"""What LiteRT's (TensorFlow Lite's) `benchmark_model` prints, also through `adb logcat`.

Sources of the format, all of tensorflow/tensorflow: the code that prints it, lite/tools/benchmark/benchmark_model.cc,
lite/profiling/profile_summary_formatter.cc and xla/tsl/util/stats_calculator.cc and .h; and a published sample of an
old version, lite/tools/benchmark/README.md ("Profiling model operators"). A whole sample of a newer version stands in
NobuoTsukamoto/meta-tensorflow-lite, doc/tensorflow-lite-benchmark.md. The tool's result file, a protobuf, has no
published sample and is not read.

The order of a whole output: settings, a series of the warm-up, a series of the runs that count, "Inference timings",
memory, and with operator profiling two sections of tables, of initialization and of the regular runs. Each table ends
with a series of the profiler's own: sums over operators, not run times. The old version printed its only section
before its "Average inference timings".
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from edgewise.bench.importers.result import NAME_LIMIT, checked, imported, spread
from edgewise.bench.measure import Measurement
from edgewise.errors import UsageError

LINE: Final = re.compile(r"[^\r\n]+")
NUMBER: Final = re.compile(r"[0-9]{1,400}(?:\.[0-9]{1,400})?(?:e[+-]?[0-9]{1,4})?")
COLUMNS: Final = re.compile(r"\t| {2,}")
MEANS: Final = {"avg": "mean", "std": "deviation"}  # its words and ours; the others are the same
MEMORY: Final = {"init": "after init", "overall": "overall"}
SAME: Final = 1e-3  # as far as a mean printed twice may differ: it has six digits
SETTINGS: Final = ("Num threads", "Graph", "Min num runs", "Min warmup runs", "Use gpu", "Use xnnpack", "Use NNAPI")
SETTING_LIMIT: Final = 500  # characters of a value

TIMINGS: Final = "nference timings in us: "
SERIES: Final = "count="
GOES_ON: Final = ("first=", "curr=")
OF_PROFILER: Final = ("Timings (microseconds):", "Memory (bytes):")
INITIALIZATION: Final = "Profiling Info for Benchmark Initialization"
REGULAR: Final = "Profiling Info for Regular Benchmark Runs"
BY_TYPE: Final = "Summary by node type"
SUBGRAPH: Final = re.compile(r"Subgraph \(index: ([0-9]{1,9})")


def read(data: bytes) -> Measurement:
    """Its own summaries: the tool prints no raw samples, so nothing here has a median unless the tool gave it."""
    output = _Output()
    for line in LINE.finditer(data.decode("utf-8", "replace")):
        output.take(line.group())
    return imported("litert", output.results(), settings=output.settings)


@dataclass
class _Output:
    """What has been read of it, line by line."""

    series: list[dict[str, float]] = field(default_factory=list)  # those before the timings
    timings: list[dict[str, float]] = field(default_factory=list)
    memory: dict[str, float] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    operators: dict[str, dict[str, Any]] = field(default_factory=dict)
    whose: str | None = ""  # operators: "" for the model's, None for none that is asked for
    table: bool = False  # within one by type

    def take(self, line: str) -> None:
        if TIMINGS in line:
            self.timings.append(_timings(line))
        elif any(sign in line for sign in OF_PROFILER):
            self.table = False
        elif "==========" in line:
            self.table = BY_TYPE in line
        elif self._heading(line):
            self.table = False
        elif self.table and self.whose is not None:
            self._operator(line, self.whose)
        elif (series := _series(line)) is not None and not self.timings:
            self.series.append(series)
        elif "emory footprint" in line:
            self.memory |= _memory(line)
        else:
            self._setting(line)

    def results(self) -> dict[str, Any]:
        """UsageError if that was not the output of one whole run."""
        if len(self.timings) != 1:
            seen = f"{len(self.timings)} lines" if self.timings else "no line"
            why = f"this is not the whole output of one run of benchmark_model: {seen} with Inference timings"
            raise UsageError(why, hint="give the output of one run, from STARTING! to its end")
        (timings,) = self.timings
        if "inference" not in timings:
            raise UsageError("this run of benchmark_model measured no inference: its mean is not a number")
        results: dict[str, Any] = {
            "inference": self._runs("inference", -1),
            "warmup": self._runs("warmup", -2),
        }
        results |= {name: spread([timings[name]], "us") for name in ("init", "first inference") if name in timings}
        results |= {f"memory {name}": spread([value], "MB") for name, value in self.memory.items()}
        dearest = sorted(self.operators.items(), key=lambda item: -float(item[1]["mean"]))[:NAME_LIMIT]
        return {name: figure for name, figure in results.items() if figure is not None} | dict(dearest)

    def _runs(self, name: str, place: int) -> dict[str, Any] | None:
        """The series there, which must be the one that the timings sum up; without one, only its mean."""
        mean = self.timings[0].get(name)
        if mean is None:
            return None
        if len(self.series) < -place:
            return {"unit": "us", "mean": mean}
        series = self.series[place]
        if not math.isclose(series.get("mean", math.nan), mean, rel_tol=SAME):
            raise UsageError(
                f"the series of the {name} runs has avg={series.get('mean')}, the line with Inference timings {mean}",
                hint="give the output of one run, from STARTING! to its end",
            )
        return {"unit": "us", "count": int(series["count"])} | {key: series[key] for key in series if key != "count"}

    def _heading(self, line: str) -> bool:
        """What the tables that follow are of. Operators of a subgraph or within a delegate are parts of the model's."""
        subgraph = SUBGRAPH.search(line)
        if INITIALIZATION in line:
            self.whose = None
        elif REGULAR in line or ("Primary graph" in line and self.whose is not None):
            self.whose = ""
        elif subgraph is not None and self.whose is not None:
            self.whose = f"subgraph {subgraph.group(1)} "
        elif "Delegate internal:" in line and self.whose is not None:
            self.whose = "delegate "
        else:
            return False
        return True

    def _operator(self, line: str, whose: str) -> None:
        """A row: node type, count, avg ms, avg %, cdf %, mem KB, times called. Types hold spaces and brackets."""
        cells = line.rsplit(None, 6)
        if len(cells) == 7 and cells[1].isdecimal() and len(cells[1]) < 19 and cells[3].endswith("%"):
            name = COLUMNS.split(cells[0].rstrip())[-1].removeprefix(": ")
            mean = _number(cells[2], f"[avg ms] of {name}")
            self.operators[f"{whose}operator {name}"] = {"unit": "ms", "nodes": int(cells[1]), "mean": mean}

    def _setting(self, line: str) -> None:
        before, bracket, rest = line.partition(": [")
        name = next((name for name in SETTINGS if before.rstrip().endswith(name)), None)
        if bracket and name is not None:
            value = rest.partition("]")[0][:SETTING_LIMIT]
            self.settings.setdefault(name.lower(), value.rpartition("/")[2])


def _series(line: str) -> dict[str, float] | None:
    """`count=50 first=… curr=… min=… max=… avg=… std=…`, of runs that all took the same `count=50 curr=…(all same)`."""
    words = line.partition(SERIES)[2].split(" ")
    if words[0] != "0" and not (len(words) > 1 and words[1].startswith(GOES_ON)):
        return None  # of something else, or there is none
    values = {"count": _number(words[0], "count")}
    for name, value in _pairs(words[1:]):
        values[MEANS.get(name, name)] = value
    if "mean" not in values and "curr" in values:
        values["mean"] = values["curr"]
    return values


def _timings(line: str) -> dict[str, float]:
    """`Init: 5000, First inference: 900, Warmup (avg): nan, Inference (avg): 412.5`; nan of what was not run."""
    found = {}
    for part in line.partition(TIMINGS)[2].split(", "):
        name, colon, value = part.rpartition(": ")
        if colon and "nan" not in value:
            found[name.strip().lower().removesuffix(" (avg)")] = _number(value.strip(), name.strip())
    return found


def _memory(line: str) -> dict[str, float]:
    found = {MEMORY[name]: value for name, value in _pairs(line.split(" ")) if name in MEMORY}
    peak = line.partition("via periodic monitoring: ")[2].strip()
    return found | ({"peak": _number(peak, "the peak memory footprint")} if peak else {})


def _pairs(words: list[str]) -> Iterator[tuple[str, float]]:
    for word in words:
        name, equals, value = word.partition("=")
        number = NUMBER.match(value)
        if equals and name.isalnum() and number is not None:
            yield name, checked(float(number.group()), name)


def _number(text: str, name: str) -> float:
    if NUMBER.fullmatch(text) is None:
        raise UsageError(f"{name} is {text[:40]!r}; it must be a number")
    return checked(float(text), name)
