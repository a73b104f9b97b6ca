"""One door for the command line, EdgeDeployer and EdgeToolchain: what was asked for, in their words, to the report."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from edgewise.errors import SourceError, UsageError
from edgewise.export.limits import MAX_TOKENS, THREADS, Bounds
from edgewise.export.options import LANGUAGE_OPTIONS, OPTIONS, taken
from edgewise.export.output import claimed
from edgewise.export.proof.gate import Gate
from edgewise.export.report.facts import report, write
from edgewise.export.report.page import page
from edgewise.export.run import Order, export
from edgewise.export.sources.data import read_texts
from edgewise.export.sources.model import Language, resolved
from edgewise.export.wanted import Wanted, parsed
from edgewise.export.work.job import Source, Task

Show = Callable[[str, int, int], None]

TEXTS_HINT: Final = "it takes texts: --inputs FILE.txt or .jsonl"


@dataclass(frozen=True, slots=True)
class Asked:
    """As `edgewise export` takes it; docs/export.md."""

    model: str
    to: str
    output: Path
    data: Path | None = None
    precision: str | None = None
    max_drop: float | None = None
    strict: bool = False
    calibration: Path | None = None
    checked: Path | None = None
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    task: Task | None = None
    max_tokens: int = MAX_TOKENS
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    bounds: Bounds = field(default_factory=Bounds)
    threads: int = THREADS
    accept_licence: bool = False


def exported(asked: Asked, home: Path, show: Show = lambda what, done, total: None) -> dict[str, Any]:
    """Converts, proves, writes the report, and gives it. Errors as in `run.export`; what goes wrong with one target is
    in the report."""
    _check_targets(asked)
    source = found(asked, home, show)
    wanted = parsed(asked.to, asked.precision, language=isinstance(source, Language))
    return exported_as(source, wanted, asked, home, show)


def found(asked: Asked, home: Path, show: Show) -> Source | Language:
    """The source. What can be seen to be wrong without it is said before it is downloaded."""
    if asked.strict and asked.max_drop is None:
        raise UsageError("--strict has no budget to hold anything against", hint="give --max-drop")
    for flag, path in (("--inputs", asked.data), ("--calibration", asked.calibration), ("--check", asked.checked)):
        if path is not None and not path.exists():
            raise SourceError(f"there is no {path}", hint=f"give a path that exists as {flag}")
    return resolved(asked.model, home, show, task=asked.task, shapes=asked.shapes, max_tokens=asked.max_tokens)


def exported_as(
    source: Source | Language, wanted: Sequence[Wanted], asked: Asked, home: Path, show: Show
) -> dict[str, Any]:
    """The same for a source that was found already and artifacts that something else has chosen."""
    known = LANGUAGE_OPTIONS if isinstance(source, Language) else OPTIONS
    wanted = taken(wanted, asked.options, known, made=asked.checked is None)
    gate = Gate(asked.max_drop, asked.strict)
    with claimed(asked.output, () if asked.checked else wanted):
        if isinstance(source, Language):
            facts = _of_language(source, wanted, asked, gate, home, show)
        else:
            facts = _of_network(source, wanted, asked, gate, home, show)
        write(asked.output, facts, page(facts))
    return facts


def _of_network(
    source: Source, wanted: Sequence[Wanted], asked: Asked, gate: Gate, home: Path, show: Show
) -> dict[str, Any]:
    started = time.monotonic()
    if source.kind == "savedmodel":
        _check_savedmodel(wanted)
    order = Order(
        source,
        tuple(wanted),
        asked.output,
        data=asked.data,
        calibration=asked.calibration,
        gate=gate,
        preprocessing=asked.preprocessing,
        checked=asked.checked,
        bounds=asked.bounds,
        threads=asked.threads,
    )
    done = export(order, home, show)
    return report(source, done.begun, gate, done.results, time.monotonic() - started)


def _of_language(
    source: Language, wanted: Sequence[Wanted], asked: Asked, gate: Gate, home: Path, show: Show
) -> dict[str, Any]:
    from edgewise.export.language.run import report_of

    _check_language(asked)
    return report_of(
        source,
        wanted,
        asked.output,
        asked.data,
        gate,
        asked.bounds,
        asked.threads,
        home,
        show,
        accept_licence=asked.accept_licence,
    )


def _check_targets(asked: Asked) -> None:
    """UsageError for targets and precisions that no model has."""
    try:
        parsed(asked.to, asked.precision)
    except UsageError as e:
        try:
            parsed(asked.to, asked.precision, language=True)
        except UsageError:
            raise e from None


def _check_savedmodel(wanted: Sequence[Wanted]) -> None:
    """UsageError for what TensorFlow's own converter has not; that it is of litert alone, run.py says."""
    for one in wanted:
        if one.target == "litert" and one.precision == "int4":
            raise UsageError(
                "a SavedModel cannot go to litert in int4", hint="fp16, fp32, int8 and int8-dynamic it can"
            )
        if "layout" in one.options:
            raise UsageError(
                "litert.layout is not for a SavedModel, which keeps its own", hint="leave it away: TensorFlow is nhwc"
            )


def _check_language(asked: Asked) -> None:
    """UsageError for what is of networks alone."""
    given = {
        "--check": asked.checked,
        "--calibration": asked.calibration,
        "--shape": asked.shapes,
        "--mean": asked.preprocessing,
        "--task": asked.task,
    }
    for flag, value in given.items():
        if value:
            raise UsageError(f"{flag} is not for a language model", hint=TEXTS_HINT)
    if asked.data is None:
        return
    if asked.data.is_dir() or asked.data.name.lower().removesuffix(".gz").rpartition(".")[2] not in ("txt", "jsonl"):
        raise UsageError(f"--inputs is {asked.data}, and a language model takes texts", hint=TEXTS_HINT)
    if not read_texts(asked.data)[0]:
        raise UsageError(f"{asked.data} holds no texts", hint="a text a line, or leave --inputs away for our own")
