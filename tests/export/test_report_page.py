"""The page of a report: whole, without anything from elsewhere, whatever the facts hold or lack."""

from __future__ import annotations

import copy
import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgewise.export.report.bars import Bar, bars
from edgewise.export.report.page import LEVELS, page

ALONE = {"meta", "br", "path", "rect"}  # without an end
NAMES = {
    "html",
    "head",
    "title",
    "style",
    "body",
    "header",
    "main",
    "h1",
    "h2",
    "h3",
    "p",
    "b",
    "dl",
    "dt",
    "dd",
    "div",
}
NAMES |= {"table", "caption", "thead", "tbody", "tr", "th", "td", "span", "ul", "li", "details", "summary", "code"}
NAMES |= {"svg", "text"} | ALONE

DROP = {"point": 0.004, "low": -0.002, "high": 0.012, "metric": "top-1 accuracy", "n": 500, "accuracy": 0.742}
REPORT: dict[str, Any] = {
    "model": {
        "name": "lite0",
        "source": "efficientnet-lite0",
        "task": "classify",
        "parameters": 4652008,
        "preprocessing": {"mean": [0.498, 0.498, 0.498], "size": 224},
    },
    "data": {"rows": 500, "labelled": True, "random": False, "calibration_rows": 64, "shared": True},
    "gate": {"max_drop": 0.01, "strict": False},
    "host": {"system": "Linux", "machine": "x86_64", "cores": 2, "python": "3.11.7"},
    "targets": {
        "litert:int8": {
            "status": "refused",
            "precision": "int8",
            "level": "executed",
            "by": "ai-edge-litert 2.3.0, XNNPACK",
            "path": "out/refused/litert-int8/lite0.tflite",
            "files": ["out/refused/litert-int8/lite0.tflite"],
            "bytes": 5347632,
            "sha256": "ab" * 32,
            "parity": {
                "max_abs": 1.5,
                "rel_l2": 0.13,
                "cosine": 0.99213,
                "snr_db": 17.5,
                "top1_agreement": 0.91,
                "kl_mean": 0.084,
                "kl_p99": 0.61,
            },
            "drop": {**DROP, "point": 0.024, "low": 0.011, "high": 0.037},
            "coverage": {
                "nodes": 62,
                "accelerated": 60,
                "accelerator": "XNNPACK",
                "fallback": [{"op": "SOFTMAX", "count": 2, "why": "not in int8", "hint": "leave it out of the file"}],
            },
            "weights": {"int8": 4_600_000, "float32": 51_000},
            "skipped": ["blocks.3.conv"],
            "checks": [
                {"name": "loads", "ok": True, "detail": "62 operators"},
                {"name": "drop", "ok": False, "detail": "2.40 % exceeds 1.00 %"},
            ],
            "latency_ms": {"median": 12.25, "p10": 11.5, "p90": 14.0, "n": 20, "where": "host"},
            "where": {
                "layer": "blocks.3.conv",
                "error": 0.31,
                "before": {"layer": "blocks.2.add", "error": 0.02},
                "after": ["blocks.3.add", 0.29],
            },
            "error": None,
            "versions": {"ai-edge-litert": "2.3.0"},
            "seconds": 41.5,
            "notes": ["inputs stay float"],
        },
        "coreml": {
            "status": "ok",
            "precision": "fp16",
            "level": "spec-checked",
            "path": "out/coreml/lite0.mlpackage",
            "bytes": 9_400_000,
            "sha256": "cd" * 32,
            "files_sha256": {"lite0.mlpackage": "cd" * 32},
            "interpreted": {"cosine": 0.99999871, "rel_l2": 0.002, "kl_mean": 1e-5, "top1_agreement": 1.0},
            "drop": DROP,
            "coverage": {
                "nodes": 70,
                "accelerated": 70,
                "accelerator": "Neural Engine, as Apple lists it",
                "fallback": [],
            },
            "weights": {"float16": 9_300_000},
            "checks": [{"name": "weights", "ok": True, "detail": "51 tensors as the source's"}],
            "latency_ms": None,
        },
        "qnn": {
            "status": "failed",
            "precision": "int8",
            "level": "unverified",
            "error": {"kind": "UnsupportedModel", "message": "no kernel for Unique", "hint": "replace it"},
        },
    },
}


class Reader(HTMLParser):
    """Holds every end against its beginning, and keeps what was read."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag in NAMES, tag
        self.tags.append((tag, dict(attributes)))
        if tag not in ALONE:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag in ALONE
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data + " "


def read(report: dict[str, Any]) -> Reader:
    text = page(report)
    text.encode("utf-8")
    found = Reader(text)
    allowed = {"class", "scope", "lang", "charset", "name", "content", "http-equiv", "role", "aria-label"}
    allowed |= {"viewbox", "d", "x", "y", "width", "height", "text-anchor"}
    for tag, attributes in found.tags:
        assert attributes.keys() <= allowed, (tag, attributes)  # no address, no script, no handler
    assert not re.search(r"url\(|@import|://", text)
    return found


def test_a_page_says_what_the_report_says() -> None:
    found = read(REPORT)
    text = " ".join(found.text.split())
    for words in (
        "3 artifacts: 1 passed, 1 refused, 1 failed.",
        "5.35 MB",
        "2.40 % (1.10 % to 3.70 %) top-1 accuracy of 500 rows",
        "0.99213",
        "97 % 60 of 62, XNNPACK",
        "12.2 ms (11.5 to 14, n = 20)",
        "SOFTMAX",
        "leave it out of the file",
        "blocks.3.conv (error 0.31); blocks.2.add (error 0.02) before, blocks.3.add (error 0.29) behind",
        "no kernel for Unique",
        "What to do: replace it",
        "2.40 % exceeds 1.00 %",
        "Calibration rows: 64, judged on as well",
        "mean 0.498 0.498 0.498",
        "Outputs against the source's of our interpreter of its operators, not of its runtime.",
        "ab" * 32,
        "cd" * 32,
        "ai-edge-litert",
        "budget 1.00 %",
    ):
        assert words in text, words
    for level in ("executed", "spec-checked", "unverified"):
        assert LEVELS[level] in text
    assert LEVELS["emulated"] not in text


def test_host_speed_is_never_shown_as_the_devices() -> None:
    found = read(REPORT)
    assert found.text.count("Latency") == found.text.count("Latency on this host, not the device") == 2


def test_a_page_can_be_read_aloud() -> None:
    found = read(REPORT)
    assert found.tags[0] == ("html", {"lang": "en"})
    assert sum(tag == "table" for tag, _ in found.tags) == sum(tag == "caption" for tag, _ in found.tags)
    assert all("scope" in attributes for tag, attributes in found.tags if tag == "th")
    plots = [attributes for tag, attributes in found.tags if tag == "svg"]
    assert len(plots) == 5
    assert all(plot["role"] == "img" and "litert:int8" in str(plot["aria-label"]) for plot in plots)


HOSTILE = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "</title></style><b>",
    "&lt;&amp",
    "half \ud800 a letter",
    "zero \x00 and \x1b[31mred",
    "‮backwards",
    "http" + "://example.org/`${x}`",
)


def places(value: Any) -> int:
    """How many texts there are."""
    if isinstance(value, dict):
        return len(value) + sum(map(places, value.values()))
    return sum(map(places, value)) if isinstance(value, list) else isinstance(value, str)


def poisoned(value: Any, text: str, keys: bool) -> Any:
    """With that text in the place of every other, and in names that a stranger chooses."""
    if isinstance(value, dict):
        free = ("targets", "versions", "weights", "files_sha256", "preprocessing", "host")
        return {f"{key}{text}" if keys else key: poisoned(one, text, key in free) for key, one in value.items()}
    if isinstance(value, list):
        return [poisoned(one, text, False) for one in value]
    return text if isinstance(value, str) else value


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_words_stay_words(text: str) -> None:
    report = poisoned(copy.deepcopy(REPORT), text, False)
    assert places(report) == places(REPORT)
    html = page(report).replace("://", " ")
    found = Reader(html)
    assert {tag for tag, _ in found.tags} <= NAMES - {"img", "script"}
    assert "\x00" not in html
    assert "\x1b" not in html


def without(value: Any, path: tuple[Any, ...], instead: Any) -> Any:
    """A copy in which one fact is another."""
    found = copy.deepcopy(value)
    inner = found
    for key in path[:-1]:
        inner = inner[key]
    if instead is KeyError:
        del inner[path[-1]]
    else:
        inner[path[-1]] = instead
    return found


def paths(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, one in pairs for path in ((*here, key), *paths(one, (*here, key)))]


@given(
    st.lists(st.sampled_from(paths(REPORT)), min_size=1, max_size=3),
    st.sampled_from(
        [KeyError, None, "a word", 7, -1.5, float("nan"), float("inf"), 10**400, [], {}, [1], {"a": [None]}, True]
    ),
)
def test_facts_that_are_missing_or_of_another_kind_are_no_fault(where: list[tuple[Any, ...]], instead: Any) -> None:
    report = REPORT
    for path in where:
        try:
            report = without(report, path, instead)
        except (KeyError, IndexError, TypeError):
            continue
    found = read(report)
    assert "export report" in found.text


def test_a_report_of_nothing_is_a_page() -> None:
    assert "0 artifacts: none." in read({}).text
    assert "0 artifacts" in read({"targets": {}, "model": None}).text


@given(
    st.lists(st.tuples(st.floats(-1e9, 1e9), st.floats(0, 1e9)), min_size=1, max_size=6),
    st.none() | st.floats(0, 1e9),
)
def test_bars_stay_within_their_plot(values: list[tuple[float, float]], mark: float | None) -> None:
    rows = [Bar(f"t{n}", value, "", value - wide, value + wide) for n, (value, wide) in enumerate(values)]
    drawn = ElementTree.fromstring(bars("Drop", rows, mark=None if mark is None else (mark, "budget")))
    width = float(drawn.attrib["viewBox"].split()[2])
    boxes = drawn.findall("rect")
    assert len(boxes) == len(rows)
    for box in boxes:
        assert 0 <= float(box.attrib["x"]) <= float(box.attrib["x"]) + float(box.attrib["width"]) <= width
    wide = [float(box.attrib["width"]) for box in boxes]
    for (one, _), its in zip(values, wide, strict=True):
        for (other, _), theirs in zip(values, wide, strict=True):
            assert abs(one) <= abs(other) or its >= theirs - 1.1  # a pixel is the least that can be seen


def test_a_budget_far_beyond_the_bars_is_pointed_at() -> None:
    drawn = bars("Drop", [Bar("a", 0.001, "0.1 %")], mark=(0.5, "budget 50 %"))
    assert "budget 50 % →" in drawn
    assert "→" not in bars("Drop", [Bar("a", 0.4, "40 %")], mark=(0.5, "budget 50 %"))
