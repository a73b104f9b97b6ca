"""One door for the command line, EdgeDeployer and EdgeToolchain: what was asked for, in their words, to the report."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgewise.errors import UsageError
from edgewise.export.limits import MAX_TOKENS, THREADS, Bounds
from edgewise.export.proof.gate import Gate
from edgewise.export.report.facts import report, write
from edgewise.export.report.page import page
from edgewise.export.run import Order, export
from edgewise.export.sources.model import Language, resolved
from edgewise.export.wanted import LANGUAGE_OPTIONS, OPTIONS, Wanted, parsed
from edgewise.export.work.job import Source, Task

Show = Callable[[str, int, int], None]


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
    source = resolved(asked.model, home, show, task=asked.task, shapes=asked.shapes, max_tokens=asked.max_tokens)
    wanted = parsed(asked.to, asked.precision, language=isinstance(source, Language))
    return exported_as(source, wanted, asked, home, show)


def exported_as(
    source: Source | Language, wanted: Sequence[Wanted], asked: Asked, home: Path, show: Show
) -> dict[str, Any]:
    """The same for a source that was found already and artifacts that something else has chosen."""
    started = time.monotonic()
    if asked.strict and asked.max_drop is None:
        raise UsageError("--strict has no budget to hold anything against", hint="give --max-drop")
    known = LANGUAGE_OPTIONS if isinstance(source, Language) else OPTIONS
    wanted = _with_options(wanted, asked.options, known)
    gate = Gate(asked.max_drop, asked.strict)
    if isinstance(source, Language):
        from edgewise.export.language.run import report_of

        _check_language(asked)
        facts = report_of(
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
    else:
        order = Order(
            source,
            wanted,
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
        facts = report(source, done.begun, gate, done.results, time.monotonic() - started)
    write(asked.output, facts, page(facts))
    return facts


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
            raise UsageError(f"{flag} is not for a language model", hint="it takes texts: --inputs FILE.txt or .jsonl")


def _with_options(
    wanted: Sequence[Wanted], options: Mapping[str, Mapping[str, Any]], known: Mapping[str, tuple[str, ...]]
) -> tuple[Wanted, ...]:
    """UsageError for options of targets that are not asked for, and for unknown ones."""
    targets = {one.target for one in wanted}
    for target, given in options.items():
        if target not in targets:
            raise UsageError(
                f"--option is of {target}, which --to does not name", hint=f"it names {', '.join(targets)}"
            )
        if unknown := set(given) - set(known[target]):
            raise UsageError(
                f"{target} has no option {', '.join(sorted(unknown))}",
                hint=f"it has {', '.join(known[target]) or 'none'} here",
            )
    return tuple(replace(one, options={**one.options, **options.get(one.target, {})}) for one in wanted)
