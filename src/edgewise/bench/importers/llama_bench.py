"""llama-bench, `-o json` and `-o jsonl`.

Source of the format: ggml-org/llama.cpp, tools/llama-bench/README.md, "Output formats".
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from edgewise.bench.importers.result import checked, decoded, imported, spread
from edgewise.bench.measure import Measurement
from edgewise.errors import UsageError

TEST_LIMIT = 500  # each gets its bootstrap interval
WHAT = "JSON or JSON lines of llama-bench"
# What a test is or gave, as against how it was set up.
OUTCOME = {"test_time", "avg_ns", "stddev_ns", "avg_ts", "stddev_ts", "samples_ns", "samples_ts"}
SHAPE = {"n_prompt", "n_gen", "n_depth"}
ORIGIN = {"build_commit", "build_number", "cpu_info", "gpu_info"}


class _Test(msgspec.Struct):
    """The fields that must be there, and the ones that have a place of their own in a Measurement."""

    n_prompt: int
    n_gen: int
    avg_ts: float
    n_depth: int = 0
    stddev_ts: float | None = None
    samples_ts: list[float] = []
    build_commit: str | None = None
    build_number: int | None = None
    cpu_info: str | None = None
    gpu_info: str | None = None
    test_time: str | None = None


def read(data: bytes) -> Measurement:
    if data.lstrip().startswith(b"["):
        tests, raw = decoded(data, list[_Test], WHAT), decoded(data, list[dict[str, Any]], WHAT)
    else:
        lines = [line for line in data.splitlines() if line.strip()]
        tests = [decoded(line, _Test, WHAT) for line in lines]
        raw = [decoded(line, dict[str, Any], WHAT) for line in lines]
    if len(tests) > TEST_LIMIT:
        raise UsageError(f"the file holds {len(tests)} tests; at most {TEST_LIMIT} are read", hint="split it")
    setups = [{key: row[key] for key in row if key not in OUTCOME | SHAPE | ORIGIN} for row in raw]
    shared = _shared(setups)
    results: dict[str, Any] = {}
    for test, setup in zip(tests, setups, strict=True):
        own = {key: value for key, value in setup.items() if key not in shared}
        name = _name(test, own)
        results[name if name not in results else f"{name} (test {len(results) + 1})"] = _speed(test) | own
    return imported(
        "llama-bench",
        results,
        date=next((test.test_time for test in tests), None),
        machine={"cpu": _all(test.cpu_info for test in tests), "gpu": _all(test.gpu_info for test in tests)},
        versions=_versions(tests),
        settings=shared,
    )


def _shared(setups: list[dict[str, Any]]) -> dict[str, Any]:
    """What all tests have in common."""
    first = setups[0] if setups else {}
    return {key: value for key, value in first.items() if all(key in s and s[key] == value for s in setups)}


def _all(values: Iterable[str | None]) -> str | None:
    return ", ".join(sorted({value for value in values if value})) or None


def _speed(test: _Test) -> dict[str, Any]:
    """Raw samples where the file has them; llama-bench's own mean and deviation where not."""
    samples = [checked(sample, "a sample of samples_ts") for sample in test.samples_ts]
    if samples:
        return spread(samples, "tok/s")
    deviation = None if test.stddev_ts is None else checked(test.stddev_ts, "stddev_ts")
    return {"unit": "tok/s", "mean": checked(test.avg_ts, "avg_ts"), "deviation": deviation}


def _name(test: _Test, own: dict[str, Any]) -> str:
    """llama-bench's own way to name a test (pp512, tg128, pp512+tg128, "@ d512"), and what tells it from others."""
    parts = [f"pp{test.n_prompt}"] * (test.n_prompt > 0) + [f"tg{test.n_gen}"] * (test.n_gen > 0)
    depth = f" @ d{test.n_depth}" if test.n_depth else ""
    return "+".join(parts) + depth + "".join(f" {key}={value}" for key, value in own.items())


def _versions(tests: list[_Test]) -> dict[str, str]:
    builds = _all(f"{test.build_number} ({test.build_commit})" for test in tests if test.build_commit is not None)
    return {"llama.cpp": builds} if builds else {}
