"""A language model to its targets: the source made readable for all of them, its reference, then each target in turn.

    begin      the source becomes a Hugging Face directory, torch continues the texts or reads them: what is expected
    convert    each target, in a process of its environment; the ONNX form is a bundle, made here
    prove      another process reads the file back, and decodes the same passages token by token over its cache
    judge      the checks of proof/gate.py over the logits, the verdict

Artifacts lie as run.py beside this directory puts them: in `OUTPUT/KEY/`, or `OUTPUT/refused/KEY/`.
"""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from edgewise.errors import EdgewiseError, SourceError
from edgewise.export.language import bundle_lm, parity
from edgewise.export.language.parity import Continued
from edgewise.export.language.passages import STEPS, TEXTS, Heard, Passage, heard_of
from edgewise.export.language.source import LanguageSource, Show, opened
from edgewise.export.limits import THREADS, Bounds
from edgewise.export.proof.gate import (
    LEAST_ROWS,
    Gate,
    check_rows,
    drop_check,
    finite_check,
    numbers_check,
    precision_check,
    told_once,
)
from edgewise.export.report.facts import FORMAT, Result, host
from edgewise.export.sources.data import read_texts
from edgewise.export.sources.model import Language
from edgewise.export.wanted import Wanted
from edgewise.export.work.environments import source_python, target_python
from edgewise.export.work.job import Converted, Job, Proved, Source, Step, converted_of, proved_of
from edgewise.export.work.process import run, versions
from edgewise.models.licence import carry

ENVIRONMENTS: Final = {"litert": "litertlm", "coreml": "coreml"}  # of what is not made in this process
REFERENCE: Final = "reference"


@dataclass(frozen=True, slots=True)
class LanguageOrder:
    """What to do. `texts` are continued, or foretold themselves where they are long enough (none: our own), in `steps`
    steps of decoding each."""

    source: Language
    wanted: tuple[Wanted, ...]
    output: Path
    texts: tuple[str, ...] = ()
    steps: int = STEPS
    gate: Gate = field(default_factory=Gate)
    accept_licence: bool = False
    bounds: Bounds = field(default_factory=Bounds)
    threads: int = THREADS


@dataclass(frozen=True, slots=True)
class LanguageExported:
    """What the reference said, what became of each artifact, and of those that ran, how far they followed it."""

    heard: Heard
    licence: str | None
    results: Mapping[str, Result]
    continued: Mapping[str, Continued]


def report_of(
    source: Language,
    wanted: Sequence[Wanted],
    output: Path,
    data: Path | None,
    gate: Gate,
    bounds: Bounds,
    threads: int,
    home: Path,
    show: Show,
    *,
    accept_licence: bool = False,
) -> dict[str, Any]:
    """Exports, and says what came of it in the words of report/facts.py. `data` is a file of texts."""
    started = time.monotonic()
    texts = tuple(read_texts(data)[0]) if data is not None else ()
    order = LanguageOrder(
        source,
        tuple(wanted),
        output,
        texts,
        gate=gate,
        accept_licence=accept_licence,
        bounds=bounds,
        threads=threads,
    )
    done = export_language(order, home, show)
    return report(order, done, time.monotonic() - started)


def export_language(order: LanguageOrder, home: Path, show: Show = lambda what, done, total: None) -> LanguageExported:
    """Errors as in source.py's `opened`; MissingEnvironment before any work begins; UsageError for a gate on too
    little; ExportError if the reference cannot be computed. What goes wrong with one target is its result."""
    pythons = {REFERENCE: source_python("language", home)}
    foreign = {one.target for one in order.wanted} - {"onnx"}
    pythons |= {target: target_python(ENVIRONMENTS[target], home) for target in foreign}
    check_rows(order.gate, len(order.texts or TEXTS) * order.steps, random=False)
    order.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=order.output) as place:
        work = Path(place).absolute()
        show(f"reading {order.source.name}", 0, 1)
        its = order.source
        model = opened(its.path, home=home, work=work, name=its.name, accept_licence=order.accept_licence)
        return _Export(order, model, work, pythons, show).done()


def report(order: LanguageOrder, done: LanguageExported, seconds: float) -> dict[str, Any]:
    """As report/facts.py's `report`; each target has `continued` besides."""
    passages = done.heard.passages
    continued = {key: asdict(one) for key, one in done.continued.items()}
    return {
        "format": FORMAT,
        "model": {
            "name": order.source.name,
            "kind": "language",
            "task": "continue",
            "parameters": done.heard.parameters,
            "vocab": done.heard.vocab,
            "licence": done.licence,
        },
        "data": {
            "rows": sum(one.steps for one in passages),
            "passages": len(passages),
            "greedy": sum(one.greedy for one in passages),
            "labelled": False,
            "random": False,
            "own": not order.texts,
        },
        "gate": asdict(order.gate),
        "host": host(),
        "seconds": round(seconds, 1),
        "notes": list(done.heard.notes),
        "targets": {key: {**one.facts(), "continued": continued.get(key)} for key, one in done.results.items()},
    }


class _Export:
    """One model on its way to all targets."""

    def __init__(
        self, order: LanguageOrder, model: LanguageSource, work: Path, pythons: Mapping[str, Path], show: Show
    ) -> None:
        self._order, self._model, self._work, self._pythons, self._show = order, model, work, pythons, show
        self._texts = order.texts or TEXTS
        self._source = Source("language", str(model.directory), model.name, "classify")

    def done(self) -> LanguageExported:
        self._show("the reference", 0, 1)
        self._heard = self._reference()
        self._continued: dict[str, Continued] = {}
        results, total = {}, len(self._order.wanted)
        for at, wanted in enumerate(self._order.wanted):
            self._show(f"{wanted.key}: {wanted.precision}", at, total)
            results[wanted.key] = self._result(wanted)
            self._show(f"{wanted.key}: {wanted.precision}", at + 1, total)
        return LanguageExported(self._heard, self._model.licence["id"], results, self._continued)

    def _reference(self) -> Heard:
        tokenizer = self._model.tokenizer
        ids = [[*tokenizer.start_ids, *tokenizer.continued(text)] for text in self._texts]
        if empty := [text for text, its in zip(self._texts, ids, strict=True) if not its]:
            raise SourceError(f"the text {empty[0]!r} has no tokens", hint="give texts of a few words")
        job = self._job("begin", self._work / "begin", options={"texts": ids, "steps": self._order.steps})
        self._expected = self._work / "begin" / "reference"
        return heard_of(run(job, self._pythons[REFERENCE], self._order.bounds))

    # One artifact

    def _result(self, wanted: Wanted) -> Result:
        started = time.monotonic()
        place = self._work / wanted.key.replace(":", "-")
        place.mkdir()
        try:
            made = self._made(wanted, place)
            carry(None, self._model.notices, place)
            result = self._judged(wanted, made)
        except EdgewiseError as e:
            result = Result.failed(wanted, e)
        return replace(result, seconds=time.monotonic() - started).stored(place, self._order.output)

    def _made(self, wanted: Wanted, place: Path) -> Converted:
        artifact = place / self._model.name
        if wanted.target == "onnx":
            return bundle_lm.convert(self._model, wanted.precision, artifact, self._show)
        options = {**self._about(), **wanted.options}
        job = self._step("convert", wanted, str(artifact), options)
        return converted_of(run(job, self._pythons[wanted.target], self._order.bounds))

    def _judged(self, wanted: Wanted, made: Converted) -> Result:
        job = self._step("prove", wanted, made.artifact, {**self._about(), **wanted.options})
        if wanted.target == "onnx":
            proved = bundle_lm.prove(job, self._heard.passages)
            its = {"onnxruntime": version("onnxruntime"), "onnx": version("onnx")}
            found: Mapping[str, str] = {"python": platform.python_version(), "edgewise": version("edgewise"), **its}
        else:
            proved = proved_of(run(job, self._pythons[wanted.target], self._order.bounds))
            found = versions(job)
        checks = [*made.checks, *proved.checks, precision_check(proved, wanted.precision, kept=True)]
        figures = self._compared(Path(job.work) / "logits", wanted, proved, checks)
        told = told_once(checks)
        refused = any(not one.ok for one in told)
        return Result(wanted, "refused" if refused else "ok", made, proved, told, figures, versions=found)

    def _compared(self, logits: Path, wanted: Wanted, proved: Proved, checks: list[Any]) -> Any:
        """The figures, if there are logits; what they say is added to the checks."""
        passages, gate = self._heard.passages, self._order.gate
        numbers = parity.run(passages, logits) if proved.ran else []
        if not numbers:
            return None
        found, expected = parity.rows(numbers, logits), parity.rows(numbers, self._expected)
        checks.append(finite_check([found], [expected]))
        if not checks[-1].ok:
            return None
        figures = parity.compared(found, expected)
        checks.append(numbers_check(figures.outputs[0], wanted.precision))
        check_rows(gate, len(found), random=False)
        if figures.drop is not None and (check := drop_check(figures.drop, gate)) is not None:
            checks.append(check)
        self._continued[wanted.key] = parity.continued([passages[n] for n in numbers], found, expected)
        return figures

    # Jobs

    def _about(self) -> dict[str, Any]:
        """What targets are told: the model's card, the passages, and as text those that the reference continued."""
        passages, gated = self._heard.passages, self._order.gate.max_drop is not None
        return {
            "most": -(-LEAST_ROWS // self._order.steps) if gated else None,
            "card": self._model.card.to_json(),
            "start": list(self._model.tokenizer.start_ids),
            "passages": [{"ids": one.ids, "start": one.start, "greedy": one.greedy} for one in passages],
            "prompts": [
                {"text": text, "ids": one.ids[: one.start], "answer": self._answer(one)}
                for text, one in zip(self._texts, passages, strict=True)
                if one.greedy
            ],
        }

    def _answer(self, passage: Passage) -> str:
        """Up to the token that ends it."""
        tokenizer, said = self._model.tokenizer, passage.ids[passage.start :]
        stop = next((n for n, id in enumerate(said) if id in tokenizer.stop_ids), len(said))
        return tokenizer.decode(said[:stop])

    def _step(self, step: Step, wanted: Wanted, artifact: str, options: Mapping[str, Any]) -> Job:
        work = self._work / f"{step}-{wanted.key.replace(':', '-')}"
        return self._job(
            step,
            work,
            target=wanted.target,
            precision=wanted.precision,
            artifact=artifact,
            reference=str(self._expected),
            options=options,
        )

    def _job(self, step: Step, work: Path, **more: Any) -> Job:
        work.mkdir(parents=True, exist_ok=True)
        return Job(step, self._source, str(work), threads=self._order.threads, **more)
