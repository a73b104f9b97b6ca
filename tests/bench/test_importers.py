"""Importers. The samples here are our own, shaped like those in the sources that docs/formats/importers.md names."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgewise.bench.importers import open as importers
from edgewise.bench.importers.open import READERS, read
from edgewise.bench.measure import Measurement
from edgewise.bench.trace import Span, Track, write
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


LITERT = """I tflite  : STARTING!
Num threads: [4]
Graph: [/data/local/tmp/net.tflite]
count=2 first=900 curr=800 min=800 max=900 avg=850 std=50
count=50 first=400 curr=410 min=390 max=1.2e+03 avg=412.5 std=7 p5=391 median=405 p95=600
Inference timings in us: Init: 5000, First inference: 900, Warmup (avg): 850, Inference (avg): 412.5
Memory footprint delta from the start of the tool (MB): init=4.5 overall=20.25
============================== Summary by node type ==============================
\t             [Node type]\t  [count]\t  [avg ms]\t    [avg %]\t    [cdf %]\t  [mem KB]\t[times called]
\t                 CONV_2D\t       15\t     0.300\t    75.000%\t    75.000%\t     0.000\t       15
\t                 SOFTMAX\t        1\t     0.100\t    25.000%\t   100.000%\t     0.000\t        1
"""


def test_litert(file: File) -> None:
    found = read(file(LITERT))
    assert found.name == "litert"
    assert found.results["inference"] == {
        "unit": "us",
        "count": 50,
        "first": 400,
        "curr": 410,
        "min": 390,
        "max": 1200,
        "mean": 412.5,
        "deviation": 7,
        "p5": 391,
        "median": 405,
        "p95": 600,
    }
    assert found.results["init"]["median"] == 5000
    assert found.results["memory overall"]["median"] == 20.25
    assert found.results["operator CONV_2D"] == {"unit": "ms", "nodes": 15, "mean": 0.3}
    assert found.settings["graph"] == "net.tflite"
    assert found.settings["num threads"] == "4"


XCTRACE = """<?xml version="1.0"?>
<trace-query-result>
<node xpath='//trace-toc[1]/run[1]/data[1]/table[13]'><schema name="time-profile">
<col><mnemonic>time</mnemonic></col></schema>
<row><sample-time id="1" fmt="00:00.300.613">300613208</sample-time><thread id="2" fmt="Main (App, pid: 5)"><tid id="3"
 fmt="0x1">1</tid><process id="4" fmt="App (5)"><pid id="5" fmt="5">5</pid></process></thread><process ref="4"/>
<weight id="6" fmt="1.00 ms">1000000</weight><backtrace id="7"><frame id="8" name="sgemm" addr="0x1"><binary id="9"
 name="libBLAS.dylib"/></frame><frame id="10" name="main" addr="0x2"/></backtrace></row>
<row><sample-time id="11" fmt="00:00.301">301613208</sample-time><thread ref="2"/><process ref="4"/><weight ref="6"/>
<backtrace id="12"><frame ref="8"/><frame ref="10"/></backtrace></row>
<row><thread ref="2"/><process id="13" fmt="Other (6)"/><weight ref="6"/><backtrace ref="7"/></row>
<row><thread ref="2"/><process ref="4"/><weight ref="6"/><sentinel/></row>
</node></trace-query-result>"""


def test_xctrace(file: File) -> None:
    found = read(file(XCTRACE))
    assert found.name == "xctrace"
    assert found.results == {
        "cpu time": {"unit": "ms", "count": 4, "total": 4.0},
        "process App (5)": {"unit": "ms", "count": 3, "total": 3.0},
        "process Other (6)": {"unit": "ms", "count": 1, "total": 1.0},
        "function sgemm": {"unit": "ms", "count": 3, "total": 3.0},
        "function no backtrace": {"unit": "ms", "count": 1, "total": 1.0},
    }


def test_perfetto(tmp_path: Path) -> None:
    pytest.importorskip("perfetto", reason="the extra edgewise[profile] is not installed")
    path = tmp_path / "a.pftrace"
    write(path, "app", [Track("t", [Span(0, 3_000_000, "infer"), Span(5_000_000, 9_000_000, "infer")])])
    assert read(path).results["slice infer"]["samples"] == [3.0, 4.0]


def test_it_is_kept_as_a_measurement(file: File, tmp_path: Path) -> None:
    for text in (json.dumps(TESTS), LITERT, XCTRACE):
        found = read(file(text))
        assert Measurement.read(found.save(tmp_path / "kept")) == found


def test_a_tool_without_a_sampled_format_is_not_claimed(file: File) -> None:
    with pytest.raises(UsageError, match="no importer for 'simpleperf'; there are llama-bench"):
        read(file(""), "simpleperf")
    with pytest.raises(UsageError, match="the table 'os-signpost' of xctrace; only time-profile is read"):
        read(file(XCTRACE.replace("time-profile", "os-signpost")))


BOMB = (
    '<?xml version="1.0"?><!DOCTYPE lolz [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>'
    '<trace-query-result><node><schema name="time-profile"/>&b;</node></trace-query-result>'
)


@pytest.mark.parametrize(
    ("tool", "content", "why"),
    [
        (None, "", "this is no file of"),
        (None, b"\x89PNG", "this is no file of"),
        ("xctrace", BOMB, "document type"),
        ("xctrace", XCTRACE[:-30], "not whole XML"),
        ("xctrace", "<a>" * 1000, "nested deeper"),
        ("xctrace", "<trace-query-result/>", "no table|with the table"),
        ("xctrace", XCTRACE.replace("1000000<", "1e999<"), "a weight is inf"),
        ("xctrace", XCTRACE.replace("1000000<", "much<"), "a weight is 'much'"),
        ("llama-bench", json.dumps(TESTS)[:-20], "not JSON"),
        ("llama-bench", "[]", "holds no result"),
        ("llama-bench", json.dumps([bench_row(n_prompt="x")]), "n_prompt"),
        ("llama-bench", json.dumps([bench_row(samples_ts=[-1.0])]), "not negative"),
        ("llama-bench", json.dumps([bench_row()] * 501), "at most 500"),
        ("llama-bench", "[" * 100_000, "not JSON"),
        ("onnxruntime", '[{"cat": "Session", "name": "model_run", "dur": "x"}]', "dur"),
        ("onnxruntime", '[{"cat": "Session", "name": "model_run", "dur": -1}]', "not negative"),
        ("onnxruntime", '[{"cat": "cc", "name": "x"}]', "Session or Node"),
        ("litert", LITERT.partition("Inference")[0], "not the whole output"),
        ("litert", LITERT.replace("avg=412.5", "avg=1e999"), "avg is inf"),
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
    monkeypatch.setattr(Path, "read_bytes", pytest.fail)
    with pytest.raises(UsageError, match="has 100 bytes; at most 99"):
        read(path)


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
