"""LiteRT's benchmark_model. The samples have the shape of what tensorflow/tensorflow prints (lite/tools/benchmark/
benchmark_model.cc, xla/tsl/util/stats_calculator.cc, lite/profiling/profile_summary_formatter.cc), checked against
published outputs: its lite/tools/benchmark/README.md and NobuoTsukamoto/meta-tensorflow-lite,
doc/tensorflow-lite-benchmark.md. The numbers are ours."""

from __future__ import annotations

from typing import Any

import pytest

from edgewise.bench.importers import litert
from edgewise.errors import UsageError

RUN = """STARTING!
Log parameter values verbosely: [0]
Num threads: [4]
Graph: [/data/local/tmp/net.tflite]
Enable op profiling: [1]
Use gpu : [0]
#threads used for CPU inference: [4]
Loaded model /data/local/tmp/net.tflite
The input model file size (MB): 4.5
Initialized session in 5ms.
Running benchmark for at least 1 iterations and at least 0.5 seconds but terminate if exceeding 150 seconds.
count=2 first=900 curr=800 min=800 max=900 avg=850 std=50 p5=800 median=900 p95=900

Running benchmark for at least 50 iterations and at least 1 seconds but terminate if exceeding 150 seconds.
count=50 first=400 curr=410 min=390 max=1.2e+03 avg=412.5 std=7 p5=391 median=405 p95=600

Inference timings in us: Init: 5000, First inference: 900, Warmup (avg): 850, Inference (avg): 412.5
Note: as the benchmark tool itself affects memory footprint, the following is only APPROXIMATE to the actual memory.
Memory footprint delta from the start of the tool (MB): init=4.5 overall=20.25
Overall peak memory footprint (MB) via periodic monitoring: 31.5
"""
RUN_ORDER = """============================== Run Order ==============================
\t                             [node type]\t  [first]\t [avg ms]\t     [%]\t  [cdf%]\t  [mem KB]\t[times called]\t[Name]
"""
TOP = """
============================== Top by Computation Time ==============================
\t                             [node type]\t  [first]\t [avg ms]\t     [%]\t  [cdf%]\t  [mem KB]\t[times called]\t[Name]
"""
BY_TYPE = """
Number of nodes executed: 2
============================== Summary by node type ==============================
\t                             [Node type]\t  [count]\t  [avg ms]\t    [avg %]\t    [cdf %]\t  [mem KB]\t[times called]
"""
OF_ALL = (
    "\t                 ModifyGraphWithDelegate\t    9.000\t    9.000\t 90.000%\t 90.000%\t   100.000\t        1\tx/0\n"
)
SECTIONS = (
    RUN
    + "Profiling Info for Benchmark Initialization:\n"
    + RUN_ORDER
    + OF_ALL
    + TOP
    + OF_ALL
    + BY_TYPE
    + """\
\t                 ModifyGraphWithDelegate\t        1\t     9.000\t    90.000%\t    90.000%\t   100.000\t        1
\t                         AllocateTensors\t        1\t     1.000\t    10.000%\t   100.000%\t     0.000\t        2

Timings (microseconds): count=1 curr=10000
Memory (bytes): count=0
2 nodes observed



Operator-wise Profiling Info for Regular Benchmark Runs:
"""
    + RUN_ORDER
    + """\
\t           Convolution (NHWC, QC8) IGEMM\t    0.210\t    0.200\t 55.249%\t 55.249%\t     0.000\t        1\tx:0
"""
    + TOP
    + BY_TYPE
    + """\
\t           Convolution (NHWC, QC8) IGEMM\t       15\t     0.300\t    82.873%\t    82.873%\t     0.000\t       15
\t                                 SOFTMAX\t        1\t     0.062\t    17.127%\t   100.000%\t     0.000\t        1

Timings (microseconds): count=50 first=370 curr=360 min=350 max=400 avg=362 std=5
Memory (bytes): count=0
16 nodes observed



"""
)
INFERENCE = {
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
OPERATORS = {
    "operator Convolution (NHWC, QC8) IGEMM": {"unit": "ms", "nodes": 15, "mean": 0.3},
    "operator SOFTMAX": {"unit": "ms", "nodes": 1, "mean": 0.062},
}


def results(text: str) -> dict[str, Any]:
    return litert.read(text.encode()).results


def operators(text: str) -> dict[str, Any]:
    return {name: figure for name, figure in results(text).items() if "operator " in name}


def test_a_run_without_profiling() -> None:
    found = litert.read(RUN.encode())
    assert (found.name, found.machine["cpu"], found.date) == ("litert", None, "unknown")
    assert found.results["inference"] == INFERENCE
    assert (found.results["warmup"]["count"], found.results["warmup"]["mean"]) == (2, 850)
    assert found.results["init"]["samples"] == [5000]
    assert found.results["first inference"]["median"] == 900
    memory = {name: found.results[f"memory {name}"]["median"] for name in ("after init", "overall", "peak")}
    assert memory == {"after init": 4.5, "overall": 20.25, "peak": 31.5}
    assert found.settings == {
        "imported_from": "litert",
        "num threads": "4",
        "graph": "net.tflite",
        "use gpu": "0",
    }


def test_the_profilers_own_series_is_not_the_run() -> None:
    assert results(SECTIONS)["inference"] == INFERENCE
    assert results(SECTIONS)["warmup"]["count"] == 2


def test_operators_are_those_of_the_regular_runs() -> None:
    assert operators(SECTIONS) == OPERATORS
    assert operators(SECTIONS.partition("Operator-wise")[0]) == {}


@pytest.mark.parametrize("start", ["INFO: ", "I tflite  : ", "07-14 13:14:56.520 22838 22838 I tflite  : "])
def test_each_line_may_be_a_line_of_a_log(start: str) -> None:
    assert results("".join(f"{start}{line}\n" for line in SECTIONS.split("\n"))) == results(SECTIONS)


def test_a_copy_from_a_terminal_has_spaces_for_tabs() -> None:
    assert results(SECTIONS.expandtabs()) == results(SECTIONS)
    assert results(SECTIONS.replace("\n", "\r\n")) == results(SECTIONS)


def test_operators_of_subgraphs_and_within_delegates_stand_apart() -> None:
    """They are parts of the model's operators, which hold their time."""
    before, _, _ = SECTIONS.rpartition("Regular Benchmark Runs:\n")
    table = RUN_ORDER + TOP + BY_TYPE + "\t  WHILE\t  1\t  {}\t  100.000%\t  100.000%\t  0.000\t  1\n\n"
    end = "Timings (microseconds): count=50 curr=5(all same)\nMemory (bytes): count=0\n1 nodes observed\n\n"
    text = (
        f"{before}Regular Benchmark Runs:\nPrimary graph profile:\n{table.format(0.5)}{end}"
        f"Subgraph (index: 1, name: body) profile:\n{table.format(0.25)}Subgraph (index: 1, name: body) {end}"
        f"Delegate internal: \n{table.format(0.125)}{end}"
    )
    assert {name: figure["mean"] for name, figure in operators(text).items()} == {
        "operator WHILE": 0.5,
        "subgraph 1 operator WHILE": 0.25,
        "delegate operator WHILE": 0.125,
    }


def test_the_readmes_sample_has_its_table_first_and_no_series() -> None:
    readme = (
        RUN_ORDER
        + TOP
        + BY_TYPE
        + """\
\t                 CONV_2D\t       15\t     1.250\t    90.000%\t    90.000%\t     0.000\t        0
\t                 SOFTMAX\t        1\t     0.000\t     0.000%\t   100.000%\t     0.000\t        0

Timings (microseconds): count=50 first=79000 curr=81000 min=77000 max=88000 avg=79700 std=1900
Memory (bytes): count=0
31 nodes observed


Average inference timings in us: Warmup: 83000, Init: 38000, Inference: 79760.9
"""
    )
    found = results(readme)
    assert found.pop("init")["samples"] == [38000]
    assert found == {
        "inference": {"unit": "us", "mean": 79760.9},
        "warmup": {"unit": "us", "mean": 83000},
        "operator CONV_2D": {"unit": "ms", "nodes": 15, "mean": 1.25},
        "operator SOFTMAX": {"unit": "ms", "nodes": 1, "mean": 0},
    }
    series = "count=2 first=82000 curr=84000 min=82000 max=84000 avg=83000 std=1\ncount=50 curr=79760.9(all same)\n"
    assert results(series + readme)["inference"] == {"unit": "us", "count": 50, "curr": 79760.9, "mean": 79760.9}


def test_runs_that_all_took_the_same_and_none_to_warm_up() -> None:
    text = """count=0 p5=-2147483648 median=-2147483648 p95=-2147483648
count=3 curr=7(all same) p5=7 median=7 p95=7
Inference timings in us: Init: 5, First inference: 0, Warmup (avg): nan, Inference (avg): 7
"""
    found = results(text)
    assert found["inference"] == {"unit": "us", "count": 3, "curr": 7, "p5": 7, "median": 7, "p95": 7, "mean": 7}
    assert "warmup" not in found


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (RUN.partition("Inference timings")[0], "not the whole output of one run .* no line with Inference timings"),
        (RUN + RUN, "2 lines with Inference timings"),
        (RUN.replace("Inference (avg): 412.5", "Inference (avg): 362"), r"avg=412.5, the line .* 362"),
        (RUN.replace("Inference (avg): 412.5", "Inference (avg): nan"), "measured no inference"),
        (RUN.replace("max=1.2e+03", "max=1e999"), "max is inf"),
        (RUN.replace("std=7", "std=1e+308"), r"deviation|std is 1e\+308; no time"),
        (RUN.replace("Init: 5000", "Init: much"), "Init is 'much'"),
        (SECTIONS.replace("     0.300\t", "     1e400\t"), r"\[avg ms\] of Convolution \(NHWC, QC8\) IGEMM is inf"),
        (RUN.replace("monitoring: 31.5", "monitoring: -1"), "peak memory footprint is '-1'"),
    ],
)
def test_what_is_not_one_whole_run_is_refused(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        litert.read(text.encode())


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "piece",
    [
        "emory footprint ",
        "nference timings in us: ",
        "count=1 curr=1 ",
        "Graph: [",
        "a",
        "a=",
        "\t",
        " ",
        "1%",
        "=",
        "\n",
    ],
)
def test_work_grows_with_the_text_and_not_with_its_square(piece: str) -> None:
    """4 MB of each; a megabyte of the first took 45 seconds once."""
    text = piece * ((4 << 20) // len(piece))
    with pytest.raises(UsageError):
        litert.read(text.encode())


@pytest.mark.timeout(20)
@pytest.mark.parametrize("piece", ["a ", "a  ", "a\t", " ", "a|"])
def test_nor_with_that_of_a_name_or_a_setting(piece: str) -> None:
    text = piece * ((2 << 20) // len(piece)) + "X"
    assert len(operators(SECTIONS.replace("SOFTMAX", text))) == 2
    assert litert.read(RUN.replace("Use gpu : [0]", f"Use gpu : [{text}]").encode()).settings["use gpu"] == text[:500]
