"""A distillation from its config to a student with a card; torch comes in with loop.py and student.py.

Each piece is kept in the output and found again: a run that was killed goes on where it was, whichever piece that was.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
from accelerate import PartialState
from transformers import PreTrainedModel

from edgewise.compress.distil import report
from edgewise.compress.distil.config import STARTS, Config
from edgewise.compress.distil.loop import LOG, Lessons, Tell, Trained, begun, train
from edgewise.compress.judge.kept import kept_ids
from edgewise.compress.lessons.answers import prompts_of, written
from edgewise.compress.lessons.corpus import Corpus, build
from edgewise.compress.lessons.documents import Document, Encoder, Gathered, gathered
from edgewise.compress.lessons.teacher import Taught, teach
from edgewise.compress.storing import storing
from edgewise.compress.student.depth import needed_layers
from edgewise.compress.student.network import made, saved
from edgewise.compress.student.surgery import smaller
from edgewise.compress.student.vocabulary import counted, pruned
from edgewise.engines.decode import Decoder
from edgewise.engines.load import loaded
from edgewise.errors import UsageError
from edgewise.models.bundle import MANIFEST, Bundle
from edgewise.models.download import Progress
from edgewise.models.hf_weights import HfWeights, of
from edgewise.models.source import pull
from edgewise.models.store import bundles_dir, find
from edgewise.models.tokenizer_files import TokenizerFiles
from edgewise.types import IdArray

READ: Final = 4  # rows that say which layers a teacher needs
AT_ONCE: Final = 8  # answers that the teacher writes side by side
PATIENCE: Final = timedelta(days=7)  # of processes that wait for the one that asks the teacher


@dataclass(frozen=True, slots=True)
class Distilled:
    """`student` is a Hugging Face directory. `first` says whether this is the process that speaks for all."""

    first: bool
    student: Path
    parameters: int
    trained: Trained
    corpus: Corpus


def distil(config: Config, *, home: Path, resume: bool, progress: Progress, tell: Tell, command: str) -> Distilled:
    """Gather the text, ask the teacher, make the student, train it, and save it with its card to `config.output`.
    `home` is where bundles are. Raises what the pieces raise: UsageError, SourceError, StorageError, Diverged,
    CheckpointError and whatever a bundle cannot be read for."""
    state = PartialState(timeout=PATIENCE)
    progress = progress if state.is_main_process else _silent
    goes_on = begun(Path(config.output), config, resume) is not None
    with state.main_process_first():
        ready = _prepare(config, home, progress, first=state.is_main_process, goes_on=goes_on)
    model = _student(config, ready)
    output = Path(config.output)
    trained = train(model, ready.lessons, config, output, resume=resume, progress=progress, tell=tell)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if state.is_main_process:
        _save(config, ready, model, parameters, trained, command)
    state.wait_for_everyone()
    return Distilled(state.is_main_process, output / "student", parameters, trained, ready.corpus)


def _silent(what: str, done: int, total: int) -> None:
    """Of several processes one shows where they are."""


@dataclass(frozen=True, slots=True)
class _Ready:
    """All that the training needs. `kept`: the teacher's ids of the student's tokens, None for all. `layers`: those
    that the student begins with, or how many of its start's, None for all."""

    weights: HfWeights
    tokenizer: TokenizerFiles
    kept: IdArray | None
    layers: int | list[int] | None
    corpus: Corpus
    lessons: Lessons


def _prepare(config: Config, home: Path, progress: Progress, *, first: bool, goes_on: bool) -> _Ready:
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    bundle = _teacher(config.teacher, home, output, progress, first=first)
    weights = of(bundle if _is_bundle(config.teacher, bundle) else Path(config.teacher))
    _check_sizes(config, bundle, weights)
    answers = _answers(config, bundle, output, progress)
    tokenizer, kept = _vocabulary(config, weights, answers, progress)
    encoder = Encoder.of(tokenizer)
    found = _gathered(config, answers)
    data = config.data
    corpus = build(
        found.sources,
        encoder,
        output / "corpus",
        end=encoder.end,
        length=data.length,
        held_out=data.held_out,
        limit_tokens=data.limit_tokens,
        recipe=f"{found.digest} {encoder.digest}",
        replace=not goes_on,
        tell=progress,
    )
    layers = _layers(config, bundle, corpus, kept, progress)
    return _Ready(weights, tokenizer, kept, layers, corpus, _lessons(config, bundle, corpus, kept, progress))


def _is_bundle(teacher: str, bundle: Bundle) -> bool:
    """Whether the config names the bundle itself, and not the file or directory that it was made of."""
    return not Path(teacher).exists() or bundle.path == Path(teacher)


def _check_sizes(config: Config, bundle: Bundle, weights: HfWeights) -> None:
    """UsageError for what the teacher has not, before it is asked anything."""
    wanted, context = config.student, bundle.card.context
    if config.data.length > context:
        raise UsageError(
            f"rows of {config.data.length} tokens are wanted, the teacher reads {context}", hint="lower data.length"
        )
    source = weights if wanted.start in STARTS else of(Path(wanted.start))
    size = int(smaller(source, layers=wanted.layers, hidden=wanted.hidden, ffn=wanted.ffn).config["vocab_size"])
    vocabulary = min(wanted.vocabulary or size, size)
    if config.loss.top_k > vocabulary:
        raise UsageError(
            f"loss.top_k is {config.loss.top_k}, the student has {vocabulary} tokens", hint="lower loss.top_k"
        )


def _teacher(name: str, home: Path, output: Path, progress: Progress, *, first: bool) -> Bundle:
    """The bundle that answers for the teacher; of a model's own files one is made in the output, once."""
    path = Path(name)
    if not path.exists() or (path / MANIFEST).is_file():
        return find(name, home, check=False)
    place, file = output / "teacher", output / "teacher.json"
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    call = {"files": [[one.name, one.stat().st_size, one.stat().st_mtime_ns] for one in files]}
    if first and _kept(file, call) is None:
        pull(name, home=place, name="teacher", progress=progress)
        _keep(file, call)
    return Bundle.open(bundles_dir(place) / "teacher", check=False)


def _answers(config: Config, bundle: Bundle, output: Path, progress: Progress) -> Path | None:
    """What the teacher writes itself, if it is to."""
    wanted = config.data.generate
    if wanted is None:
        return None
    file = output / "answers.jsonl"
    model, tokenizer = loaded(bundle, slots=AT_ONCE)
    generator = Decoder(model, tokenizer, name=bundle.name)
    try:
        return written(
            generator,
            prompts_of(Path(wanted.prompts)),
            file,
            count=wanted.count,
            at_once=AT_ONCE,
            chats=tokenizer.chats,
            max_tokens=wanted.max_tokens,
            temperature=wanted.temperature,
            seed=wanted.seed,
            tell=progress,
        )
    finally:
        asyncio.run(generator.close())


def _gathered(config: Config, answers: Path | None) -> Gathered:
    data = config.data
    fields = (data.field,) if isinstance(data.field, str) else data.field
    return gathered(text=data.text, jsonl=data.jsonl, fields=fields, hub=data.hub, answers=answers)


def _vocabulary(
    config: Config, weights: HfWeights, answers: Path | None, progress: Progress
) -> tuple[TokenizerFiles, IdArray | None]:
    """The student's tokenizer, and which of the teacher's tokens its tokens are."""
    if config.student.start not in STARTS:
        tokenizer = of(Path(config.student.start)).tokenizer
        return tokenizer, kept_ids(tokenizer.opened(), weights.tokenizer.opened())
    size = config.student.vocabulary
    if size is None or size >= weights.tokenizer.config.vocabulary:
        return weights.tokenizer, None
    found = pruned(weights.tokenizer, _counts(config, weights.tokenizer, answers, progress), size)
    return found.files, found.kept


def _counts(config: Config, tokenizer: TokenizerFiles, answers: Path | None, progress: Progress) -> IdArray:
    """How often each of the teacher's tokens stands in the text, counted once and kept."""
    found = _gathered(config, answers)
    file = Path(config.output) / "counts.json"
    call = {"text": found.digest, "tokenizer": hashlib.sha256(tokenizer.core.encode()).hexdigest()}
    if (there := _kept(file, call)) is not None:
        return np.array(there["counts"], np.int64)
    progress("counting tokens", 0, 1)
    counts = counted(tokenizer, _texts(itertools.chain(*found.sources.values())))
    progress("counting tokens", 1, 1)
    _keep(file, call | {"counts": counts.tolist()})
    return counts


def _kept(file: Path, call: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier start found, if it looked for the same."""
    if not file.is_file():
        return None
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found if found | call == found else None


def _keep(file: Path, found: dict[str, Any]) -> None:
    with storing(file) as room:
        room.write_text(json.dumps(found), encoding="utf-8")


def _texts(documents: Iterator[Document]) -> Iterator[str]:
    for document in documents:
        yield from (text for text in (document.prompt, document.text) if text)


def _layers(
    config: Config, bundle: Bundle, corpus: Corpus, kept: IdArray | None, progress: Progress
) -> int | list[int] | None:
    """Where a number of the teacher's layers is wanted, the ones that it needs most are looked for once, and kept
    beside what they were found with."""
    wanted = config.student.layers
    if isinstance(wanted, tuple):
        return list(wanted)
    if wanted is None or config.student.start != "teacher":
        return wanted
    file = Path(config.output) / "layers.json"
    call = {"teacher": bundle.weights, "corpus": corpus.digest, "count": wanted}
    if (there := _kept(file, call)) is not None:
        return cast("int | list[int]", there["layers"])
    rows = corpus.train[:: max(1, len(corpus.train) // READ)][:READ].astype(np.int64)
    layers = needed_layers(bundle, [row if kept is None else kept[row] for row in rows], wanted, progress) or wanted
    _keep(file, call | {"layers": layers})
    return layers


def _lessons(config: Config, bundle: Bundle, corpus: Corpus, kept: IdArray | None, progress: Progress) -> Lessons:
    """The teacher is asked about what is held out in any case; about the rest, unless the text alone teaches."""
    output, loss = Path(config.output), config.loss

    def told(rows: Any, name: str) -> Taught:
        return teach(bundle, rows, loss.top_k, output / "taught" / name, progress, kept=kept)

    taught = told(corpus.train, "train") if loss.alpha else None
    chosen = b"" if kept is None else np.ascontiguousarray(kept, "<i8").tobytes()
    digest = hashlib.sha256(f"{corpus.digest} {bundle.weights} ".encode() + chosen).hexdigest()
    return Lessons(corpus.train, corpus.held_out, taught, told(corpus.held_out, "held_out"), digest)


def _student(config: Config, ready: _Ready) -> PreTrainedModel:
    """UsageError if it has another vocabulary than its tokenizer."""
    wanted = config.student
    model = made(
        ready.weights,
        start=wanted.start,
        layers=ready.layers,
        kept=ready.kept,
        hidden=wanted.hidden,
        ffn=wanted.ffn,
        seed=config.train.seed,
    )
    most, size = int(max(ready.corpus.train.max(), ready.corpus.held_out.max())), int(model.config.vocab_size)
    if size != ready.tokenizer.config.vocabulary or most >= size:
        raise UsageError(
            f"the student has {size} tokens, its tokenizer {ready.tokenizer.config.vocabulary}",
            hint="both need one vocabulary",
        )
    model.config.use_cache = False  # nothing is read twice
    return model


def _save(
    config: Config, ready: _Ready, model: PreTrainedModel, parameters: int, trained: Trained, command: str
) -> None:
    model.config.use_cache = True
    output, corpus = Path(config.output), ready.corpus.facts
    source = ready.weights if config.student.start in STARTS else of(Path(config.student.start))
    directory = saved(model, ready.tokenizer, output / "student", licence=source.licence, notices=source.notices)
    plots = {
        report.LOSS: report.loss_plot(config.name, trained.log),
        report.AGREEMENT: report.agreement_plot(config.name, trained.log),
    }
    drawn = {name: plot for name, plot in plots.items() if plot is not None}
    for name, plot in drawn.items():
        (directory / name).write_text(plot, encoding="utf-8")
    facts = report.Facts(
        teacher=ready.weights.name,
        licence=source.licence,
        teachers_licence=ready.weights.licence,
        parameters=parameters,
        vocabulary=ready.tokenizer.config.vocabulary,
        documents=corpus.documents,
        rows=corpus.rows,
        held_out_rows=corpus.held_out_rows,
        sources=corpus.sources,
        command=command,
    )
    (directory / "README.md").write_text(report.card(config, facts, trained.log, list(drawn)), encoding="utf-8")
    shutil.copyfile(output / LOG, directory / LOG)
