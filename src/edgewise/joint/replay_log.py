"""The replay that a running node writes: what policies are fitted on again. docs/formats/replay.md is the format.

Texts stand in it only where somebody asked for that. Of a request that a privacy rule keeps on the device there is no
row at all. Rows are made and written in a thread of their own; a disk that fails costs rows and never an answer.
"""

from __future__ import annotations

import logging
import os
import random
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Literal, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from edgewise.errors import ConfigError
from edgewise.joint.core import Follow, Trail
from edgewise.joint.pair import Pair
from edgewise.joint.replay import Outcome, Row
from edgewise.joint.signals.answer import ENDED_SIGNALS, TOP_SIGNALS
from edgewise.joint.signals.evidence import ANSWER_SIGNALS, PROMPT_SIGNALS, Evidence
from edgewise.types import Decision

log = logging.getLogger(__name__)

T = TypeVar("T")
Written = Literal["written", "failed", "dropped"]

SIZE_LIMIT: Final = 256 << 20  # bytes of one file; then it becomes the older one, and the one before that is forgotten
WAITING: Final = 256  # rows that may wait for the disk
DIGITS: Final = 6  # behind the point, of the numbers in a row
MODE: Final = 0o600  # of the file: it may hold what users said
TAIL: Final = 1 << 16  # bytes read at once from a file's end
WORD: Final = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Seen:
    """One row to write. `cloud` and `alike`, how much the answers have in common (0..1), are None where the cloud was
    not heard; `both` says that both tiers were heard for the answer's own sake."""

    decision: Decision
    edge: Evidence
    cloud: Evidence | None
    alike: float | None
    both: bool


class ReplayLog:
    """Appends to `path`. With `texts` it keeps prompts and answers, else only numbers read off them. `share` of the
    requests are drawn, each by its own lot, to be answered by both tiers. What would be more than `waiting_limit` rows
    that wait for the disk is dropped. ConfigError if the file cannot be opened."""

    def __init__(
        self,
        path: Path,
        pair: Pair | None = None,
        *,
        texts: bool = False,
        share: float = 0.0,
        size_limit: int = SIZE_LIMIT,
        waiting_limit: int = WAITING,
        lot: Callable[[], float] = random.random,
    ) -> None:
        self._path = path
        self._pair = pair
        self._texts = texts
        self._share = share
        self._size_limit = size_limit
        self._waiting_limit = waiting_limit
        self._lot = lot
        self._waiting = 0
        self.rows: Counter[Written] = Counter()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file, self._size = _opened(path)
        except OSError as error:
            raise ConfigError(
                f"the replay log {path} cannot be written: {error.strerror or error}", hint="name another with --log"
            ) from error
        self._writer = ThreadPoolExecutor(1, "edgewise-replay-log")

    def follow(self, rows: Callable[[Trail[T]], Sequence[Seen]]) -> Follow[T]:
        """What to know of one request, whose lot is drawn here; `rows` reads them off what became of it."""
        return Follow(self._lot() < self._share, partial(self._report, rows))

    def close(self) -> None:
        """Write what waits, and close the file. Idempotent."""
        self._writer.shutdown(wait=True)
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _report(self, rows: Callable[[Trail[T]], Sequence[Seen]], trail: Trail[T]) -> None:
        if self._waiting >= self._waiting_limit:
            self.rows["dropped"] += 1
            return
        self._waiting += 1
        try:
            self._writer.submit(self._write, rows, trail)
        except RuntimeError:  # closed meanwhile
            self._waiting -= 1
            self.rows["dropped"] += 1

    def _write(self, rows: Callable[[Trail[T]], Sequence[Seen]], trail: Trail[T]) -> None:
        try:
            lines = [msgspec.json.encode(self._row(seen)) + b"\n" for seen in rows(trail)]
            data = b"".join(lines)
            if self._size + len(data) > self._size_limit:
                self._turn()
            _write_all(self._file, data)
            self._size += len(data)
            self.rows["written"] += len(lines)
        except Exception as error:
            if not self.rows["failed"]:
                log.warning("rows of the replay log are lost: %s", type(error).__name__)
            self.rows["failed"] += 1
        finally:
            self._waiting -= 1

    def _row(self, seen: Seen) -> Row:
        decision, confidence = seen.decision, seen.decision.confidence
        drawn = 0.0 if not self._share else 1.0 if seen.both else self._share
        return Row(
            id=secrets.token_hex(8),
            edge=self._edge(seen.edge, seen.alike),
            cloud=self._cloud(seen.cloud, seen.alike),
            prompt=seen.edge.prompt if self._texts else None,
            group=seen.edge.group,
            time=round(time.time(), 3),
            pair=self._pair,
            route=decision.route,
            reason=str(decision.reason),
            confidence=None if confidence is None else round(confidence, DIGITS),
            drawn=drawn,
        )

    def _edge(self, evidence: Evidence, alike: float | None) -> Outcome:
        """All that a decision could look at; without the texts, the numbers that were read off them."""
        names = TOP_SIGNALS if self._texts else (*TOP_SIGNALS, *ENDED_SIGNALS, *PROMPT_SIGNALS, *ANSWER_SIGNALS)
        found = {name: evidence.get(name) for name in names}
        return Outcome(
            quality=None if alike is None else round(alike, DIGITS),
            text=evidence.text if self._texts else None,
            finish_reason=evidence.finish_reason,
            logits=None if evidence.logits is None or evidence.logits.ndim != 1 else _short(evidence.logits),
            runs=tuple(_short(run) for run in evidence.runs if run.ndim == 1),
            token_logprobs=tuple(None if p is None else round(p, DIGITS) for p in evidence.logprobs) or None,
            signals={**_given(evidence), **{k: round(v, DIGITS) for k, v in found.items() if v is not None}},
        )

    def _cloud(self, evidence: Evidence | None, alike: float | None) -> Outcome:
        text = evidence.text if evidence is not None and self._texts else None
        return Outcome(quality=None if alike is None else 1.0, text=text)

    def _turn(self) -> None:
        """Begin a new file, as a device's disk has an end."""
        os.close(self._file)
        self._file = -1
        os.replace(self._path, self._path.with_name(f"{self._path.name}.old"))
        self._file, self._size = _opened(self._path)


def likeness(one: str, other: str) -> float:
    """How much two texts have in common, 0..1: the F1 of their words, with their counts and without their order
    (Rajpurkar et al. 2016 measure answers so); 1 for two without words."""
    words, others = (Counter(WORD.findall(text.casefold())) for text in (one, other))
    if not words and not others:
        return 1.0
    return 2 * (words & others).total() / (words.total() + others.total())


def _short(logits: npt.NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(round(value, DIGITS) for value in logits.tolist())


def _given(evidence: Evidence) -> dict[str, float | None]:
    return {name: value for name, value in evidence.given.items() if value is not None}


def _opened(path: Path) -> tuple[int, int]:
    """The file and its size, without the end of a row that a power cut tore."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, MODE)
    try:
        size = whole = os.fstat(file).st_size
        while whole:
            start = max(0, whole - TAIL)
            end = os.pread(file, whole - start, start).rfind(b"\n")
            if end >= 0:
                whole = start + end + 1
                break
            whole = start
        if whole < size:
            log.warning("%s ended in the middle of a row: the last %d bytes are cut off", path.name, size - whole)
            os.ftruncate(file, whole)
        return file, whole
    except BaseException:
        os.close(file)
        raise


def _write_all(file: int, data: bytes) -> None:
    """A row in one piece, wherever the system lets it."""
    while data:
        data = data[os.write(file, data) :]
