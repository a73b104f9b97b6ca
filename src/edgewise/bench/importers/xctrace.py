"""Xcode Instruments: the table `time-profile` as `xctrace export --xpath …` writes it.

Source of the format: sundresh/WindowsProfilingTools, ProfileAnalyzer/Docs/InstrumentsTraceXML.md, which describes a
real export with its elements. Tables without a published description are refused by name.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Final
from xml.parsers import expat

from edgewise.bench.importers.result import checked, dearest, imported, total
from edgewise.bench.measure import Measurement
from edgewise.errors import UsageError

TABLE: Final = "time-profile"
DEPTH_LIMIT: Final = 64
VALUE_LIMIT: Final = 100  # characters of a number


@dataclass(slots=True)
class _Element:
    """An element of a row while it is open. `label` is what it is called: its `name`, else its `fmt`, else that of the
    first frame within."""

    tag: str
    id: str | None
    label: str
    text: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Sample:
    """A row: weight in ns, and who ran."""

    weight: float = 0.0
    process: str = "unknown"
    function: str = "no backtrace"


def read(data: bytes) -> Measurement:
    """CPU time by process and by the function on top of the stack, the dearest first."""
    samples = _Reader().samples(data)
    processes: dict[str, list[float]] = defaultdict(list)
    functions: dict[str, list[float]] = defaultdict(list)
    for sample in samples:
        processes[sample.process].append(sample.weight / 1e6)
        functions[sample.function].append(sample.weight / 1e6)
    results = {"cpu time": total([sample.weight / 1e6 for sample in samples], "ms")} if samples else {}
    results |= {f"process {name}": total(took, "ms") for name, took in dearest(processes).items()}
    results |= {f"function {name}": total(took, "ms") for name, took in dearest(functions).items()}
    return imported("xctrace", results, settings={"table": TABLE})


class _Reader:
    """Rows out of the XML. An element that was given with `id` is meant again by `ref`. A document type is refused, so
    no entity can be declared and none expands."""

    def __init__(self) -> None:
        self._parser = expat.ParserCreate()
        self._parser.StartDoctypeDeclHandler = self._doctype
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.CharacterDataHandler = self._text
        self._open: list[_Element] = []
        self._known: dict[tuple[str, str], _Element] = {}
        self._row: _Sample | None = None
        self._samples: list[_Sample] = []
        self._table = False

    def samples(self, data: bytes) -> list[_Sample]:
        try:
            self._parser.Parse(data, True)
        except expat.ExpatError as error:
            raise UsageError(f"this is not whole XML: {error}") from error
        if not self._table:
            raise UsageError(f"this is not an export of xctrace with the table {TABLE}")
        return self._samples

    def _doctype(self, *_: object) -> None:
        raise UsageError("this XML declares a document type; an export of xctrace has none")

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        if len(self._open) >= DEPTH_LIMIT:
            raise UsageError(f"this XML is nested deeper than {DEPTH_LIMIT} elements")
        if tag == "schema":
            self._schema(attributes.get("name", ""))
        elif tag == "row":
            self._row = _Sample()
        known = self._known.get((tag, attributes["ref"])) if "ref" in attributes else None
        label = attributes.get("name") or attributes.get("fmt") or ""
        self._open.append(known or _Element(tag, attributes.get("id"), label))

    def _schema(self, name: str) -> None:
        if name != TABLE:
            raise UsageError(f"this is the table {name!r} of xctrace; only {TABLE} is read", hint="export that one")
        self._table = True

    def _text(self, text: str) -> None:
        element = self._open[-1] if self._open else None
        if element is not None and element.tag == "weight" and sum(map(len, element.text)) < VALUE_LIMIT:
            element.text.append(text)

    def _end(self, tag: str) -> None:
        element = self._open.pop()
        if element.id is not None:
            self._known[element.tag, element.id] = element
        if tag == "frame" and self._open and not self._open[-1].label:  # the first is the top of the stack
            self._open[-1].label = element.label
        if tag == "row" and self._row is not None:
            self._samples.append(self._row)
            self._row = None
        elif self._row is not None and self._open and self._open[-1].tag == "row":
            self._cell(self._row, element)

    def _cell(self, row: _Sample, element: _Element) -> None:
        if element.tag == "weight":
            row.weight = _number("".join(element.text))
        elif element.tag == "process":
            row.process = element.label or row.process
        elif element.tag == "backtrace":
            row.function = element.label or row.function


def _number(text: str) -> float:
    try:
        return checked(float(text), "a weight")
    except ValueError as error:
        raise UsageError(f"a weight is {text!r}; it must be a number of nanoseconds") from error
