"""Importers. The samples here are our own, shaped like those in the sources that docs/formats/importers.md names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_import_litert import SECTIONS as LITERT
from test_import_xctrace import XCTRACE

from edgewise.bench.importers import open as importers
from edgewise.bench.importers.open import READERS, read
from edgewise.bench.importers.result import printable
from edgewise.bench.measure import Measurement
from edgewise.bench.trace import Span, Track, library, write
from edgewise.errors import EdgewiseError, UsageError

File = Callable[[str | bytes], Path]


@pytest.fixture
def file(tmp_path: Path) -> File:
    def made(content: str | bytes) -> Path:
        path = tmp_path / "results"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return made


def bench_row(**changes: Any) -> dict[str, Any]:
    return {
        "build_commit": "abc1234",
        "build_number": 9000,
        "cpu_info": "A CPU",
        "gpu_info": "",
        "model_type": "tiny 1B Q4_0",
        "n_threads": 4,
        "n_prompt": 512,
        "n_gen": 0,
        "n_depth": 0,
        "test_time": "2026-01-02T03:04:05Z",
        "avg_ns": 5,
        "avg_ts": 100.0,
        "stddev_ts": 1.0,
        "samples_ns": [1, 2, 3],
        "samples_ts": [99.0, 100.0, 102.0],
    } | changes


TESTS = [bench_row(), bench_row(n_prompt=0, n_gen=128, n_threads=2), bench_row(n_gen=32, n_depth=256, samples_ts=[])]


@pytest.mark.parametrize("text", [json.dumps(TESTS, indent=2), "\n".join(map(json.dumps, TESTS)) + "\n"])
def test_llama_bench(file: File, text: str) -> None:
    found = read(file(text))
    assert found.name == "llama-bench"
    assert found.command == "edgewise bench import results"
    assert found.date == "2026-01-02T03:04:05Z"
    assert found.versions == {"llama.cpp": "9000 (abc1234)"}
    assert (found.machine["cpu"], found.machine["gpu"], found.machine["cores"]) == ("A CPU", None, None)
    assert found.settings["model_type"] == "tiny 1B Q4_0"
    assert len(found.settings["file_sha256"]) == 64
    prefill = found.results["pp512 n_threads=4"]
    assert (prefill["unit"], prefill["samples"], prefill["median"]) == ("tok/s", [99.0, 100.0, 102.0], 100.0)
    assert found.results["tg128 n_threads=2"]["n_threads"] == 2
    assert found.results["pp512+tg32 @ d256 n_threads=4"] == {
        "unit": "tok/s",
        "mean": 100.0,
        "deviation": 1.0,
        "n_threads": 4,
    }


def test_two_alike_tests_are_two_results(file: File) -> None:
    assert set(read(file(json.dumps([bench_row(), bench_row()]))).results) == {"pp512", "pp512 (test 2)"}


PROFILED = """
import sys, numpy, onnx, onnxruntime
x, y = (onnx.helper.make_tensor_value_info(name, 1, [2]) for name in "xy")
graph = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "x"], ["y"])], "g", [x], [y])
model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
options = onnxruntime.SessionOptions()
options.enable_profiling, options.profile_file_prefix = True, sys.argv[1]
session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
for _ in range(3):
    session.run(None, {"x": numpy.ones(2, numpy.float32)})
print(session.end_profiling())
"""


def test_onnxruntime_writes_what_we_read(tmp_path: Path) -> None:
    """A real profile of the installed onnxruntime, in a process with a thread pool of its own."""
    command = [sys.executable, "-c", PROFILED, str(tmp_path / "ort")]
    found = read(Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()))
    assert found.name == "onnxruntime"
    assert len(found.results["model_run"]["samples"]) == 3
    assert found.results["operator Add (CPUExecutionProvider)"]["count"] == 3
    assert "session_initialization" in found.results
    assert (found.date, found.versions) == ("unknown", {})


def test_perfetto(tmp_path: Path) -> None:
    pytest.importorskip("perfetto", reason="the extra edgewise[profile] is not installed")
    path = tmp_path / "a.pftrace"
    write(path, "app", [Track("t", [Span(0, 3_000_000, "infer"), Span(5_000_000, 9_000_000, "infer")])])
    found = read(path)
    assert found.results["slice infer"]["samples"] == [3.0, 4.0]
    assert "left_out" not in found.settings


def test_what_is_left_out_of_a_perfetto_trace_is_told(file: File) -> None:
    pytest.importorskip("perfetto", reason="the extra edgewise[profile] is not installed")
    protos = library()
    trace = protos.Trace()
    bundle = trace.packet.add().ftrace_events
    for at, text in ((1, "E|7"), (2, "B|7|a"), (3, "E|7"), (4, "B|7|b")):
        bundle.event.add(timestamp=at, pid=8).print.buf = text
    found = read(file(trace.SerializeToString()))
    assert found.results.keys() == {"slice a"}
    assert found.settings["left_out"] == {
        "slices that began before the recording": 1,
        "slices that the recording does not see end": 1,
    }
    del bundle.event[1:3]
    with pytest.raises(UsageError, match="holds no result; 1 slices that began before the recording were left out"):
        read(file(trace.SerializeToString()), "perfetto")
    del bundle.event[:]
    for at, text in ((1, "B|7|\x1b[2J"), (1 << 63, "E|7")):
        bundle.event.add(timestamp=at, pid=8).print.buf = text
    with pytest.raises(UsageError, match=r"duration of \\x1b\[2J in ns is 9223372036854775807; no time"):
        read(file(trace.SerializeToString()))


def test_it_is_kept_as_a_measurement(file: File, tmp_path: Path) -> None:
    for text in (json.dumps(TESTS), LITERT, XCTRACE):
        found = read(file(text))
        assert Measurement.read(found.save(tmp_path / "kept")) == found


def test_a_tool_without_a_sampled_format_is_not_claimed(file: File) -> None:
    with pytest.raises(UsageError, match="no importer for 'simpleperf'; there are llama-bench"):
        read(file(""), "simpleperf")


@pytest.mark.parametrize(
    ("tool", "content", "why"),
    [
        (None, "", "this is no file of"),
        (None, b"\x89PNG", "this is no file of"),
        ("xctrace", XCTRACE.replace("1000000<", "much<"), "a weight is 'much'"),
        ("llama-bench", json.dumps(TESTS)[:-20], "not JSON"),
        ("llama-bench", "[]", "holds no result"),
        ("llama-bench", json.dumps([bench_row(n_prompt="x")]), "n_prompt"),
        ("llama-bench", json.dumps([bench_row(samples_ts=[-1.0])]), "not negative"),
        ("llama-bench", json.dumps([bench_row(samples_ts=[1e308] * 3)]), r"a sample of samples_ts is 1e\+308; no time"),
        ("llama-bench", json.dumps([bench_row(samples_ts=[], avg_ts=1e200)]), r"avg_ts is 1e\+200"),
        ("llama-bench", json.dumps([bench_row(samples_ts=[], stddev_ts=-1.0)]), "stddev_ts is -1"),
        ("llama-bench", json.dumps([bench_row()] * 501), "at most 500"),
        ("llama-bench", "[" * 100_000, "not JSON"),
        ("onnxruntime", '[{"cat": "Session", "name": "model_run", "dur": "x"}]', "dur"),
        ("onnxruntime", '[{"cat": "Session", "name": "model_run", "dur": -1}]', "not negative"),
        ("onnxruntime", '[{"cat": "Session", "name": "model_run", "dur": 1e308}]', "duration of model_run is 1e"),
        ("onnxruntime", '[{"cat": "cc", "name": "x"}]', "Session or Node"),
        ("litert", b"\xff" * 100, "not the whole output"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(file: File, tool: str | None, content: str | bytes, why: str) -> None:
    with pytest.raises(UsageError, match=why) as refused:
        read(file(content), tool)
    assert "results" in str(refused.value)


def test_a_huge_file_is_refused_unread(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    path = file("x" * 100)
    monkeypatch.setattr(importers, "SIZE_LIMIT", 99)
    monkeypatch.setattr(Path, "open", pytest.fail)
    with pytest.raises(UsageError, match="has 100 bytes; at most 99"):
        read(path)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc here, whose files have no size")
def test_a_file_with_more_than_it_says_is_read_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importers, "SIZE_LIMIT", 99)
    with pytest.raises(UsageError, match="has more bytes than it says; at most 99"):
        read(Path("/proc/self/maps"))


@pytest.mark.timeout(20)
def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    """A device never ends, a pipe may never begin."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(UsageError, match=f"{path} is not a regular file"):
            read(path, "litert")
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "nowhere")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("start", ["", "[", "[{", '[{"cat"', '[{"cat":'])
def test_telling_the_tool_takes_no_time_that_grows_with_the_square(start: str, file: File) -> None:
    """64 KB of spaces took 4 seconds once."""
    for filling in (" ", "{", '"', '"cat"'):
        with pytest.raises(UsageError, match="no file of"):
            read(file(start + filling * (1 << 20)))


def test_names_cannot_speak_to_a_terminal(file: File) -> None:
    name = "\x1b[2Jred\x9b31m\u202eok\n"
    assert printable(name) == "\\x1b[2Jred\\x9b31m\\u202eok\\n"
    node = {"cat": "Node", "name": f"{name}_kernel_time", "dur": -1}
    with pytest.raises(UsageError) as refused:
        read(file(json.dumps([node, {"cat": "Session", "name": "model_run", "dur": 1}])))
    assert printable(name) in str(refused.value)
    assert str(refused.value).isprintable()


RUN = '[{"cat": "Session", "name": "model_run", "dur": 1}]'
SAMPLES = (json.dumps(TESTS), RUN, LITERT, XCTRACE, "\n\x05abc")


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SAMPLES), st.data())
def test_damage_is_refused_or_read_but_never_crashes(sample: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(sample)))
    end = data.draw(st.integers(start, len(sample)))
    damaged = (sample[:start] + data.draw(st.text(max_size=8)) + sample[end:]).encode("utf-8", "replace")
    for reader in READERS.values():
        with suppress(EdgewiseError):
            assert isinstance(reader(damaged), Measurement)
