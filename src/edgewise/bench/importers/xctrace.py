"""Xcode Instruments: the table `time-profile` as `xctrace export --xpath …` writes it.

Sources of the format: sundresh/WindowsProfilingTools, ProfileAnalyzer/Docs/InstrumentsTraceXML.md, which describes a
real export with its elements; and for `tagged-backtrace`, which newer exports have in the place of `backtrace` or
around it, LadybirdBrowser/ladybird, Meta/analyze-xctrace-time-profile.py. Tables without a published description are
refused by name.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Final
from xml.parsers import expat

from edgewise.bench.importers.result import checked, dearest, imported, total
from edgewise.bench.measure import Measurement
from edgewise.errors import UsageError

TABLE: Final = "time-profile"
STACKS: Final = ("backtrace", "tagged-backtrace")
READ: Final = frozenset({"process", "thread-state", "weight", "frame", *STACKS})
DEPTH_LIMIT: Final = 64
VALUE_LIMIT: Final = 100  # characters of a number or a state
RUNNING: Final = "Running"
NO_STACK: Final = "no backtrace"


@dataclass(slots=True)
class _Element:
    """`label` is what it is called: of a frame its name, of a stack the first frame within, else how it is shown."""

    tag: str
    id: str | None = None
    label: str = ""
    text: str = ""
    weight: float = 0.0
    shared: bool = False  # stands for one that was given before, and holds nothing of its own


@dataclass(slots=True)
class _Sample:
    """A row: weight in ns, and who ran."""

    weight: float | None = None
    process: str = "unknown"
    function: str = ""
    state: str = RUNNING  # older tables have none, and hold running threads only


def read(data: bytes) -> Measurement:
    """CPU time by process and by the function on top of the stack, the dearest first."""
    rows = _Reader().samples(data)
    samples = [row for row in rows if row.state == RUNNING and row.weight is not None]
    if samples and not any(sample.function for sample in samples):
        known = " and ".join(f"<{tag}>" for tag in STACKS)
        why = f"none of the {len(samples)} samples has a frame: stacks are read from {known}"
        raise UsageError(why, hint="export the table of Time Profiler, which has symbols")
    everything, processes, functions = [], defaultdict(list), defaultdict(list)
    for sample in samples:
        ms = (sample.weight or 0.0) / 1e6
        everything.append(ms)
        processes[sample.process].append(ms)
        functions[sample.function or NO_STACK].append(ms)
    results = {"cpu time": total(everything, "ms")} if samples else {}
    results |= {f"process {name}": total(took, "ms") for name, took in dearest(processes).items()}
    results |= {f"function {name}": total(took, "ms") for name, took in dearest(functions).items()}
    left_out = {
        "samples of threads that did not run": sum(row.state != RUNNING for row in rows),
        "samples without a weight": sum(row.state == RUNNING and row.weight is None for row in rows),
    }
    return imported("xctrace", results, settings={"table": TABLE}, left_out=left_out)


class _Reader:
    """Rows out of the XML. An element that was given with `id` is meant again by `ref`, which is empty itself. A
    document type is refused, so no entity can be declared and none expands."""

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
        if self._open and self._open[-1].shared:
            raise self._spoiled(self._open[-1])
        if tag == "schema":
            self._schema(attributes.get("name", ""))
        elif tag == "row":
            self._row = _Sample()
        self._open.append(self._element(tag, attributes) if tag in READ else _Element(tag))

    def _schema(self, name: str) -> None:
        if name != TABLE:
            raise UsageError(f"this is the table {name!r} of xctrace; only {TABLE} is read", hint="export that one")
        self._table = True

    def _element(self, tag: str, attributes: dict[str, str]) -> _Element:
        if "ref" in attributes:
            meant = self._known.get((tag, attributes["ref"]))
            if meant is None:
                raise UsageError(f"a <{tag}> refers to id {attributes['ref'][:40]!r}, which stands nowhere before it")
            return _Element(tag, None, meant.label, meant.text, meant.weight, shared=True)
        if tag in STACKS:  # how it is shown is shortened: "main ← (11 other frames)"
            return _Element(tag, attributes.get("id"))
        shown = ("name", "addr") if tag == "frame" else ("fmt",)
        return _Element(tag, attributes.get("id"), next(filter(None, map(attributes.get, shown)), ""))

    def _text(self, text: str) -> None:
        element = self._open[-1] if self._open else None
        if element is not None and element.shared and text.strip():
            raise self._spoiled(element)
        if element is None or element.tag not in ("weight", "thread-state"):
            return
        element.text += text
        if len(element.text) > VALUE_LIMIT:
            raise UsageError(f"a <{element.tag}> has more than {VALUE_LIMIT} characters")

    def _spoiled(self, element: _Element) -> UsageError:
        why = f"a <{element.tag}> refers to one before it and has content of its own, as xctrace never writes it"
        return UsageError(why, hint="export the table again")

    def _end(self, tag: str) -> None:
        element = self._open.pop()
        if element.tag == "weight" and not element.shared:
            element.weight = _number(element.text)
        if element.id is not None:
            self._known[element.tag, element.id] = element
        above = self._open[-1] if self._open else None
        if tag == "row" and self._row is not None:
            self._samples.append(self._row)
            self._row = None
        elif above is not None and above.tag in STACKS and not above.label:  # the first frame is the top of the stack
            above.label = (element.label or "unknown") if tag == "frame" else element.label
        elif self._row is not None and above is not None and above.tag == "row":
            self._cell(self._row, element)

    def _cell(self, row: _Sample, element: _Element) -> None:
        if element.tag == "weight":
            row.weight = element.weight
        elif element.tag == "process":
            row.process = element.label or row.process
        elif element.tag == "thread-state":
            row.state = element.text.strip() or element.label or row.state
        elif element.tag in STACKS:
            row.function = element.label or row.function


def _number(text: str) -> float:
    try:
        return checked(float(text), "a weight")
    except ValueError as error:
        raise UsageError(f"a weight is {text!r}; it must be a number of nanoseconds") from error
