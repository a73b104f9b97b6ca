"""Exports of Xcode Instruments. The samples have the shape of those described in sundresh/WindowsProfilingTools,
ProfileAnalyzer/Docs/InstrumentsTraceXML.md, and, with `tagged-backtrace`, of those that LadybirdBrowser/ladybird,
Meta/analyze-xctrace-time-profile.py reads. The names and numbers are ours."""

from __future__ import annotations

from typing import Any

import pytest

from edgewise.bench.importers import xctrace
from edgewise.errors import UsageError

START = """<?xml version="1.0"?>
<trace-query-result>
<node xpath='//trace-toc[1]/run[1]/data[1]/table[13]'><schema name="time-profile">
<col><mnemonic>time</mnemonic><name>Sample Time</name><engineering-type>sample-time</engineering-type></col></schema>
"""
END = "</node></trace-query-result>"
FIRST = """<row><sample-time id="1" fmt="00:00.300.613">300613208</sample-time><thread id="2" fmt="Main (App, pid: 5)">
<tid id="3" fmt="0x1">1</tid><process id="4" fmt="App (5)"><pid id="5" fmt="5">5</pid></process></thread>
<process ref="4"/><core id="14" fmt="CPU 0 (E Core)">0</core><thread-state id="15" fmt="Running">Running</thread-state>
<weight id="6" fmt="1.00 ms">1000000</weight><backtrace id="7"><frame id="8" name="sgemm" addr="0x1"><binary id="9"
 name="libBLAS.dylib"/></frame><frame id="10" name="main" addr="0x2"/></backtrace></row>
"""
XCTRACE = (
    START
    + FIRST
    + """<row><sample-time id="11" fmt="00:00.301">301613208</sample-time><thread ref="2"/><process ref="4"/>
<thread-state ref="15"/><weight ref="6"/><backtrace id="12"><frame ref="8"/><frame ref="10"/></backtrace></row>
<row><thread ref="2"/><process id="13" fmt="Other (6)"/><thread-state ref="15"/><weight ref="6"/><backtrace ref="7"/>
</row><row><thread ref="2"/><process ref="4"/><weight ref="6"/><sentinel/></row>
"""
    + END
)
AROUND = """<row><weight ref="6"/><process ref="4"/><tagged-backtrace id="20" fmt="relu ← (1 other frame)">
<backtrace id="21"><frame id="22" name="relu" addr="0x3"><source line="3"><path id="24">/a.c</path></source></frame>
<frame ref="10"/></backtrace></tagged-backtrace></row><row><weight ref="6"/><tagged-backtrace ref="20"/></row>
<row><weight ref="6"/><backtrace ref="21"/></row>
"""
INSTEAD = """<row><weight ref="6"/><process ref="4"/><tagged-backtrace id="30"><frame id="31" name="softmax"/>
<frame ref="10"/></tagged-backtrace></row><row><weight ref="6"/><tagged-backtrace ref="30"/></row>
"""


def export(*rows: str) -> bytes:
    return "".join([START, *rows, END]).encode()


def totals(*rows: str) -> dict[str, float]:
    found = xctrace.read(export(*rows)).results
    return {name.removeprefix("function "): one["total"] for name, one in found.items() if name.startswith("function")}


def test_an_export() -> None:
    found = xctrace.read(XCTRACE.encode())
    assert found.name == "xctrace"
    assert found.results == {
        "cpu time": {"unit": "ms", "count": 4, "total": 4.0},
        "process App (5)": {"unit": "ms", "count": 3, "total": 3.0},
        "process Other (6)": {"unit": "ms", "count": 1, "total": 1.0},
        "function sgemm": {"unit": "ms", "count": 3, "total": 3.0},
        "function no backtrace": {"unit": "ms", "count": 1, "total": 1.0},
    }
    assert found.settings == {"imported_from": "xctrace", "table": "time-profile"}


def test_a_tagged_backtrace_stands_around_a_backtrace_or_in_its_place() -> None:
    assert totals(FIRST, AROUND) == {"sgemm": 1.0, "relu": 3.0}
    assert totals(FIRST, INSTEAD) == {"sgemm": 1.0, "softmax": 2.0}


def test_a_frame_without_a_name_has_an_address() -> None:
    assert totals(FIRST, '<row><weight ref="6"/><backtrace><frame addr="0x9"/><frame ref="8"/></backtrace></row>') == {
        "sgemm": 1.0,
        "0x9": 1.0,
    }


def test_an_export_without_any_frame_is_refused() -> None:
    """Of a table that was not made readable, or with stacks that we do not know: not a profile of "no backtrace"."""
    row = '<row><weight id="6">5</weight><kperf-bt id="7"><text-addresses>1 2</text-addresses></kperf-bt></row>'
    with pytest.raises(UsageError, match=r"none of the 2 samples has a frame: .*<backtrace> and <tagged-backtrace>"):
        xctrace.read(export(row, '<row><weight ref="6"/><kperf-bt ref="7"/></row>'))


def test_threads_that_wait_take_no_cpu_time() -> None:
    waits = '<row><thread-state id="40" fmt="Blocked">Blocked</thread-state><weight ref="6"/><backtrace ref="7"/></row>'
    found = xctrace.read(export(FIRST, waits, "<row><thread-state ref='40'/></row>", "<row><sentinel/></row>"))
    assert found.results["cpu time"] == {"unit": "ms", "count": 1, "total": 1.0}
    assert found.settings["left_out"] == {
        "samples of threads that did not run": 2,
        "samples without a weight": 1,
    }


@pytest.mark.parametrize("content", ["7", "<binary/>", "<frame name='x'/>"])
def test_what_refers_to_another_holds_nothing_itself(content: str) -> None:
    """Once the text went to the one that was meant: weights of 5, 7 and 5 ns became 119."""
    spoiled = f'<row><weight ref="6">{content}</weight><backtrace ref="7"/></row>'
    with pytest.raises(UsageError, match="refers to one before it and has content of its own"):
        xctrace.read(export(FIRST, spoiled, '<row><weight ref="6"/><backtrace ref="7"/></row>'))
    spoiled = f'<row><weight ref="6"/><backtrace ref="7">{content}</backtrace></row>'
    with pytest.raises(UsageError, match="refers to one before it and has content of its own"):
        xctrace.read(export(FIRST, spoiled))
    assert totals(FIRST, '<row><weight ref="6">\n</weight><backtrace ref="7"/></row>') == {"sgemm": 2.0}


def test_who_is_referred_to_stands_before() -> None:
    with pytest.raises(UsageError, match="a <weight> refers to id '66', which stands nowhere before it"):
        xctrace.read(export(FIRST, '<row><weight ref="66"/></row>'))
    with pytest.raises(UsageError, match="a <backtrace> refers to id '6'"):
        xctrace.read(export(FIRST, '<row><backtrace ref="6"/></row>'))


BOMB = (
    '<?xml version="1.0"?><!DOCTYPE lolz [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>'
    '<trace-query-result><node><schema name="time-profile"/>&b;</node></trace-query-result>'
)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (BOMB, "document type"),
        (XCTRACE[:-30], "not whole XML"),
        ("<a>" * 1000, "nested deeper"),
        ("<trace-query-result/>", "with the table time-profile"),
        (START + END, "holds no result"),
        (XCTRACE.replace("time-profile", "os-signpost"), "the table 'os-signpost' of xctrace; only time-profile"),
        (XCTRACE.replace("1000000<", "1e999<"), "a weight is inf"),
        (XCTRACE.replace("1000000<", "1e300<"), r"a weight is 1e\+300; no time"),
        (XCTRACE.replace("1000000<", "much<"), "a weight is 'much'"),
        (XCTRACE.replace("1000000<", "1" * 200 + "<"), "a <weight> has more than 100 characters"),
    ],
)
def test_what_is_no_export_is_refused(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        xctrace.read(text.encode())


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "row", ['<row><weight ref="6"/><backtrace ref="7"/></row>', FIRST, "<row/>", "&#32;", "<a b=''/>"]
)
def test_work_grows_with_the_file(row: str) -> None:
    rows: Any = [row] * ((2 << 20) // len(row))
    assert totals(FIRST, *rows)
